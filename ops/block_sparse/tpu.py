"""Pallas TPU kernel: attention over listed ranges and columns of a long cache.

Grid (row, head, block of 64 queries). Keys stay in HBM. A step copies eight ranges at a time into
one of two tiles of VMEM while it attends to the other, then the columns, which XLA gathers
beforehand. See the README of this folder for the tiles, the traffic and the choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ops.attention import tpu_softmax as softmax
from ops.attention.intervals import LOWEST, UNSEEN
from ops.attention.rotations import pick_rows, rotation_of
from ops.block_sparse.plan import BLOCK, SparsePlan

ALIGNED = 16
"""Slots of a copy begin and end at multiples of this: the rows of one tile of 16-bit numbers."""

FETCHED = BLOCK + ALIGNED
"""Slots copied for a range, wherever it begins: the aligned superset, whose rest is masked."""

RANGES = 8
"""Ranges per tile: together a multiple of 128 slots."""

TILE = RANGES * FETCHED
COLUMNS = 512
"""Columns per tile, or fewer if the plan has fewer."""

GATHERED_BYTES = 256 * 2**20
"""Most bytes of gathered columns at a time; a longer run of queries is cut into launches."""


def attend_plan(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    plan: SparsePlan,
    stride: int,
    scale: float | Float[Array, ""],
    first: Int[Array, ""] | None = None,
    *,
    gathered_bytes: int = GATHERED_BYTES,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Causal attention of each block of 64 queries over its ranges and columns.

    Slot j holds position `first` + j, by default j, and a key meets the rotation of a query that
    dual chunk attention gives it: see `ops.dual_chunk` for q, k and stride. Sums are float32; a
    query that sees nothing gives zeros and lse -inf. Values must be finite in the 80 slots around
    a range; keys that no list shows may hold anything.

    Returns:
      The output in v's dtype and the log-sum-exp of the scaled scores, float32.

    Raises:
      ValueError: a plan that does not fit; and in the gradient, which this kernel does not have.
    """
    plan.validate(q.shape[1], q.shape[2], q.shape[3])
    scale = jnp.asarray(scale, jnp.float32)
    origin = jnp.int32(0) if first is None else first
    result: Any = _attend(
        stride, gathered_bytes, interpret, q, k, v, q_positions, plan, scale, origin
    )
    return result


