"""Attention of a drafted tree in two parts: a prefix without a tree mask, and the tree itself.

Source: LongSpec, arXiv 2502.17421. Only the second part, as small as the tree, pays for a mask of
its own; the first is whatever serves a plain query run fastest. The parts are joined by `merge`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ops.attention.api import BlockSizes, attention
from ops.attention.mask import AttentionMask
from ops.attention.merge import merge


def hybrid_tree_attention(
    q: Float[Array, "b t h d"],
    k_prefix: Float[Array, "b s g d"],
    v_prefix: Float[Array, "b s g dv"],
    prefix: AttentionMask,
    k_tree: Float[Array, "b n g d"],
    v_tree: Float[Array, "b n g dv"],
    tree: Bool[Array, "#b t n"],
    *,
    scale: float | Float[Array, ""] | None = None,
    implementation: str = "auto",
    blocks: BlockSizes | None = None,
) -> Float[Array, "b t h dv"]:
    """Attention over the union of a prefix and n new entries of which `tree` says who sees what.

    Equal to attention over the concatenation for every split, an empty prefix included.

    Args:
      prefix: what of the prefix the queries see: its lengths, or positions and a window.
      tree: ancestors and self of every query among the new entries.
      scale, implementation, blocks: as of `attention`, for both parts.

    Raises:
      ValueError: see `attention`, or a prefix mask that holds a tree itself.
    """
    if prefix.tree is not None:
        raise ValueError("the tree is an argument of its own: give a prefix mask without one")
    options: Any = {"scale": scale, "implementation": implementation, "blocks": blocks}
    nodes = AttentionMask(tree=tree, tree_start=jnp.zeros(q.shape[0], jnp.int32))
    before = attention(q, k_prefix, v_prefix, mask=prefix, return_lse=True, **options)
    among = attention(q, k_tree, v_tree, mask=nodes, return_lse=True, **options)
    return merge(*before, *among)[0]
