"""Pallas TPU kernel: attention of many queries (prefill, training forward, encoders).

Grid (row, head, query block, key block), the last one sequential with the running softmax in
VMEM. See the README of this folder for the block layout and the costs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ops.attention import tpu_softmax as softmax
from ops.attention.intervals import Intervals, block_ranges, intervals
from ops.attention.mask import AttentionMask

SIDE_ROWS = 8  # lo, hi, segment, padded to one tile of sublanes


def prefill_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    *,
    block_q: int = 512,
    block_kv: int = 512,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Flash attention (Dao 2023, arXiv 2307.08691) with masks as intervals of positions.

    Blocks that no query of the block can see are neither fetched nor computed. `block_q` and
    `block_kv` are multiples of 128. A tree mask is not supported here.

    Raises:
      ValueError: block sizes off the 128 grid, or a mask with a tree.
    """
    if block_q % 128 or block_kv % 128:
        raise ValueError(f"TPU block sizes must be multiples of 128; got {block_q}, {block_kv}")
    if mask.tree is not None:
        raise ValueError("the prefill kernel has no tree mask; use the decode kernel")
    (b, t, h, _), s, dv = q.shape, k.shape[1], v.shape[3]
    block_q = min(block_q, softmax.round_up(t, 128))
    block_kv = min(block_kv, softmax.round_up(s, 128))
    nq, nk = pl.cdiv(t, block_q), pl.cdiv(s, block_kv)
    seen = intervals(mask, b, t, s).pad(nq * block_q, nk * block_kv)
    first, last = block_ranges(seen, block_q, block_kv)
    scalars = (first.ravel(), last.ravel(), jnp.asarray(scale, jnp.float32).reshape(1))
    tensors = (
        *_sides(seen),
        q.transpose(0, 2, 1, 3),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
    )
    operands, struct = softmax.over_mesh((*scalars, *tensors))

    out, lse = pl.pallas_call(
        functools.partial(_kernel, blocks=(nq, nk), slots=s, segments=seen.q_segment is not None),
        out_shape=[
            struct((b, h, t, dv), q.dtype),
            struct((b, h, 1, t), jnp.float32),
        ],
        grid_spec=_grid(q, k, v, block_q, block_kv),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, k, v, nq, triangular=mask.prefix_causal(t, s)),
        interpret=interpret,
        name="attention_prefill",
    )(*operands)
    return out.transpose(0, 2, 1, 3), lse[:, :, 0].transpose(0, 2, 1)


def _grid(q: Any, k: Any, v: Any, block_q: int, block_kv: int) -> pltpu.PrefetchScalarGridSpec:
    """Grid, blocks and scratch; operands in the order of `_kernel`."""
    (b, t, h, d), (s, g, dv) = q.shape, (*k.shape[1:3], v.shape[3])
    nq, nk = pl.cdiv(t, block_q), pl.cdiv(s, block_kv)

    def key_block(bi, qi, ki, first, last):
        start = first[bi * nq + qi]
        return jnp.clip(ki, start, jnp.maximum(start, last[bi * nq + qi]))

    def at_q(bi, hi, qi, ki, *_):
        return bi, hi, qi, 0

    def at_side(bi, hi, qi, ki, first, last, _):
        return bi, 0, key_block(bi, qi, ki, first, last)

    def at_kv(bi, hi, qi, ki, first, last, _):
        # lax.div: `//` lowers through `sign`, which asks for the attached chip
        return bi, jax.lax.div(hi, h // g), key_block(bi, qi, ki, first, last), 0

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(b, h, nq, nk),
        in_specs=[
            pl.BlockSpec((1, SIDE_ROWS, block_q), lambda bi, hi, qi, ki, *_: (bi, 0, qi)),
            pl.BlockSpec((1, 2, block_kv), at_side),
            pl.BlockSpec((1, 1, block_q, d), at_q),
            pl.BlockSpec((1, 1, block_kv, d), at_kv),
            pl.BlockSpec((1, 1, block_kv, dv), at_kv),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, block_q, dv), at_q),
            pl.BlockSpec((1, 1, 1, block_q), lambda bi, hi, qi, ki, *_: (bi, hi, 0, qi)),
        ],
        scratch_shapes=[
            pltpu.VMEM((block_q, SIDE_ROWS), jnp.int32),
            pltpu.VMEM((block_q, softmax.LANES), jnp.float32),
            pltpu.VMEM((block_q, softmax.LANES), jnp.float32),
            pltpu.VMEM((block_q, dv), jnp.float32),
        ],
    )


def _sides(seen: Intervals) -> tuple[Any, Any]:
    """Query side [b, 8, t] (lo, hi, segment) and key side [b, 2, s] (position, segment)."""
    q_segment = jnp.zeros_like(seen.lo) if seen.q_segment is None else seen.q_segment
    k_segment = jnp.zeros_like(seen.position) if seen.k_segment is None else seen.k_segment
    q_side = jnp.stack([seen.lo, seen.hi, q_segment], axis=1)
    q_side = jnp.pad(q_side, ((0, 0), (0, SIDE_ROWS - 3), (0, 0)))
    return q_side, jnp.stack([seen.position, k_segment], axis=1)


def _cost(q: Any, k: Any, v: Any, nq: int, triangular: bool) -> pl.CostEstimate:
    """Work and traffic: keys are fetched once per query block and head.

    Half if the mask is known to be triangular; other masks skip blocks too, but by data.
    """
    (b, t, h, d), (s, dv) = q.shape, (k.shape[1], v.shape[3])
    share = 2 if triangular else 1
    fetched = b * h * nq * s * (d * k.dtype.itemsize + dv * v.dtype.itemsize) // share
    own = b * h * t * ((d + dv) * q.dtype.itemsize + 4)
    return pl.CostEstimate(
        flops=2 * b * h * t * s * (d + dv) // share,
        bytes_accessed=fetched + own,
        transcendentals=b * h * t * s // share,
    )


def _kernel(
    first, last, scale, q_side, k_side, q, k, v, out, lse, side, top, total, weighted,
    *, blocks, slots, segments,
):  # fmt: skip
    nq, nk = blocks
    row, ki = pl.program_id(0) * nq + pl.program_id(2), pl.program_id(3)

    @pl.when(ki == 0)
    def _():
        side[...] = q_side[0].T
        softmax.reset(top, total, weighted)

    @pl.when((ki >= first[row]) & (ki <= last[row]))
    def _():
        position = k_side[0, 0:1, :]
        visible = (position >= side[:, 0:1]) & (position <= side[:, 1:2])
        if segments:
            visible &= k_side[0, 1:2, :] == side[:, 2:3]
        scores = softmax.scores_of(q[0, 0], k[0, 0], scale[0], visible)
        values = softmax.values_of(v[0, 0], ki, slots)
        top[...], total[...], weighted[...] = softmax.accumulate(
            scores, values, top[...], total[...], weighted[...]
        )

    @pl.when(ki == nk - 1)
    def _():
        result, log_sum = softmax.finish(top[...], total[...], weighted[...])
        out[0, 0] = result.astype(out.dtype)
        lse[0, 0] = log_sum.T[0:1, :]
