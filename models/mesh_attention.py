"""Attention over the devices of a mesh: called inside ``shard_map`` where XLA could not divide it.

XLA divides its own operations between devices, but it refuses to divide a Pallas kernel, and it
would gather the slots that the axis ``context`` splits. The mesh is the one in force where the
program is traced (``jax.set_mesh``), so that nothing has to hand it down to the layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from models.context_attention import context_attention, row_specs, shares_attention
from models.sharding import dividing, mesh_in_force
from ops.attention import AttentionMask, BlockSizes, attention
from ops.dual_chunk import dual_chunk_attention, kernel_serves
from ops.platform import implementation_of


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
    """:func:`ops.attention.attention` under whatever mesh is in force, as :func:`over_mesh` says.

    Raises:
        ValueError: see :func:`ops.attention.attention`.
    """
    implementation = implementation_of(implementation)

    def call(q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
        return attention(
            q, k, v, mask=mask, scale=scale, implementation=implementation, blocks=blocks,
            return_lse=True,
        )  # fmt: skip

    return over_mesh(call, q, k, v, mask, implementation)[0]


def mesh_dual_chunk_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    *,
    stride: int,
    lengths: Int[Array, " b"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """:func:`ops.dual_chunk.dual_chunk_attention` under whatever mesh is in force.

    As :func:`over_mesh` says. Where slots are split, each device picks the rotations that its own
    want, which stand at ``first, first + 1, ...``.

    Raises:
        ValueError: see :func:`ops.dual_chunk.dual_chunk_attention`.
    """
    (b, s), axis = k.shape[:2], slots_axis(k)
    share = None if axis is None else s // jax.sharding.get_abstract_mesh().shape[axis]
    if implementation == "auto":
        implementation = "tpu" if kernel_serves(stride, share) else "xla"

    def call(q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
        return dual_chunk_attention(
            jnp.moveaxis(q, 3, 0), k, v, mask.q_positions, stride=stride, lengths=mask.lengths,
            implementation=implementation, first=None if share is None else mask.k_positions[0, 0],
        )  # fmt: skip

    mask = AttentionMask(
        q_positions=q_positions,
        lengths=jnp.full((b,), s, jnp.int32) if lengths is None else lengths,
        causal=True,
    )
    # Side by side, so that the three rotations of a query are split and travel as one.
    return over_mesh(call, jnp.moveaxis(q, 0, 3), k, v, mask, implementation)


def over_mesh(
    call: Callable[..., Any],
    q: Float[Array, "b t h *width"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: Any,
    implementation: str,
    by_head: tuple[Array, ...] = (),
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """``call(q, k, v, mask) -> (out, lse)``, on each device's part where XLA could not divide it.

    Rows go over the axes of ``batch``, heads over those of ``heads`` and slots over that of
    ``length`` in the default sharding rules. For rows and heads nothing is exchanged; for slots see
    :mod:`models.context_attention`. What the axes' sizes do not divide, every device computes.

    Args:
        mask: of :func:`ops.attention.attention`; with ``by_head`` any arrays with a row's first
            axis, or with an axis of 1 or none for all rows alike.
        implementation: what ``call`` runs, by its name in :mod:`ops`.
        by_head: arrays (h, ...), which ``call`` takes after the mask. Where slots are split, such a
            ``call`` sees to its share itself: see :func:`slots_axis`, and
            :func:`models.context_attention.shares_attention`.
    """
    mesh, slots = mesh_in_force(), slots_axis(k)
    if mesh is None or (implementation not in ("tpu", "interpret") and slots is None):
        return call(q, k, v, mask, *by_head)
    rows = dividing(mesh, "batch", q.shape[0])
    heads = dividing(mesh, "heads", math.gcd(q.shape[2], k.shape[2]))
    # The interpreter's loops do not type what varies between devices, nor do those over a plan.
    checked = implementation != "interpret" and not by_head
    over = functools.partial(jax.shard_map, mesh=mesh, check_vma=checked)
    if slots is not None:
        if by_head:
            return shares_attention(call, q, k, v, mask, by_head, over, rows, heads, slots)
        return context_attention(call, q, k, v, mask, over, rows, heads, slots)
    placed = PartitionSpec(rows, None, heads)
    return over(
        call,
        in_specs=(
            *(placed, placed, placed, row_specs(mask, q.shape[0], rows)),
            *[PartitionSpec(heads)] * len(by_head),
        ),
        out_specs=(placed, placed),
    )(q, k, v, mask, *by_head)


def slots_axis(k: Float[Array, "b s g d"]) -> str | None:
    """The mesh axis that splits these slots, by the mesh in force."""
    mesh = mesh_in_force()
    axes = None if mesh is None else dividing(mesh, "length", k.shape[1])
    return None if axes is None else axes[0]