def launches_of(b: int, h: int, n: int, columns: int, each: int, most: int) -> int:
    """Calls of the kernel for n blocks: each gathers at most `most` bytes, `each` of a column."""
    return pl.cdiv(n, max(1, most // (b * h * _padded(columns) * each)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(stride, gathered_bytes, interpret, q, k, v, q_positions, plan, scale, origin):
    _, b, t, h, d = q.shape
    n = plan.starts.shape[2]
    k, v = (_whole_copies(jnp.swapaxes(x, 1, 2)) for x in (k, v))
    each = d * k.dtype.itemsize + v.shape[3] * v.dtype.itemsize
    launches = launches_of(b, h, n, plan.columns.shape[3], each, gathered_bytes)
    span = pl.cdiv(n, launches)
    short = launches * span - n

    def cut(x, axis, i, size):
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

    def pad(x, axis, size, mode="constant"):
        return jnp.pad(x, [(0, size if i == axis else 0) for i in range(x.ndim)], mode=mode)

    rows = (n + short) * BLOCK - t
    q = pad(q, 2, rows)
    chunks = pad(q_positions // stride, 1, rows, "edge")
    q_positions = jnp.pad(q_positions, ((0, 0), (0, rows)), constant_values=-1)
    plan = jax.tree.map(lambda x: pad(x, 2, short), plan)

    def launch(i):
        queries = cut(q, 2, i, span * BLOCK).transpose(0, 1, 3, 2, 4)
        at, chunk = (cut(x, 1, i, span * BLOCK) for x in (q_positions, chunks))
        part = jax.tree.map(lambda x: cut(x, 2, i, span), plan)
        return _launch(queries, k, v, at, chunk, part, scale, origin, stride, interpret)

    if launches == 1:
        out, lse = launch(0)
    else:
        out, lse = jax.lax.map(launch, jnp.arange(launches, dtype=jnp.int32))
        out = jnp.moveaxis(out, 0, 2).reshape(b, h, -1, v.shape[3])
        lse = jnp.moveaxis(lse, 0, 2).reshape(b, h, -1)
    return out[:, :, :t].transpose(0, 2, 1, 3), lse[:, :, :t].transpose(0, 2, 1)


def _forward(*_: Any):
    raise ValueError(
        "the block-sparse kernel has no gradient: differentiate implementation='xla' or dense "
        "dual chunk attention"
    )


_attend.defvjp(_forward, _forward)


def _padded(columns: int) -> int:
    """Columns of a list after padding to whole tiles."""
    tile = min(COLUMNS, softmax.round_up(max(columns, 1), 128))
    return softmax.round_up(max(columns, 1), tile)


def _whole_copies(x: Any) -> Any:
    """Slots [b, g, s, d] padded, if need be, so that an aligned copy never passes the end."""
    s = x.shape[2]
    size = max(softmax.round_up(s, ALIGNED), FETCHED)
    return x if size == s else jnp.pad(x, ((0, 0), (0, 0), (0, size - s), (0, 0)))


def _gather(x: Any, columns: Any) -> Any:
    """x [b, g, s, d] at columns [b, h, n, c]: [b, h, n, c, d]."""
    b, h, n, c = columns.shape
    index = columns.reshape(b, x.shape[1], -1)
    rows = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds")))(x, index)
    return rows.reshape(b, h, n, c, x.shape[3])


def _launch(q, k, v, positions, chunks, plan, scale, origin, stride, interpret):
    """One call of the kernel; q is [3, b, h, n * 64, d], k and v are heads first."""
    _, b, h, t, _ = q.shape
    n, dv = t // BLOCK, v.shape[3]
    width = _padded(plan.columns.shape[3])
    tile = min(COLUMNS, width)
    columns = jnp.pad(plan.columns, ((0, 0),) * 3 + ((0, width - plan.columns.shape[3]),))
    held = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 3) < plan.column_counts[..., None]
    slots = jnp.where(held, columns, UNSEEN).reshape(b, h, n, width // tile, 1, tile)
    nearest = jnp.broadcast_to(chunks.reshape(b, 1, n, BLOCK).min(axis=3), (b, h, n))
    origins = jnp.broadcast_to(origin, (b, h, n))
    counts = jnp.stack([plan.range_counts, plan.column_counts, nearest, origins], axis=3)
    held_at = jnp.where(held, columns - origin, 0)
    lists = [counts, *(_at_least_one(x) for x in (plan.starts, plan.stops)), columns]
    side = jnp.stack([positions, chunks], axis=2).reshape(b, n, BLOCK, 2)
    tensors = (
        *(x.reshape(b, h, n, 1, -1) for x in lists),
        slots, side, q, k, v, _gather(k, held_at), _gather(v, held_at),
    )  # fmt: skip
    operands, struct = softmax.over_mesh((scale.reshape(1), *tensors))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, stride=stride, repeats=h // k.shape[1]),
        out_shape=[struct((b, h, t, dv), v.dtype), struct((b, h, n, 1, BLOCK), jnp.float32)],
        grid_spec=_grid(tensors, tile),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel")
        ),
        cost_estimate=_cost(q, k, v, plan.starts.shape[3], width),
        interpret=interpret,
        name="attention_block_sparse",
    )(*operands)
    return out, lse.reshape(b, h, t)


def _at_least_one(x: Any) -> Any:
    return x if x.shape[3] else jnp.zeros((*x.shape[:3], 1), x.dtype)


def _grid(tensors: tuple[Any, ...], tile: int) -> pltpu.PrefetchScalarGridSpec:
    """Grid, blocks and scratch; `tensors` are the operands of `_kernel` from `counts` on."""
    *lists, slots, _, q, k, v, _, _ = tensors
    (_, b, h, t, d), dv = q.shape, v.shape[3]

    def at(bi, hi, ni, *_):
        return bi, hi, ni, 0, 0

    def in_scalars(x):
        return pl.BlockSpec((1, 1, 1, *x.shape[3:]), at, memory_space=pltpu.SMEM)

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(b, h, t // BLOCK),
        in_specs=[
            *(in_scalars(x) for x in lists),
            pl.BlockSpec((1, 1, 1, *slots.shape[3:]), lambda *i: (*i[:3], 0, 0, 0)),
            pl.BlockSpec((1, 1, BLOCK, 2), lambda bi, hi, ni, *_: (bi, ni, 0, 0)),
            pl.BlockSpec((3, 1, 1, BLOCK, d), lambda bi, hi, ni, *_: (0, bi, hi, ni, 0)),
            in_place, in_place, in_place, in_place,
        ],
        out_specs=[
            pl.BlockSpec((1, 1, BLOCK, dv), lambda bi, hi, ni, *_: (bi, hi, ni, 0)),
            pl.BlockSpec((1, 1, 1, 1, BLOCK), at),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, TILE, d), k.dtype),
            pltpu.VMEM((2, TILE, dv), v.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.VMEM((BLOCK, softmax.LANES), jnp.float32),
            pltpu.VMEM((BLOCK, softmax.LANES), jnp.float32),
            pltpu.VMEM((BLOCK, dv), jnp.float32),
        ],
    )  # fmt: skip


