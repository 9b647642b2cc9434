"""Attention over the devices of a mesh: a kernel is called inside ``shard_map``, the rest is not.

XLA divides its own operations between devices, but it refuses to divide a Pallas kernel. The mesh
is the one in force where the program is traced (``jax.set_mesh``), so that nothing has to hand it
down to the layers.
"""

import functools
import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from models.sharding import DEFAULT_RULES
from ops.attention import AttentionMask, BlockSizes, attention
from ops.platform import target_platform

_AXES = dict(DEFAULT_RULES)


def mesh_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    *,
    mask: AttentionMask,
    implementation: str = "auto",
    blocks: BlockSizes | None = None,
) -> Float[Array, "b t h dv"]:
    """:func:`ops.attention.attention` under whatever mesh is in force.

    Rows go over the axes of ``batch`` and heads over those of ``heads`` in the default sharding
    rules; each device runs the kernel on its part, and nothing is exchanged. Where the rows, or
    the query and key heads, are no multiple of the axes' sizes, every device computes all of them.

    Raises:
        ValueError: see :func:`ops.attention.attention`.
    """
    call = functools.partial(attention, implementation=implementation, blocks=blocks)
    chosen = target_platform() if implementation == "auto" else implementation
    mesh = jax.sharding.get_abstract_mesh()
    divided = not mesh.empty and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
    if chosen not in ("tpu", "interpret") or not divided:
        return call(q, k, v, mask=mask)
    rows = _dividing(mesh, "batch", q.shape[0])
    heads = PartitionSpec(rows, None, _dividing(mesh, "heads", math.gcd(q.shape[2], k.shape[2])))

    def of_mask(x: Array) -> PartitionSpec:
        # A field without rows of its own (a window, a broadcast batch) is the same everywhere.
        return PartitionSpec(rows) if x.ndim and x.shape[0] == q.shape[0] else PartitionSpec()

    return jax.shard_map(
        lambda q, k, v, mask: call(q, k, v, mask=mask),
        mesh=mesh,
        in_specs=(heads, heads, heads, jax.tree.map(of_mask, mask)),
        out_specs=heads,
        # The interpreter's own loops do not type what varies between devices.
        check_vma=chosen != "interpret",
    )(q, k, v, mask)


def _dividing(mesh: jax.sharding.AbstractMesh, logical: str, size: int) -> tuple[str, ...] | None:
    """The mesh axes of a logical one if they divide ``size``, else None: replicated."""
    wanted = _AXES[logical]
    names = (wanted,) if isinstance(wanted, str) else wanted
    names = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None
