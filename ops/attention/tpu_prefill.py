"""Pallas TPU kernel: attention of many queries (prefill, training forward, encoders).

Grid (row, head, query block, key block), the last one sequential with the running softmax in
VMEM. One kernel serves a family: logits may be changed by hooks computed from positions, and
queries may come in the three rotations of dual chunk attention. See the README of this folder for
the block layout and the costs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ops.attention import tpu_softmax as softmax
from ops.attention.hooks import LogitHook, apply_rules, pack_numbers
from ops.attention.intervals import Intervals, block_ranges, intervals
from ops.attention.mask import AttentionMask
from ops.attention.rotations import kernel_block, pick_rows, rotation_of

SIDE_ROWS = 8  # lo, hi, segment, position, chunk, padded to one tile of sublanes


def prefill_attention(
    q: Float[Array, "*rotations b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    hooks: tuple[LogitHook, ...] = (),
    *,
    stride: int | None = None,
    origin: Int[Array, ""] | None = None,
    block_q: int = 512,
    block_kv: int = 512,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Flash attention (Dao 2023, arXiv 2307.08691) with masks as intervals of positions.

    Blocks that no query of the block can see are neither fetched nor computed. `block_q` and
    `block_kv` are multiples of 128. With a `stride` q is [3, b, t, h, d], the rotations of dual
    chunk attention, and key blocks divide the stride; slot j holds position j or, where they are a
    share of a row's slots, `origin` + j, a multiple of s, as the mask's positions must say too. A
    tree mask is not supported here.

    Raises:
      ValueError: block sizes, a stride or a share off the 128 grid, or a mask with a tree.
    """
    block_kv = kernel_block(stride, block_kv, None if origin is None else k.shape[1])
    if block_q % 128:
        raise ValueError(f"TPU block sizes must be multiples of 128; got {block_q}")
    if mask.tree is not None:
        raise ValueError("the prefill kernel has no tree mask; use the decode kernel")
    q = q if stride is not None else q[None]
    (b, t, h, _), s, dv = q.shape[1:], k.shape[1], v.shape[3]
    block_q = min(block_q, softmax.round_up(t, 128))
    block_kv = min(block_kv, softmax.round_up(s, 128))
    nq, nk = pl.cdiv(t, block_q), pl.cdiv(s, block_kv)
    seen = intervals(mask, b, t, s, places=bool(hooks) or stride is not None)
    seen = seen.pad(nq * block_q, nk * block_kv)
    first, last = block_ranges(seen, block_q, block_kv)
    numbers = pack_numbers(hooks, h).ravel() if hooks else jnp.zeros(1, jnp.float32)
    scalars = (
        first.ravel(), last.ravel(), jnp.asarray(scale, jnp.float32).reshape(1), numbers,
        jnp.asarray(0 if origin is None else origin, jnp.int32).reshape(1),
    )  # fmt: skip
    tensors = (
        *_sides(seen, stride),
        q.transpose(0, 1, 3, 2, 4),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
    )
    operands, struct = softmax.over_mesh((*scalars, *tensors))

    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, blocks=(nq, nk), slots=s, segments=seen.q_segment is not None,
            rules=tuple(hook.rule for hook in hooks), stride=stride,
        ),
        out_shape=[
            struct((b, h, t, dv), q.dtype),
            struct((b, h, 1, t), jnp.float32),
        ],
        grid_spec=_grid(q, k, v, block_q, block_kv, tensors[1].shape[1]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, k, v, nq, triangular=mask.prefix_causal(t, s)),
        interpret=interpret,
        name="attention_prefill",
    )(*operands)  # fmt: skip
    return out.transpose(0, 2, 1, 3), lse[:, :, 0].transpose(0, 2, 1)


def _grid(
    q: Any, k: Any, v: Any, block_q: int, block_kv: int, k_rows: int
) -> pltpu.PrefetchScalarGridSpec:
    """Grid, blocks and scratch; operands in the order of `_kernel`."""
    (x, b, t, h, d), (s, g, dv) = q.shape, (*k.shape[1:3], v.shape[3])
    nq, nk = pl.cdiv(t, block_q), pl.cdiv(s, block_kv)

    def key_block(bi, qi, ki, first, last):
        start = first[bi * nq + qi]
        return jnp.clip(ki, start, jnp.maximum(start, last[bi * nq + qi]))

    def at_q(bi, hi, qi, ki, *_):
        return bi, hi, qi, 0

    def at_side(bi, hi, qi, ki, first, last, *_):
        return bi, 0, key_block(bi, qi, ki, first, last)

    def at_kv(bi, hi, qi, ki, first, last, *_):
        # lax.div: `//` lowers through `sign`, which asks for the attached chip
        return bi, jax.lax.div(hi, h // g), key_block(bi, qi, ki, first, last), 0

    scratch = [
        pltpu.VMEM((block_q, SIDE_ROWS), jnp.int32),
        pltpu.VMEM((block_q, softmax.LANES), jnp.float32),
        pltpu.VMEM((block_q, softmax.LANES), jnp.float32),
        pltpu.VMEM((block_q, dv), jnp.float32),
    ]
    if x > 1:
        scratch.append(pltpu.VMEM((block_q, d), q.dtype))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(b, h, nq, nk),
        in_specs=[
            pl.BlockSpec((1, SIDE_ROWS, block_q), lambda bi, hi, qi, ki, *_: (bi, 0, qi)),
            pl.BlockSpec((1, k_rows, block_kv), at_side),
            pl.BlockSpec((x, 1, 1, block_q, d), lambda bi, hi, qi, ki, *_: (0, bi, hi, qi, 0)),
            pl.BlockSpec((1, 1, block_kv, d), at_kv),
            pl.BlockSpec((1, 1, block_kv, dv), at_kv),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, block_q, dv), at_q),
            pl.BlockSpec((1, 1, 1, block_q), lambda bi, hi, qi, ki, *_: (bi, hi, 0, qi)),
        ],
        scratch_shapes=scratch,
    )


