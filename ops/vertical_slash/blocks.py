"""Selected columns and diagonals as ranges and columns per block of 64 queries.

A diagonal that the last of m queries meets at slot x passes through the last row of a block that
ends with row n at x - (m - n), so it covers the 64 slots up to there for the block's 64 rows.
Overlapping ranges are merged as the serving engine's index kernel does: from one selected diagonal
to the next that is not covered yet, a range is begun or made 64 slots longer, until one would begin
after the segment. So there are at most as many steps as 64 slots in a row, and finding the next
diagonal is one look into a table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ops.block_sparse import BLOCK, SparsePlan
from ops.vertical_slash.geometry import INTRA, Geometry
from ops.vertical_slash.select import Selection


def to_plan(selection: Selection, where: Geometry, queries: int) -> SparsePlan:
    """The plan of a selection for `queries` queries, of which a row may have fewer."""
    starts, stops, counts = _ranges(selection.diagonals, where, -(-queries // BLOCK))
    columns, column_counts = _columns(selection.columns, starts, stops, counts, where)
    return SparsePlan(starts, stops, counts, columns, column_counts)


def share_of(plan: SparsePlan, first: Int[Array, ""], size: int) -> SparsePlan:
    """What a plan of :func:`to_plan` lists of the slots ``first <= j < first + size``.

    Its lists are shorter: but for the last of each segment, ranges are 64 slots long.
    """
    end, longest = first + size, size // BLOCK + 5
    skipped = jnp.sum(plan.meant_ranges & (plan.stops <= first), axis=-1)
    counts = jnp.sum(plan.meant_ranges & (plan.starts < end), axis=-1) - skipped
    (starts, stops), held = _from(skipped, counts, longest, plan.starts, plan.stops)
    before = jnp.sum(plan.meant_columns & (plan.columns < first), axis=-1)
    column_counts = jnp.sum(plan.meant_columns & (plan.columns < end), axis=-1) - before
    (columns,), column_held = _from(before, column_counts, size, plan.columns)
    return SparsePlan(
        starts=jnp.where(held, jnp.maximum(starts, first), 0),
        stops=jnp.where(held, jnp.minimum(stops, end), 0),
        range_counts=counts.astype(jnp.int32),
        columns=jnp.where(column_held, columns, 0),
        column_counts=column_counts.astype(jnp.int32),
    )


def _from(
    skipped: Int[Array, "b h n"], counts: Int[Array, "b h n"], longest: int, *lists: Array
) -> tuple[list[Array], Bool[Array, "b h n X"]]:
    """Lists without their first entries, at most so long, and which entries are meant."""
    have = lists[0].shape[3]
    index = jnp.arange(min(longest, have), dtype=jnp.int32)[None, None, None]
    at = jnp.minimum(skipped[..., None] + index, have - 1)
    return [jnp.take_along_axis(x, at, axis=3) for x in lists], index < counts[..., None]


def _last_rows(where: Geometry, blocks: int) -> tuple[Bool[Array, "b n"], Int[Array, "b n"]]:
    """Whether a block has queries, and the position of its last one."""
    first_row = jnp.arange(blocks, dtype=jnp.int32)[None] * BLOCK
    last_row = jnp.minimum(first_row + BLOCK, where.counts[:, None]) - 1
    return first_row < where.counts[:, None], where.first[:, None] + last_row


def _ranges(
    diagonals: Bool[Array, "b h 3 s"], where: Geometry, blocks: int
) -> tuple[Int[Array, "b h n R"], Int[Array, "b h n R"], Int[Array, "b h n"]]:
    """Starts, stops and their number."""
    b, h, _, s = diagonals.shape
    most = s // BLOCK + 3
    none = s + BLOCK * (blocks + 2)  # no shift brings it back into the text
    slots = jnp.arange(s, dtype=jnp.int32)[None, None, None]
    following = jnp.where(diagonals, slots, none)
    following = jnp.pad(following, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=none)
    following = jax.lax.cummin(following, axis=3, reverse=True).reshape(b, h, 3 * (s + 1))
    bases = jnp.concatenate([where.bases, where.ends[-1:]])  # one for lanes that are done
    end_row = (jnp.arange(blocks, dtype=jnp.int32)[None] + 1) * BLOCK
    shift = 1 + (end_row - where.counts[:, None])[:, None]  # (b, 1, n): from diagonal to range end
    filled, last = _last_rows(where, blocks)
    rows = [jnp.arange(n, dtype=jnp.int32) for n in (b, h, blocks)]
    lanes = jnp.ix_(*rows)

    def step(carry):
        segment, reached, starts, stops, count = carry
        row, safe = lanes[0], jnp.minimum(segment, INTRA)
        base, end = where.bases[safe, row], where.ends[safe, row]
        at = jnp.clip(reached - (shift - 1), 0, s)
        found = jnp.take_along_axis(following, safe * (s + 1) + at, axis=2)
        wanted = jnp.maximum(found + shift, base + BLOCK)
        begin = jnp.maximum(wanted - BLOCK, reached)
        real = (found < none) & (begin < end) & (begin <= last[:, None]) & (segment <= INTRA)
        place = (*lanes, jnp.where(real, count, most))
        hints = dict(mode="drop", indices_are_sorted=True, unique_indices=True)
        starts = starts.at[place].set(begin, **hints)
        stops = stops.at[place].set(jnp.minimum(begin + BLOCK, end), **hints)
        segment = jnp.where(real, segment, jnp.minimum(segment + 1, INTRA + 1))
        reached = jnp.where(real, begin + BLOCK, bases[segment, row])
        return segment, reached, starts, stops, count + real

    lists = jnp.zeros((b, h, blocks, most), jnp.int32)
    segment = jnp.broadcast_to(jnp.where(filled, 0, INTRA + 1)[:, None], (b, h, blocks))
    reached = jnp.broadcast_to(where.bases[0][:, None, None], (b, h, blocks))
    carry = (segment, reached, lists, lists, jnp.zeros((b, h, blocks), jnp.int32))
    *_, starts, stops, count = jax.lax.while_loop(lambda c: jnp.any(c[0] <= INTRA), step, carry)
    return starts, stops, count


def _columns(
    columns: Int[Array, "b h V"],
    starts: Int[Array, "b h n R"],
    stops: Int[Array, "b h n R"],
    counts: Int[Array, "b h n"],
    where: Geometry,
) -> tuple[Int[Array, "b h n V"], Int[Array, "b h n"]]:
    """Columns outside the ranges of their block that one of its queries can see."""
    n, most = starts.shape[2:]
    big = jnp.iinfo(jnp.int32).max
    meant = jnp.arange(most, dtype=jnp.int32)[None, None, None] < counts[..., None]
    begun = jnp.where(meant, starts, big)
    search = jax.vmap(jax.vmap(jax.vmap(_last_begun, (0, None)), (0, 0)), (0, 0))
    index = search(begun, columns)  # (b, h, n, V)
    inside = columns[:, :, None] < jnp.take_along_axis(stops, jnp.maximum(index, 0), axis=3)
    filled, last = _last_rows(where, n)
    kept = (columns[:, :, None] <= last[:, None, :, None]) & filled[:, None, :, None]
    kept &= ~((index >= 0) & inside)
    listed = jnp.sort(jnp.where(kept, columns[:, :, None], big), axis=-1)
    return jnp.where(listed < big, listed, 0), kept.sum(axis=-1, dtype=jnp.int32)


def _last_begun(starts: Int[Array, " r"], slots: Int[Array, " v"]) -> Int[Array, " v"]:
    """The index of the last start at or before each slot, -1 if there is none."""
    return jnp.searchsorted(starts, slots, side="right").astype(jnp.int32) - 1
