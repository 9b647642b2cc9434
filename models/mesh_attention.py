"""Attention over the devices of a mesh: called inside ``shard_map`` where XLA could not divide it.

XLA divides its own operations between devices, but it refuses to divide a Pallas kernel, and it
would gather the slots that the axis ``context`` splits. The mesh is the one in force where the
program is traced (``jax.set_mesh``), so that nothing has to hand it down to the layers.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from models.context_attention import context_attention
from models.sharding import dividing, mesh_in_force
from ops.attention import AttentionMask, BlockSizes, attention
from ops.platform import target_platform


def mesh_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    *,
    mask: AttentionMask,
    scale: float | None = None,
    implementation: str = "auto",
    blocks: BlockSizes | None = None,
) -> Float[Array, "b t h dv"]:
    """:func:`ops.attention.attention` under whatever mesh is in force.

    Rows go over the axes of ``batch``, heads over those of ``heads`` and slots over that of
    ``length`` in the default sharding rules. For rows and heads nothing is exchanged; for slots see
    :mod:`models.context_attention`. What the axes' sizes do not divide, every device computes.

    Raises:
        ValueError: see :func:`ops.attention.attention`.
    """
    call = functools.partial(attention, scale=scale, implementation=implementation, blocks=blocks)
    chosen = target_platform() if implementation == "auto" else implementation
    mesh = mesh_in_force()
    slots = None if mesh is None else dividing(mesh, "length", k.shape[1])
    if mesh is None or (chosen not in ("tpu", "interpret") and slots is None):
        return call(q, k, v, mask=mask)
    rows = dividing(mesh, "batch", q.shape[0])
    heads = dividing(mesh, "heads", math.gcd(q.shape[2], k.shape[2]))
    # The interpreter's own loops do not type what varies between devices.
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=chosen != "interpret")
    if slots is not None:
        return context_attention(call, q, k, v, mask, over, rows, heads, slots[0])
    placed = PartitionSpec(rows, None, heads)

    def of_mask(x: Array) -> PartitionSpec:
        # A field without rows of its own (a window, a broadcast batch) is the same everywhere.
        return PartitionSpec(rows) if x.ndim and x.shape[0] == q.shape[0] else PartitionSpec()

    return over(
        lambda q, k, v, mask: call(q, k, v, mask=mask),
        in_specs=(placed, placed, placed, jax.tree.map(of_mask, mask)),
        out_specs=placed,
    )(q, k, v, mask)