def _sides(seen: Intervals, stride: int | None) -> tuple[Any, Any]:
    """Query side [b, 8, t] (lo, hi, segment, position, chunk) and key side [b, 2 or 3, s].

    The key side is (position, segment) as the mask has them and, where asked for, the slot's place.
    """
    q_segment = jnp.zeros_like(seen.lo) if seen.q_segment is None else seen.q_segment
    k_segment = jnp.zeros_like(seen.position) if seen.k_segment is None else seen.k_segment
    q_side, k_side = [seen.lo, seen.hi, q_segment], [seen.position, k_segment]
    if seen.q_place is not None:
        q_side += [seen.q_place, seen.q_place if stride is None else seen.q_place // stride]
        k_side.append(seen.k_place)
    q_side = jnp.stack(q_side, axis=1)
    q_side = jnp.pad(q_side, ((0, 0), (0, SIDE_ROWS - q_side.shape[1]), (0, 0)))
    return q_side, jnp.stack(k_side, axis=1)


def _cost(q: Any, k: Any, v: Any, nq: int, triangular: bool) -> pl.CostEstimate:
    """Work and traffic: keys are fetched once per query block and head.

    Half if the mask is known to be triangular; other masks skip blocks too, but by data.
    """
    (x, b, t, h, d), (s, dv) = q.shape, (k.shape[1], v.shape[3])
    share = 2 if triangular else 1
    fetched = b * h * nq * s * (d * k.dtype.itemsize + dv * v.dtype.itemsize) // share
    own = b * h * t * ((x * d + dv) * q.dtype.itemsize + 4)
    return pl.CostEstimate(
        flops=2 * b * h * t * s * (d + dv) // share,
        bytes_accessed=fetched + own,
        transcendentals=b * h * t * s // share,
    )


def _kernel(
    first, last, scale, numbers, origin, q_side, k_side, q, k, v, out, lse, side, top, total,
    weighted, chosen=None, *, blocks, slots, segments, rules, stride,
):  # fmt: skip
    nq, nk = blocks
    head, ki = pl.program_id(1), pl.program_id(3)
    row = pl.program_id(0) * nq + pl.program_id(2)
    block = k.shape[2]

    @pl.when(ki == 0)
    def _():
        side[...] = q_side[0].T
        softmax.reset(top, total, weighted)

    wanted = (ki >= first[row]) & (ki <= last[row])
    if chosen is not None:
        # All keys of a block want the same rotation: it changes where a chunk begins.
        position = origin[0] + ki * block
        begins = jax.lax.rem(position, stride) == 0

        @pl.when(wanted & (begins | (ki == first[row])))
        def _():
            which = rotation_of(side[:, 4:5], jax.lax.div(position, stride))
            chosen[...] = pick_rows([q[i, 0, 0] for i in range(3)], which)

    def change(scores):
        count = sum(rule.count for rule in rules)
        places = side[:, 3:4], k_side[0, 2:3, :]
        return apply_rules(rules, scores, *places, lambda i: numbers[head * count + i])

    @pl.when(wanted)
    def _():
        position = k_side[0, 0:1, :]
        visible = (position >= side[:, 0:1]) & (position <= side[:, 1:2])
        if segments:
            visible &= k_side[0, 1:2, :] == side[:, 2:3]
        queries = q[0, 0, 0] if chosen is None else chosen[...]
        scores = softmax.scores_of(queries, k[0, 0], scale[0], visible, change if rules else None)
        values = softmax.values_of(v[0, 0], ki, slots)
        top[...], total[...], weighted[...] = softmax.accumulate(
            scores, values, top[...], total[...], weighted[...]
        )

    @pl.when(ki == nk - 1)
    def _():
        result, log_sum = softmax.finish(top[...], total[...], weighted[...])
        out[0, 0] = result.astype(out.dtype)
        lse[0, 0] = log_sum.T[0:1, :]
