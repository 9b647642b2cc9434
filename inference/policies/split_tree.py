"""Dense attention that takes a drafted tree apart from what the cache held before it.

Source: LongSpec's hybrid tree attention, arXiv 2502.17421, for the model's own pass over a draft.
The plain dense policy masks all slots for every node; here only the tree has a mask of its own. The
numbers are the same. The TPU kernel looks the tree up only where it lies, and needs none of this.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models.attention import DensePolicy, Step, dense_mask
from models.sharding import mesh_in_force
from ops.attention import hybrid_tree_attention


@struct.dataclass
class SplitTreePolicy(DensePolicy):
    """:class:`DensePolicy`, with trees in two parts; under a mesh it is the dense one."""

    def mix(
        self,
        layer: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g dv"],
        step: Step,
        cached: bool,
        scale: float,
    ) -> Float[Array, "b t h dv"]:
        """See :class:`DensePolicy`."""
        if not cached or step.tree is None or mesh_in_force() is not None:
            return super().mix(layer, q, k, v, step, cached, scale)
        mask = dense_mask(step, layer, cached)
        prefix = dataclasses.replace(mask, tree=None, tree_start=None, lengths=step.tree_start)
        if layer is None:
            # All of the prefix stands before every node: its length says it all.
            prefix = dataclasses.replace(prefix, q_positions=None, k_positions=None, causal=False)
        nodes = step.tree_start[:, None] + jnp.arange(mask.tree.shape[2], dtype=jnp.int32)[None]
        k_tree, v_tree = (
            jnp.take_along_axis(leaf, nodes[:, :, None, None], axis=1) for leaf in (k, v)
        )
        return hybrid_tree_attention(
            q, k, v, prefix, k_tree, v_tree, mask.tree, scale=scale,
            implementation=self.implementation, blocks=self.blocks,
        )  # fmt: skip


def split_tree(policy: DensePolicy) -> SplitTreePolicy:
    """A dense policy, with its windows and its scheme, that takes trees in two parts."""
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return SplitTreePolicy(**fields)
