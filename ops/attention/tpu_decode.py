"""Pallas TPU kernel: attention of a few queries against a long ragged cache (decode, verify).

Grid (row, key block), the last one sequential. All heads of a row are served by one step, so
that a step moves enough bytes to hide its overhead. Keys and values are read heads first,
[b, g, s, d], as the dense cache of `inference` stores them: its `read` and the turn in here cancel,
where any other order would copy the whole cache. Each row reads only the blocks up to its own
length. Hooks and rotations are as in the prefill kernel. See the README of this folder for the
block layout and the costs.
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
from ops.attention.intervals import LOWEST, UNSEEN, Intervals, block_ranges, intervals
from ops.attention.mask import AttentionMask
from ops.attention.rotations import kernel_block, pick_rows, rotation_of

SIDE_COLUMNS = 8  # lo, hi, segment, position, chunk

BLOCK_BYTES = 8 * 2**20
"""VMEM that a block of keys and values with its copies may take by default."""

VMEM_BYTES = 40 * 2**20
"""VMEM the kernel may use in all; the least of v5e, v5p and v6e has 64 MiB."""


def decode_block(rows: int, g: int, d: int, dv: int, itemsize: int) -> int:
    """Default slots per key block: the largest power of two in 128..2048 within BLOCK_BYTES.

    Keys and values are held four times (two buffers, two in flight), scores of one group too.
    """
    width = softmax.round_up(d, 128) + softmax.round_up(dv, 128)
    per_slot = 4 * max(g * width * itemsize, 4 * rows)
    fits = BLOCK_BYTES // per_slot
    return min(2048, max(128, 1 << max(fits, 1).bit_length() - 1))


def decode_attention(
    q: Float[Array, "*rotations b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    hooks: tuple[LogitHook, ...] = (),
    *,
    stride: int | None = None,
    origin: Int[Array, ""] | None = None,
    block_kv: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Attention of t queries (t small) over s slots, with an optional tree over scratch slots.

    Rows of the matrix products are the h/g * t queries of one group. `block_kv` is a multiple
    of 128. The tree mask is moved to its place among the slots by a one-hot product on the matrix
    unit, and only in the blocks that hold scratch slots. `stride` and `origin` as
    in the prefill kernel.

    Raises:
      ValueError: a block size, a stride or a share off the 128 grid.
    """
    q = q if stride is not None else q[None]
    (x, b, t, h, d), (s, g, dv) = q.shape, (*k.shape[1:3], v.shape[3])
    rows = softmax.round_up(h // g * t, 16)
    most = block_kv or decode_block(rows, g, d, dv, k.dtype.itemsize)
    block_kv = kernel_block(stride, most, None if origin is None else s)
    block_kv = min(block_kv, softmax.round_up(s, 128))
    nk = pl.cdiv(s, block_kv)
    seen = intervals(mask, b, t, s, places=bool(hooks) or stride is not None)
    seen = seen.pad(t, nk * block_kv)
    first, last, start, tree = _scratch(mask, seen, rows, block_kv)
    begins = jnp.asarray(0 if origin is None else origin, jnp.int32).reshape(1)
    scalars = (first, last, start, jnp.asarray(scale, jnp.float32).reshape(1), begins)
    q_rows = q.reshape(x, b, t, g, h // g, d).transpose(0, 1, 3, 4, 2, 5).reshape(x, b, g, -1, d)
    q_rows = jnp.pad(q_rows, ((0, 0), (0, 0), (0, 0), (0, rows - q_rows.shape[3]), (0, 0)))
    tensors = (
        *_sides(seen, h // g, rows, stride),
        _numbers(hooks, h, g, t, rows),
        tree,
        q_rows,
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
    )
    operands, struct = softmax.over_mesh((*scalars, *tensors))

    out, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            slots=s,
            segments=seen.q_segment is not None,
            nodes=0 if mask.tree is None else mask.tree.shape[2],
            rules=tuple(hook.rule for hook in hooks),
            stride=stride,
        ),
        out_shape=[
            struct((b, g, rows, dv), q.dtype),
            struct((b, g, rows, softmax.LANES), jnp.float32),
        ],
        grid_spec=_grid(tensors, block_kv),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(q, k, v),
        interpret=interpret,
        name="attention_decode",
    )(*operands)
    out = out[:, :, : h // g * t].reshape(b, g, h // g, t, dv).transpose(0, 3, 1, 2, 4)
    lse = lse[:, :, : h // g * t, 0].reshape(b, g, h // g, t).transpose(0, 3, 1, 2)
    return out.reshape(b, t, h, dv), lse.reshape(b, t, h)


def _grid(tensors: tuple[Any, ...], block_kv: int) -> pltpu.PrefetchScalarGridSpec:
    """Grid, blocks and scratch; `tensors` are the operands of `_kernel` from `q_side` on."""
    q_side, k_side, numbers, tree, q, _, v = (x.shape for x in tensors)
    (x, b, g, rows, d), (s, dv) = q, v[2:]

    def key_block(bi, ki, first, last):
        return jnp.clip(ki, first[bi], jnp.maximum(first[bi], last[bi]))

    def whole_row(*shape):
        return pl.BlockSpec((1, *shape), lambda bi, ki, *_: (bi,) + (0,) * len(shape))

    def at_side(bi, ki, first, last, *_):
        return bi, 0, key_block(bi, ki, first, last)

    def at_kv(bi, ki, first, last, *_):
        return bi, 0, key_block(bi, ki, first, last), 0

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(b, pl.cdiv(s, block_kv)),
        in_specs=[
            whole_row(*q_side[1:]),
            pl.BlockSpec((1, k_side[1], block_kv), at_side),
            pl.BlockSpec(numbers, lambda bi, ki, *_: (0, 0, 0)),
            whole_row(*tree[1:]),
            pl.BlockSpec((x, 1, g, rows, d), lambda bi, ki, *_: (0, bi, 0, 0, 0)),
            pl.BlockSpec((1, g, block_kv, d), at_kv),
            pl.BlockSpec((1, g, block_kv, dv), at_kv),
        ],
        out_specs=[whole_row(g, rows, dv), whole_row(g, rows, softmax.LANES)],
        scratch_shapes=[
            pltpu.VMEM((g, rows, softmax.LANES), jnp.float32),
            pltpu.VMEM((g, rows, softmax.LANES), jnp.float32),
            pltpu.VMEM((g, rows, dv), jnp.float32),
        ],
    )


def _scratch(mask: AttentionMask, seen: Intervals, rows: int, block: int) -> tuple[Any, ...]:
    """Block range of each row with its scratch slots, their start, and the tree per query row.

    The tree is bfloat16 [b, rows, nodes padded to 128]; without one it is a single zero tile.
    """
    b, t = seen.lo.shape
    first, last = (x[:, 0] for x in block_ranges(seen, t, block))
    if mask.tree is None:
        return first, last, jnp.zeros(b, jnp.int32), jnp.zeros((b, 16, 128), jnp.bfloat16)
    n = mask.tree.shape[2]
    start = jnp.broadcast_to(jnp.asarray(mask.tree_start, jnp.int32), (b,))
    final = seen.position.shape[1] // block - 1
    from_block = jnp.minimum(start // block, final)
    to_block = jnp.minimum((start + n - 1) // block, final)
    first = jnp.where(last >= first, jnp.minimum(first, from_block), from_block)
    last = jnp.maximum(last, to_block)
    tree = jnp.broadcast_to(mask.tree, (b, t, n)).astype(jnp.bfloat16)
    tree = jnp.tile(tree, (1, rows // t + 1, 1))[:, :rows]
    return first, last, start, jnp.pad(tree, ((0, 0), (0, 0), (0, -n % 128)))


def _sides(seen: Intervals, repeats: int, rows: int, stride: int | None) -> tuple[Any, Any]:
    """Query side [b, rows, 8] and key side [b, 2 or 3, s], as in the prefill kernel."""
    q_segment = jnp.zeros_like(seen.lo) if seen.q_segment is None else seen.q_segment
    k_segment = jnp.zeros_like(seen.position) if seen.k_segment is None else seen.k_segment
    q_side = [(seen.lo, UNSEEN), (seen.hi, LOWEST), (q_segment, 0)]
    k_side = [seen.position, k_segment]
    if seen.q_place is not None:
        chunk = seen.q_place if stride is None else seen.q_place // stride
        q_side += [(seen.q_place, 0), (chunk, 0)]
        k_side.append(seen.k_place)
    columns = []
    for x, fill in q_side:
        x = jnp.tile(x, (1, repeats))
        columns.append(jnp.pad(x, ((0, 0), (0, rows - x.shape[1])), constant_values=fill))
    side = jnp.stack(columns, axis=2)
    side = jnp.pad(side, ((0, 0), (0, 0), (0, SIDE_COLUMNS - side.shape[2])))
    return side, jnp.stack(k_side, axis=1)


def _numbers(hooks: tuple[LogitHook, ...], h: int, g: int, t: int, rows: int) -> Any:
    """The hooks' numbers of every query row, float32 [g, rows, n]; one zero tile without hooks."""
    if not hooks:
        return jnp.zeros((1, 8, 128), jnp.float32)
    numbers = jnp.repeat(pack_numbers(hooks, h).reshape(g, h // g, -1), t, axis=1)
    return jnp.pad(numbers, ((0, 0), (0, rows - numbers.shape[1]), (0, 0)))


def _cost(q: Any, k: Any, v: Any) -> pl.CostEstimate:
    """Work and traffic of full rows: an upper bound, since blocks past a row's end are skipped."""
    (x, b, t, h, d), (s, g, dv) = q.shape, (*k.shape[1:3], v.shape[3])
    return pl.CostEstimate(
        flops=2 * b * h * t * s * (d + dv),
        bytes_accessed=b * s * g * (d * k.dtype.itemsize + dv * v.dtype.itemsize)
        + b * t * h * ((x * d + dv) * q.dtype.itemsize + 4),
        transcendentals=b * h * t * s,
    )


def _kernel(
    first, last, start, scale, origin, q_side, k_side, numbers, tree, q, k, v, out, lse, top, total,
    weighted, *, slots, segments, nodes, rules, stride,
):  # fmt: skip
    bi, ki = pl.program_id(0), pl.program_id(1)
    groups, block = k.shape[1], k.shape[2]

    @pl.when(ki == 0)
    def _():
        softmax.reset(top, total, weighted)

    def admitted():
        position = k_side[0, 0:1, :]
        visible = (position >= q_side[0, :, 0:1]) & (position <= q_side[0, :, 1:2])
        if segments:
            visible &= k_side[0, 1:2, :] == q_side[0, :, 2:3]
        return visible

    def with_tree():
        shape = (tree.shape[2], block)
        node = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + start[bi]
        slot = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + ki * block
        place = jnp.where((node == slot) & (slot < slots), 1.0, 0.0).astype(jnp.bfloat16)
        moved = softmax.product(tree[0], place, 0)  # zeros and ones: exact
        return admitted() | (moved > 0.5)

    def queries(gi):
        if stride is None:
            return q[0, 0, gi]
        which = rotation_of(q_side[0, :, 4:5], jax.lax.div(origin[0] + ki * block, stride))
        return pick_rows([q[i, 0, gi] for i in range(3)], which)

    def change(gi, scores):
        places = q_side[0, :, 3:4], k_side[0, 2:3, :]
        return apply_rules(rules, scores, *places, lambda i: numbers[gi, :, i : i + 1])

    def step(visible):
        def one_group(gi, carry):
            hooked = functools.partial(change, gi) if rules else None
            scores = softmax.scores_of(queries(gi), k[0, gi], scale[0], visible, hooked)
            held = softmax.values_of(v[0, gi], ki, slots)
            top[gi], total[gi], weighted[gi] = softmax.accumulate(
                scores, held, top[gi], total[gi], weighted[gi]
            )
            return carry

        jax.lax.fori_loop(0, groups, one_group, 0, unroll=groups <= 8)

    wanted = (ki >= first[bi]) & (ki <= last[bi])
    if not nodes:
        pl.when(wanted)(lambda: step(admitted()))
    else:
        scratch = (ki * block < start[bi] + nodes) & ((ki + 1) * block > start[bi])
        pl.when(wanted & scratch)(lambda: step(with_tree()))
        pl.when(wanted & ~scratch)(lambda: step(admitted()))

    @pl.when(ki == pl.num_programs(1) - 1)
    def _():
        def one_group(gi, carry):
            result, log_sum = softmax.finish(top[gi], total[gi], weighted[gi])
            out[0, gi] = result.astype(out.dtype)
            lse[0, gi] = log_sum
            return carry

        jax.lax.fori_loop(0, groups, one_group, 0)
