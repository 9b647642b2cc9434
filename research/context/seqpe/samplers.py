"""What SeqPE's encoder is trained on beside the main task, drawn on the device.

Positions have n axes of P each (:class:`models.seqpe.Config`); a position is also one number, its
rank among the ``P**n`` in order. Source: arXiv 2506.13277 and its released sampler.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from models.seqpe import BASE, Config, grid_positions

MAX_EDITS = 3
KINDS = 4
"""Ways to edit digits: insert, delete, replace, swap."""

LARGEST_SQUARED = 32767
"""Axes up to here have squared distances in a plane that fit 32 bits."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much is drawn in a step, and by which law.

    Attributes:
        candidates: N, candidates of a pivot.
        hard_rate: share of pivots whose special candidates are edits of their digits.
        hard_share: such candidates, as a share of N.
        spread: positions of the range from which the special candidates of other pivots come.
        transfer_points: n_t, positions of each distilled window.
        shift_rate: share of steps whose main task is read at shifted positions.
    """

    candidates: int = 32
    hard_rate: float = 0.4
    hard_share: float = 0.25
    spread: int = 256
    transfer_points: int = 32
    shift_rate: float = 0.1

    def __post_init__(self):
        if self.candidates < 2 or self.transfer_points < 2 or self.spread < 1:
            raise ValueError(
                f"candidates {self.candidates}, transfer_points {self.transfer_points}, spread "
                f"{self.spread}: give at least 2, 2 and 1."
            )
        rates = (self.hard_rate, self.hard_share, self.shift_rate)
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"hard_rate, hard_share, shift_rate are {rates}: give 0 to 1.")

    @property
    def edits(self) -> int:
        """Candidates that are edits of a pivot's digits."""
        return int(self.hard_share * self.candidates)

    def side(self, cfg: Config) -> int:
        """The longest side of a cube of at most ``max(spread, 5 N)`` positions within the grid."""
        wanted, side = max(self.spread, 5 * self.candidates), 1
        while side < cfg.axis_length and (side + 1) ** cfg.axes <= wanted:
            side += 1
        return side

    def check(self, cfg: Config, window: tuple[int, ...]) -> None:
        """Raise ValueError unless all draws exist for an encoder and a main task's window."""
        if len(window) != cfg.axes:
            raise ValueError(f"a window of {window} for positions of {cfg.axes} axes.")
        if cfg.axes > 1 and cfg.axis_length > LARGEST_SQUARED:
            raise ValueError(
                f"axis_length {cfg.axis_length} with {cfg.axes} axes: give up to {LARGEST_SQUARED}."
            )
        if self.candidates > min(cfg.axis_length**cfg.axes - 1, self.side(cfg) ** cfg.axes):
            raise ValueError(
                f"there are not {self.candidates} candidates among {cfg.axis_length} positions "
                "per axis: lower candidates."
            )
        if self.transfer_points > math.prod(window):
            raise ValueError(
                f"transfer_points {self.transfer_points} exceed the {math.prod(window)} positions "
                "of the main task: lower them."
            )
        if any(lowest(size, cfg.axes) >= cfg.axis_length - size for size in window):
            raise ValueError(
                f"no windows of {window} lie beyond the first among {cfg.axis_length} positions "
                "per axis: raise axis_length."
            )


@struct.dataclass
class Candidates:
    """What each pivot is compared with, and which of them is nearest."""

    positions: Any  # (b, N, axes)
    labels: Any  # (b,) index of the nearest, the first if several are


def distinct(key: Key[Array, ""], rows: int, size: int, count: int) -> Int[Array, "{rows} {count}"]:
    """``count`` distinct numbers below ``size`` for each row, uniformly."""
    return jax.lax.top_k(jax.random.uniform(key, (rows, size)), count)[1].astype(jnp.int32)


def rank(positions: Int[Array, "*rows axes"], length: int) -> Int[Array, "*rows"]:
    """A position as one number."""
    steps = jnp.asarray([length**i for i in reversed(range(positions.shape[-1]))], jnp.int32)
    return jnp.sum(positions * steps.reshape((1,) * (positions.ndim - 1) + (-1,)), -1)


def unrank(numbers: Int[Array, "*rows"], shape: tuple[int, ...]) -> Int[Array, "*rows axes"]:
    """The position of a number in a grid of this shape, the last axis fastest."""
    return jnp.stack(jnp.unravel_index(numbers, shape), -1).astype(jnp.int32)


def distance(a: Int[Array, "*#rows n"], b: Int[Array, "*#rows n"]) -> Int[Array, "*rows"]:
    """Squared Euclidean distance; on one axis its root, which orders alike and cannot overflow."""
    apart = jnp.abs(a - b)
    return apart[..., 0] if a.shape[-1] == 1 else jnp.sum(jnp.square(apart), -1)


