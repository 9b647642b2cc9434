"""Operator data in its three forms, split by function, and mini-batches of it.

``u`` are input functions at ``m`` sensors, ``y`` queries of ``d`` coordinates, ``s`` output values
with a last axis of outputs if there are several. All arrays are float32 and finite; what is not is
refused when the data are made.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

Shaped = Float[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Triples: row i is ``G(u_i)(y_i) = s_i``. A function may stand in several rows.

    Shapes: u (n, m), y (n, d), s (n,) or (n, c).

    Raises:
        ValueError: sizes that differ, or values that are not finite; so do the other forms.
    """

    u: Real[np.ndarray, "_ m"]
    y: Real[np.ndarray, "_ d"]
    s: Real[np.ndarray, "_ *c"]

    def __post_init__(self):
        _check(self, rows=("u", "y", "s"))


@dataclasses.dataclass(frozen=True)
class Batched:
    """Each function with queries of its own; where ``mask`` is False a query is padding.

    Shapes: u (n, m), y (n, q, d), s (n, q) or (n, q, c), mask (n, q).
    """

    u: Real[np.ndarray, "_ m"]
    y: Real[np.ndarray, "_ _ d"]
    s: Real[np.ndarray, "_ _ *c"]
    mask: Bool[np.ndarray, "_ _"]

    def __post_init__(self):
        queries = {name: getattr(self, name).shape[1] for name in ("y", "s", "mask")}
        if len(set(queries.values())) != 1:
            raise ValueError(f"numbers of queries differ, {queries}: match them.")
        _check(self, rows=("u", "y", "s", "mask"))

    def aligned(self) -> Aligned:
        """The same triples, a row each, without the padding."""
        u = np.repeat(self.u[:, None], self.y.shape[1], axis=1)
        return Aligned(u[self.mask], self.y[self.mask], self.s[self.mask])


@dataclasses.dataclass(frozen=True)
class Cartesian:
    """All functions at the same queries.

    Shapes: u (n, m), y (q, d), s (n, q) or (n, q, c).
    """

    u: Real[np.ndarray, "_ m"]
    y: Real[np.ndarray, "_ d"]
    s: Real[np.ndarray, "_ _ *c"]

    def __post_init__(self):
        if self.y.shape[0] != self.s.shape[1]:
            raise ValueError(
                f"{self.y.shape[0]} queries do not fit solutions on {self.s.shape[1]} points: "
                "y needs a row for each."
            )
        _check(self, rows=("u", "s"))

    def aligned(self) -> Aligned:
        """Every pair of a function and a query as a row, functions slowest."""
        n, q = self.s.shape[:2]
        u = np.repeat(self.u, q, axis=0)
        return Aligned(u, np.tile(self.y, (n, 1)), self.s.reshape(n * q, *self.s.shape[2:]))

    def pick(self, rng: np.random.Generator, count: int) -> Batched:
        """``count`` different random queries of each function.

        Raises:
            ValueError: more than there are.
        """
        n, q = self.s.shape[:2]
        if not 1 <= count <= q:
            raise ValueError(f"cannot pick {count} of {q} queries: ask for 1 to {q}.")
        rows = np.argsort(rng.random((n, q)), axis=1)[:, :count]
        s = self.s[np.arange(n)[:, None], rows]
        return Batched(self.u, self.y[rows], s, np.ones((n, count), bool))


OperatorData = Aligned | Batched | Cartesian
Data = TypeVar("Data", bound=OperatorData)


def _check(data: Any, rows: tuple[str, ...]) -> None:
    """Arrays in their dtype, finite, and with equally many functions; else ValueError."""
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        value = np.asarray(value, bool if field.name == "mask" else np.float32)
        object.__setattr__(data, field.name, value)
    counts = {name: len(getattr(data, name)) for name in rows}
    if len(set(counts.values())) != 1:
        raise ValueError(f"numbers of functions differ, {counts}: give every array a row for each.")
    valid = getattr(data, "mask", None)
    for name in ("u", "y", "s"):
        value = getattr(data, name)
        bad = ~np.isfinite(value)
        if valid is not None and name != "u":
            bad &= valid.reshape(valid.shape + (1,) * (value.ndim - 2))
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{name}{list(place)} is {value[place]}: leave out or repair what is not finite."
            )