def _cost(q: Any, k: Any, v: Any, ranges: int, columns: int) -> pl.CostEstimate:
    """Work and traffic of full lists, an upper bound: their counts are data."""
    (_, b, h, t, d), dv = q.shape, v.shape[3]
    keys = ranges * FETCHED + columns
    blocks = b * h * t // BLOCK
    return pl.CostEstimate(
        flops=2 * b * h * t * keys * (d + dv),
        bytes_accessed=blocks * keys * (d * k.dtype.itemsize + dv * v.dtype.itemsize)
        + blocks * 4 * (2 * ranges + 2 * columns)
        + b * h * t * (3 * d * q.dtype.itemsize + dv * v.dtype.itemsize + 4),
        transcendentals=b * h * t * keys,
    )


def _copies(hbm: Any, tiles: Any, sems: Any, buffer: Any, source: Any, target: Any) -> list[Any]:
    """Copies of keys and values from `source` slots in HBM to `target` rows of a tile."""
    return [
        pltpu.make_async_copy(x.at[source], tile.at[buffer, target], sems.at[buffer])
        for x, tile in zip(hbm, tiles, strict=True)
    ]


def _pipeline(count: Any, each: Callable[..., None], attend: Callable[..., None]) -> None:
    """attend(i, buffer) for every tile, while the next one is copied into the other buffer."""

    def start(i):
        each(i, jax.lax.rem(i, 2), lambda copy: copy.start())

    pl.when(count > 0)(lambda: start(0))

    def step(i, carry):
        buffer = jax.lax.rem(i, 2)
        pl.when(i + 1 < count)(lambda: start(i + 1))
        each(i, buffer, lambda copy: copy.wait())
        attend(i, buffer)
        return carry

    jax.lax.fori_loop(0, count, step, 0)


