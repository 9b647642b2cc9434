"""The columns and diagonals that a run of queries attends to, before they are cut into ranges."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.vertical_slash.geometry import Geometry

SINK = 30
"""First columns that are always kept, if the budget has room for them."""

LOCAL = 100
"""Nearest diagonals that are always kept, if the budget has room for them."""

SPREAD = 5
"""What stands in for an empty list of a segment: so many, evenly spaced."""

CERTAIN = 1e6
"""Above any sum of attention over the last queries; what is kept always is ordered by it."""


@flax.struct.dataclass
class Selection:
    """What a run of queries attends to, by slots of its row; see `Geometry` for diagonals."""

    columns: Any  # (b, h, V) int32, ascending; entries of s or more are none
    diagonals: Any  # (b, h, 3, s) bool, for each segment


def raised(vertical: Int[Array, "*heads"]) -> Int[Array, "*heads"]:
    """Budgets of columns as they are meant: 30, which would be the sink alone, means 130."""
    return jnp.where(vertical == SINK, SINK + 100, vertical)


def keep_columns(
    mass: Float[Array, "b h s"], budget: Int[Array, "#b h"], end: Int[Array, " b"], most: int
) -> Int[Array, "b h V"]:
    """The `budget` columns with the largest mass before `end`, ascending, the first 30 among them.

    V is the smaller of `most` and s; places beyond the budget or the text hold s.
    """
    b, h, s = mass.shape
    slots = jnp.arange(s, dtype=jnp.int32)[None, None]
    mass = jnp.where(slots < SINK, CERTAIN - slots, mass)
    upto = jnp.cumsum(_largest(mass, budget, end, most), axis=-1, dtype=jnp.int32)
    rank = jnp.arange(1, min(most, s) + 1, dtype=jnp.int32)
    find = jax.vmap(lambda lane: jnp.searchsorted(lane, rank).astype(jnp.int32))
    return find(upto.reshape(b * h, s)).reshape(b, h, -1)


def keep_diagonals(
    mass: Float[Array, "b h s"], budget: Int[Array, "#b h"], end: Int[Array, " b"], most: int
) -> Bool[Array, "b h s"]:
    """The `budget` diagonals with the largest mass before `end`, the 100 nearest among them."""
    s = mass.shape[-1]
    distance = end[:, None, None] - 1 - jnp.arange(s, dtype=jnp.int32)[None, None]
    mass = jnp.where((distance >= 0) & (distance < LOCAL), CERTAIN - distance, mass)
    return _largest(mass, budget, end, most)


def marks(slots: Int[Array, "*lists n"], s: int) -> Bool[Array, "*lists {s}"]:
    """Lists of slots as booleans over s slots; entries of s or more are none."""
    flat = slots.reshape(-1, slots.shape[-1])
    rows = jnp.arange(flat.shape[0], dtype=jnp.int32)[:, None]
    marked = jnp.zeros((flat.shape[0], s), bool).at[rows, flat].set(True, mode="drop")
    return marked.reshape(*slots.shape[:-1], s)


def by_segment(
    columns: Int[Array, "b h V"],
    diagonals: Bool[Array, "b h s"],
    where: Geometry,
    every: Bool[Array, " b"] | None = None,
) -> Selection:
    """Columns and diagonals given to the segments they concern.

    A column belongs to the segment it lies in, a diagonal to all that it passes through. Where a
    segment gets no columns, five evenly spaced ones stand in for them, and the same for diagonals
    (by distance in the segment's own frame), as the serving engine's kernels need some work.

    Args:
      every: rows that attend to everything, whatever was selected.
    """
    b, h, s = diagonals.shape
    marked = diagonals[:, :, None] & jnp.moveaxis(where.diagonals(s), 0, 1)[:, None]
    length = where.ends - where.bases  # (3, b)
    steps, length = jnp.arange(SPREAD, dtype=jnp.int32)[None, None], length[..., None]
    spread = steps * (length // SPREAD) + steps * (length % SPREAD) // SPREAD
    spread = jnp.where(length > 0, spread, s)
    straight = jnp.where(spread < s, where.straight[..., None] - spread, s)
    empty = ~marked.any(axis=-1, keepdims=True)
    marked |= empty & marks(jnp.moveaxis(straight, 0, 1), s)[:, None]
    if every is not None:
        marked |= every[:, None, None, None] & jnp.moveaxis(where.diagonals(s), 0, 1)[:, None]
    bases, ends = where.bases[..., None, None], where.ends[..., None, None]
    missing = ~((columns[None] >= bases) & (columns[None] < ends)).any(axis=-1)  # (3, b, h)
    extra = jnp.where(spread < s, where.bases[..., None] + spread, s)
    extra = jnp.where(missing[..., None], extra[:, :, None], s)
    extra = jnp.moveaxis(extra, 0, 2).reshape(b, h, -1)
    columns = jnp.sort(jnp.concatenate([columns, extra], axis=-1), axis=-1)
    again = jnp.pad(columns[..., 1:] == columns[..., :-1], ((0, 0), (0, 0), (1, 0)))
    return Selection(columns=jnp.where(again, s, columns), diagonals=marked)


def _largest(
    mass: Float[Array, "b h s"], budget: Int[Array, "#b h"], end: Int[Array, " b"], most: int
) -> Bool[Array, "b h s"]:
    """The `budget` largest before `end`, at most `most`; of equals, those of the lowest slots.

    The bits of floats of 0 or more are ordered as the floats are, so the smallest mass that is
    kept is found bit by bit, in fewer passes than a sort of a long text takes.
    """
    slots = jnp.arange(mass.shape[-1], dtype=jnp.int32)[None, None]
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)
    bits = jnp.where(slots < end[:, None, None], bits, -1)
    wanted = jnp.minimum(jnp.minimum(budget, most), end[:, None])[..., None]

    def settle(i, least):
        tried = least | (1 << (30 - i))
        enough = jnp.sum(bits >= tried, axis=-1, keepdims=True, dtype=jnp.int32) >= wanted
        return jnp.where(enough, tried, least)

    least = jax.lax.fori_loop(0, 31, settle, jnp.zeros_like(bits[..., :1]))
    above, equal = bits > least, bits == least
    room = wanted - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= room))