def sample_contrastive(
    key: Key[Array, ""], cfg: Config, sampling: Sampling, pivots: Int[Array, "b axes"]
) -> Candidates:
    """N candidates for every pivot: special ones first, then uniform ones, none twice.

    Special are edits of the pivot's digits or draws from a small range, as a coin says.
    """
    keys = jax.random.split(key, 4)
    rows, n, shape = pivots.shape[0], sampling.candidates, (cfg.axis_length,) * cfg.axes
    simple = unrank(distinct(keys[0], rows, cfg.axis_length**cfg.axes, n + 1), shape)
    edits, far = _hard(keys[1], cfg, sampling, pivots, simple)
    nearby = _from_range(keys[2], cfg, sampling, rows)
    hard = jax.random.bernoulli(keys[3], sampling.hard_rate, (rows, 1))
    spare = n - sampling.edits
    special = jnp.where(hard[..., None], jnp.pad(edits, ((0, 0), (0, spare), (0, 0))), nearby)
    usable = jnp.where(hard, jnp.pad(far, ((0, 0), (0, spare))), True)
    positions = _first_distinct(
        jnp.concatenate([special, simple], 1),
        jnp.concatenate([usable, jnp.ones((rows, n + 1), bool)], 1),
        pivots,
        n,
        cfg.axis_length,
    )
    return Candidates(positions, jnp.argmin(distance(positions, pivots[:, None]), 1))


def _first_distinct(
    given: Int[Array, "b m axes"],
    usable: Bool[Array, "b m"],
    pivots: Int[Array, "b axes"],
    n: int,
    length: int,
) -> Int[Array, "b {n} axes"]:
    """The first n usable ones that are not the pivot and did not occur before."""
    numbers, m = rank(given, length), given.shape[1]
    same = (numbers[:, :, None] == numbers[:, None, :]) & usable[:, None, :]
    repeats = jnp.any(same & jnp.tril(jnp.ones((m, m), bool), -1)[None], -1)
    good = usable & ~repeats & (numbers != rank(pivots, length)[:, None])
    order = jnp.argsort(~good, axis=1, stable=True)[:, :n]
    return jnp.take_along_axis(given, order[..., None], axis=1)


def _from_range(
    key: Key[Array, ""], cfg: Config, sampling: Sampling, rows: int
) -> Int[Array, "{rows} candidates axes"]:
    """N distinct positions of a cube at a random place, for each row its own."""
    for_corner, for_draws = jax.random.split(key)
    side = sampling.side(cfg)
    corner = jax.random.randint(for_corner, (rows, 1, cfg.axes), 0, cfg.axis_length - side + 1)
    drawn = distinct(for_draws, rows, side**cfg.axes, sampling.candidates)
    return corner + unrank(drawn, (side,) * cfg.axes)


def _hard(
    key: Key[Array, ""],
    cfg: Config,
    sampling: Sampling,
    pivots: Int[Array, "b axes"],
    simple: Int[Array, "b m axes"],
) -> tuple[Int[Array, "b edits axes"], Bool[Array, "b edits"]]:
    """Edited pivots, and which lie farther off than the nearest of the first simple candidates."""
    count = sampling.edits
    for_number, *for_edits = jax.random.split(key, MAX_EDITS + 1)
    edited = jnp.broadcast_to(pivots[:, None], (pivots.shape[0], count, cfg.axes))
    number = jax.random.randint(for_number, edited.shape[:2], 1, MAX_EDITS + 1)
    for done, one in enumerate(for_edits):
        edited = jnp.where((done < number)[..., None], edit_digits(one, cfg, edited), edited)
    kept = sampling.candidates + 1 - count
    nearest = jnp.min(distance(simple[:, :kept], pivots[:, None]), 1, keepdims=True)
    return edited, distance(edited, pivots[:, None]) > nearest


def edit_digits(
    key: Key[Array, ""], cfg: Config, positions: Int[Array, "*rows axes"]
) -> Int[Array, "*rows axes"]:
    """One successful random edit of the digits of one axis, which is drawn.

    A kind of edit is drawn, then where and which digit. The edit succeeds if the number changes,
    has no leading zero and is below P; else all is drawn again. The law of the first success is
    taken directly: all edits that succeed, each weighted by the chance of being drawn.
    """
    for_axis, for_edit = jax.random.split(key)
    axis = jax.random.randint(for_axis, (*positions.shape[:-1], 1), 0, cfg.axes)
    number = jnp.take_along_axis(positions, axis, -1)[..., 0]
    values, chances = edits_of(number, cfg.max_digits, cfg.axis_length)
    chosen = jax.random.categorical(for_edit, jnp.log(chances))
    edited = jnp.take_along_axis(values, chosen[..., None], -1)
    axes = jnp.arange(cfg.axes).reshape((1,) * (positions.ndim - 1) + (-1,))
    return jnp.where(axes == axis, edited, positions)