def _kernel(
    scale, counts, starts, stops, columns, slots, side, q, k, v, k_columns, v_columns, out, lse,
    k_tiles, v_tiles, sems, top, total, weighted, *, stride, repeats,
):  # fmt: skip
    bi, hi, ni = (pl.program_id(i) for i in range(3))
    range_count, column_count, nearest, origin = (counts[0, 0, 0, 0, i] for i in range(4))
    head, tile = jax.lax.div(hi, repeats), slots.shape[5]
    tiles, end = (k_tiles, v_tiles), k.shape[2] - FETCHED
    softmax.reset(top, total, weighted)
    v_tiles[...] = jnp.zeros_like(v_tiles)  # rows that no copy fills weigh nothing, but not as NaN

    def base_of(i):
        # A multiple of 16; the last copy ends with the buffer.
        first = (starts[0, 0, 0, 0, i] - origin) & np.int32(-ALIGNED)
        return pl.multiple_of(jnp.minimum(first, end), ALIGNED)

    def each_range(i, buffer, do):
        def one(j, carry):
            source = (bi, head, pl.ds(base_of(i * RANGES + j), FETCHED))
            target = pl.ds(pl.multiple_of(j * FETCHED, ALIGNED), FETCHED)
            for copy in _copies((k, v), tiles, sems, buffer, source, target):
                do(copy)
            return carry

        jax.lax.fori_loop(0, jnp.minimum(RANGES, range_count - i * RANGES), one, 0)

    def each_column_tile(i, buffer, do):
        source = (bi, hi, ni, pl.ds(pl.multiple_of(i * tile, 128), tile))
        for copy in _copies((k_columns, v_columns), tiles, sems, buffer, source, pl.ds(0, tile)):
            do(copy)

    def attend(shown, first, last, keys, values):
        """Keys of slots `shown` [1, width], in the chunks of slots first to last."""

        def one(chunk, carry):
            # All chunks at least two before the queries' want the same rotation: one pass for them.
            low = jnp.where(chunk <= nearest - 2, LOWEST, chunk * stride)
            here = (shown >= low) & (shown < (chunk + 1) * stride)
            visible = jnp.where(here, shown, UNSEEN) <= side[0, 0, :, 0:1]
            queries = pick_rows(
                [q[x, 0, 0] for x in range(3)], rotation_of(side[0, 0, :, 1:2], chunk)
            )
            scores = softmax.scores_of(queries, keys, scale[0], visible)
            top[...], total[...], weighted[...] = softmax.accumulate(
                scores, values, top[...], total[...], weighted[...]
            )
            return carry

        first, last = (jnp.maximum(jax.lax.div(x, stride), nearest - 2) for x in (first, last))
        jax.lax.fori_loop(first, last + 1, one, 0)

    def attend_ranges(i, buffer):
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, TILE), 1)
        slot = begin = stop = jnp.zeros_like(lane)
        last = range_count - 1
        for j in range(RANGES):
            at = i * RANGES + j
            mine, index = lane >= j * FETCHED, jnp.minimum(at, last)
            slot = jnp.where(mine, lane + (origin + base_of(index) - j * FETCHED), slot)
            begin = jnp.where(mine, starts[0, 0, 0, 0, index], begin)
            stop = jnp.where(mine, jnp.where(at <= last, stops[0, 0, 0, 0, index], 0), stop)
        shown = jnp.where((slot >= begin) & (slot < stop), slot, UNSEEN)
        final = jnp.minimum(i * RANGES + RANGES - 1, last)
        bounds = starts[0, 0, 0, 0, i * RANGES], starts[0, 0, 0, 0, final]
        attend(shown, *bounds, k_tiles[buffer], v_tiles[buffer])

    def attend_columns(i, buffer):
        final = jnp.minimum((i + 1) * tile, column_count) - 1
        bounds = columns[0, 0, 0, 0, i * tile], columns[0, 0, 0, 0, final]
        rows = pl.ds(0, tile)
        attend(slots[0, 0, 0, i], *bounds, k_tiles[buffer, rows], v_tiles[buffer, rows])

    _pipeline(pl.cdiv(range_count, RANGES), each_range, attend_ranges)
    _pipeline(pl.cdiv(column_count, tile), each_column_tile, attend_columns)
    result, log_sum = softmax.finish(top[...], total[...], weighted[...])
    out[0, 0] = result.astype(out.dtype)
    lse[0, 0, 0] = log_sum.T[0:1, :]