def pad(u: Shaped, y: Sequence[Shaped], s: Sequence[Shaped]) -> Batched:
    """Functions with different numbers of queries, padded with zeros to the longest.

    Args:
        u: (n, m).
        y: for each function its queries, (k_i, d).
        s: for each function its values, (k_i,) or (k_i, c).

    Raises:
        ValueError: lists of different lengths, or a function whose y and s differ in length.
    """
    if not len(u) == len(y) == len(s):
        raise ValueError(
            f"{len(u)} functions, {len(y)} sets of queries and {len(s)} of values: match them."
        )
    for i, (queries, values) in enumerate(zip(y, s, strict=True)):
        if len(queries) != len(values):
            raise ValueError(
                f"function {i} has {len(queries)} queries and {len(values)} values: match them."
            )
    width = max(len(x) for x in y)
    fill = lambda x: np.pad(x, [(0, width - len(x)), *[(0, 0)] * (np.ndim(x) - 1)])
    mask = np.arange(width)[None] < np.array([len(x) for x in y])[:, None]
    return Batched(np.asarray(u), np.stack([fill(x) for x in y]), np.stack([*map(fill, s)]), mask)


def take(data: Data, rows: Any) -> Data:
    """Some of the functions (or triples), by numbers or a slice."""
    shared = ("y",) if isinstance(data, Cartesian) else ()
    names = [f.name for f in dataclasses.fields(data) if f.name not in shared]
    return dataclasses.replace(data, **{name: getattr(data, name)[rows] for name in names})


def split(data: Data, held_out: int, rng: np.random.Generator) -> tuple[Data, Data]:
    """(training, held-out) data with no function in both.

    Triples are not split: rows of one function in both parts would leak it. Split before
    ``aligned()``.

    Raises:
        ValueError: triples, or nothing would be left of one part.
    """
    if isinstance(data, Aligned):
        raise ValueError("triples may share functions: split the functions before aligned().")
    n = len(data.u)
    if not 0 < held_out < n:
        raise ValueError(f"cannot hold out {held_out} of {n} functions: take 1 to {n - 1}.")
    order = rng.permutation(n)
    return take(data, order[held_out:]), take(data, order[:held_out])


def concatenate(parts: Sequence[Data]) -> Data:
    """The functions of several data sets (with the same queries, if they share them)."""
    first = parts[0]
    shared = ("y",) if isinstance(first, Cartesian) else ()
    joined = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in dataclasses.fields(first)
        if f.name not in shared
    }
    return dataclasses.replace(first, **joined)


def iterate_cartesian(
    data: Cartesian, batch_u: int, batch_y: int, rng: np.random.Generator
) -> Iterator[Cartesian]:
    """Mini-batches over functions and over queries, without end.

    Functions go through a new random order each time all have been used (an incomplete last batch
    is left out); queries are drawn anew for every batch.

    Raises:
        ValueError: a batch larger than the data.
    """
    n, q = data.s.shape[:2]
    if not (1 <= batch_u <= n and 1 <= batch_y <= q):
        raise ValueError(
            f"a batch of {batch_u} functions and {batch_y} queries does not fit data of {n} and "
            f"{q}: make it smaller."
        )
    while True:
        order = rng.permutation(n)
        for i in range(0, n - batch_u + 1, batch_u):
            rows, queries = order[i : i + batch_u], rng.permutation(q)[:batch_y]
            yield Cartesian(data.u[rows], data.y[queries], data.s[rows][:, queries])


def draw_rows(key: Array, total: int, count: int) -> Array | None:
    """On the device: ``count`` different random numbers below ``total``; None stands for all."""
    return None if count == total else jax.random.permutation(key, total)[:count]


def choose(array: Any, rows: Array | None, axis: int = 0) -> Any:
    """``array`` at ``rows`` of an axis, or all of it for None."""
    return array if rows is None else jnp.take(array, rows, axis=axis)
