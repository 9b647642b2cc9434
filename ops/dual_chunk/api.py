"""The two entries to dual chunk attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.attention.mask import AttentionMask
from ops.dual_chunk.pairs import attend_pairs
from ops.dual_chunk.tpu import attend_kernel
from ops.dual_chunk.xla import attend_ordered
from ops.platform import target_platform


def dual_chunk_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    *,
    stride: int,
    lengths: Int[Array, " b"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str = "auto",
    first: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Causal dual chunk attention over slots in order: slot j holds position j.

    A query sees the slots up to its position and below its row's length. Sums are float32. A query
    that sees nothing gives zeros and lse -inf.

    Args:
      q: each query in its three rotations: intra, successive, inter.
      k: keys rotated at their position modulo the stride, and scaled if at all.
      q_positions: position of each query; rows may start anywhere.
      stride: c, static.
      lengths: slots that hold something, per row; default all.
      scale: multiplies the scores in float32; default d ** -0.5.
      implementation: "xla"; "tpu", the kernels; "interpret", the same on CPU; "reference", which
        computes all pairs; "auto" takes the kernels where :func:`kernel_serves` says so, but XLA
        where a mesh is in force, whose devices XLA cannot divide a kernel between
        (:mod:`models.mesh_attention` can).
      first: where a device has one of the equal shares of longer rows' slots: the position that
        its slot 0 holds, a multiple of s. `lengths` are then those of its share.

    Returns:
      The output in v's dtype and the log-sum-exp of the scaled scores, float32.

    Raises:
      ValueError: a stride below 1; in the kernels a stride or a share of the slots off the 128
        grid; heads that do not divide; an unknown implementation.
    """
    _check(q, k, stride)
    scaled_by = q.shape[-1] ** -0.5 if scale is None else scale
    b, s = k.shape[:2]
    lengths = jnp.full((b,), s, jnp.int32) if lengths is None else lengths
    if implementation == "auto":
        served = kernel_serves(stride, None if first is None else s) and not _divided()
        implementation = "tpu" if served else "xla"
    if implementation == "xla":
        return attend_ordered(q, k, v, q_positions, lengths, stride, scaled_by, first=first)
    if implementation in ("tpu", "interpret"):
        return attend_kernel(
            q, k, v, q_positions, lengths, stride, scaled_by,
            first=first, interpret=implementation == "interpret",
        )  # fmt: skip
    if implementation != "reference":
        raise ValueError(
            f"unknown dual chunk implementation {implementation!r}: name one of auto, xla, "
            "tpu, interpret, reference."
        )
    slots = jnp.arange(s, dtype=jnp.int32) + (0 if first is None else first)
    slots = jnp.broadcast_to(slots[None], (b, s))
    mask = AttentionMask(q_positions, slots, lengths=lengths, causal=True)
    return attend_pairs(
        q, k, v, q_positions // stride, slots // stride, mask, scaled_by, q.shape[2]
    )


def pairwise_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    k_positions: Int[Array, "b s"],
    mask: AttentionMask,
    *,
    stride: int,
    scale: float | Float[Array, ""] | None = None,
    rows: int = 128,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Dual chunk attention where slots hold any positions and `mask` alone says who sees whom.

    For packed documents, drafted trees, and gradients; about twice the work of
    :func:`dual_chunk_attention`. Arguments and results as there.

    Raises:
      ValueError: a stride below 1, heads that do not divide, or a mask that does not fit.
    """
    _check(q, k, stride)
    mask.validate(q.shape[1], q.shape[2], k.shape[1])
    scaled_by = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_pairs(
        q, k, v, q_positions // stride, k_positions // stride, mask, scaled_by, rows
    )


def kernel_serves(stride: int, share: int | None = None) -> bool:
    """Whether the program is for a TPU and its kernels take this stride: a multiple of 128.

    So must be a device's ``share`` of the slots, if they are split.
    """
    return target_platform() == "tpu" and stride % 128 == 0 and not (share or 0) % 128


def _divided() -> bool:
    """Whether a mesh is in force, and this is not the program of one device in ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and jax.sharding.AxisType.Manual not in mesh.axis_types


def _check(q: Array, k: Array, stride: int) -> None:
    if stride < 1:
        raise ValueError(f"the chunk stride is {stride}: make local_size less than chunk_size.")
    if q.shape[3] % k.shape[2]:
        raise ValueError(
            f"{q.shape[3]} query heads are not a multiple of {k.shape[2]} key heads: "
            "grouped-query attention needs h % g == 0."
        )