def edits_of(
    number: Int[Array, "*rows"], max_digits: int, limit: int
) -> tuple[Int[Array, "*rows edits"], Float[Array, "*rows edits"]]:
    """Every edit of a number of up to ``max_digits`` digits, and the chance that it is drawn.

    The chance is 0 where an edit fails: it changes nothing, leads with a zero or reaches ``limit``.
    """
    x = number[..., None, None]
    tens = jnp.asarray([BASE**i for i in range(max_digits + 2)], jnp.int32)
    wide = (1,) * number.ndim

    def along(values: Array, *shape: int) -> Array:
        return values.reshape(*wide, *shape)

    length = _digits(number, tens)[..., None, None]
    place, digit = along(jnp.arange(max_digits + 1), -1, 1), along(jnp.arange(BASE), 1, -1)
    unit = along(tens[:-1], -1, 1)
    low, high = x % unit, x // unit
    here = high % BASE
    other, other_unit = jnp.swapaxes(place, -1, -2), jnp.swapaxes(unit, -1, -2)
    there = (x // other_unit) % BASE
    kinds = (  # value, length, which arguments there are, how many of them
        ((high * BASE + digit) * unit + low, length + 1, place <= length, BASE * (length + 1)),
        (high // BASE * unit + low, length - 1, place < length, length),
        (x + (digit - here) * unit, length, place < length, BASE * length),
        (
            x + (here - there) * (other_unit - unit),
            length,
            (place < other) & (other < length),
            length * (length - 1) // 2,
        ),
    )
    values, chances = [], []
    for value, new_length, there_is, ways in kinds:
        right = (_digits(value, tens) == new_length) & (value < limit) & (value != x) & there_is
        chance = jnp.where(right, 1.0 / (KINDS * jnp.maximum(ways, 1)), 0.0)
        values.append(value.reshape(*number.shape, -1))
        chances.append(chance.reshape(*number.shape, -1))
    return jnp.concatenate(values, -1), jnp.concatenate(chances, -1)


def _digits(number: Array, tens: Array) -> Array:
    """How many digits a number has; 0 has one."""
    places = tens[1:].reshape((1,) * number.ndim + (-1,))
    return 1 + jnp.sum(number[..., None] >= places, -1)


def lowest(size: int, axes: int) -> int:
    """Where distilled windows begin at the earliest: at a quarter; in a grid, beside the first."""
    return size // 4 if axes == 1 else size


def sample_transfer(
    key: Key[Array, ""], cfg: Config, sampling: Sampling, window: tuple[int, ...], rows: int
) -> tuple[Int[Array, "{rows} axes"], Int[Array, "{rows} points"]]:
    """Corners of windows beyond the main task's, and distinct places within each.

    One axis: starts from a quarter of the window on. More: corners that lie beyond the main window
    along at least one axis. Whole windows lie below P.
    """
    for_corner, for_offsets = jax.random.split(key)
    offsets = distinct(for_offsets, rows, math.prod(window), sampling.transfer_points)
    ends = [cfg.axis_length - size for size in window]
    inner = [lowest(size, cfg.axes) for size in window]
    # A corner is outside along the first axis that it is outside of: a box of corners for each.
    boxes = [
        [(0, low) for low in inner[:i]]
        + [(inner[i], ends[i])]
        + [(0, end) for end in ends[i + 1 :]]
        for i in range(cfg.axes)
    ]
    sizes = [math.prod(high - low for low, high in box) for box in boxes]
    drawn = jax.random.randint(for_corner, (rows,), 0, sum(sizes))
    corner = jnp.zeros((rows, cfg.axes), jnp.int32)
    before = 0
    for box, size in zip(boxes, sizes, strict=True):
        within = unrank(jnp.clip(drawn - before, 0, size - 1), tuple(b - a for a, b in box))
        place = within + jnp.asarray([low for low, _ in box], jnp.int32)[None]
        is_here = (drawn >= before) & (drawn < before + size)
        corner = jnp.where(is_here[:, None], place, corner)
        before += size
    return corner, offsets


def sample_shift(
    key: Key[Array, ""], cfg: Config, window: tuple[int, ...], rows: int
) -> Int[Array, "{rows} axes"]:
    """Corners of shifted windows of the main task: anywhere that the window stays below P."""
    room = jnp.asarray([cfg.axis_length - size + 1 for size in window], jnp.int32)
    return jax.random.randint(
        key, (rows, cfg.axes), 0, jnp.broadcast_to(room[None], (rows, cfg.axes))
    )


def window_positions(
    corners: Int[Array, "rows axes"], window: tuple[int, ...]
) -> Int[Array, "rows t axes"]:
    """All positions of the windows at these corners."""
    return corners[:, None] + grid_positions(window)[None]
