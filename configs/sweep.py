"""What a sweep is: a config, the points at which it is trained, and the number to compare.

A point is a dictionary from dotted config keys to values. The combinators make lists of points out
of dictionaries of lists, and out of each other:

    product({"optimizer.learning_rate": [1e-3, 3e-3], "seed": [0, 1]})          # 4 points
    product(zipped({"batch_size": [8, 16], "steps": [800, 400]}), {"seed": [0, 1]})   # 4 points
    chain(product({"seed": [0]}), product({"seed": [1], "steps": [10]}))        # 2 points
    sample({"optimizer.learning_rate": log_uniform(1e-4, 1e-1)}, count=20, seed=0)    # 20 points

A :class:`Search` in their place lets Optuna choose each point by what those before it gave.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between ``low`` and ``high``, both included; of ``log``, its logarithm."""

    low: float | int
    high: float | int
    log: bool = False
    integer: bool = False

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"the range {self.low} to {self.high} is empty: give low < high.")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range cannot begin at {self.low}: give low > 0.")

    def draw(self, generator: random.Random) -> float | int:
        """One value."""
        if self.integer and not self.log:
            return generator.randint(int(self.low), int(self.high))
        if not self.log:
            return generator.uniform(self.low, self.high)
        # Half a step beyond both ends gives the outer integers their share.
        half = 0.5 if self.integer else 0.0
        value = math.exp(generator.uniform(math.log(self.low - half), math.log(self.high + half)))
        value = round(value) if self.integer else value
        return min(max(value, self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, each as likely."""

    values: tuple[Any, ...]

    def __post_init__(self):
        if not self.values:
            raise ValueError("a choice needs at least one value.")

    def draw(self, generator: random.Random) -> Any:
        """One value."""
        return generator.choice(self.values)


Space = Mapping[str, Uniform | Choice]
Lists = Mapping[str, Sequence[Any]]


def uniform(low: float | int, high: float | int) -> Uniform:
    """A real number."""
    return Uniform(low, high)


def log_uniform(low: float | int, high: float | int) -> Uniform:
    """A positive real number, its logarithm uniform."""
    return Uniform(low, high, log=True)


def integers(low: int, high: int, log: bool = False) -> Uniform:
    """A whole number from ``low`` to ``high``, both included."""
    return Uniform(low, high, log=log, integer=True)


def choice(*values: Any) -> Choice:
    """One of the values."""
    return Choice(values)


@dataclasses.dataclass(frozen=True)
class Search:
    """Points that Optuna chooses one after the other.

    Attributes:
        space: where each key's values lie.
        trials: how many points in all.
        sampler: ``tpe`` (Parzen estimators), ``random`` or ``cmaes``.
        seed: of the sampler. With several workers the points depend on their timing, too.
    """

    space: Space
    trials: int
    sampler: str = "tpe"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A config trained at many points.

    Attributes:
        config: what ``get_config()`` of a config gives.
        points: from the combinators, or a :class:`Search`.
        metric: the number of the task's evaluation that points are compared by.
        minimize: whether less of it is better.
    """

    config: Any
    points: Sequence[Point] | Search
    metric: str
    minimize: bool = True


def product(*parts: Lists | Sequence[Point]) -> list[Point]:
    """Every combination of the parts' points; the last part varies fastest.

    A dictionary of lists stands for every combination of its values.

    Raises:
        ValueError: two parts set the same key.
    """
    lists = itertools.chain.from_iterable(map(_as_lists, parts))
    return [_join(combination) for combination in itertools.product(*lists)]


def zipped(*parts: Lists | Sequence[Point]) -> list[Point]:
    """The parts' points side by side: the first with the first, and so on.

    In a dictionary of lists the lists, too, go side by side.

    Raises:
        ValueError: lengths that differ, or two parts that set the same key.
    """
    lists = list(itertools.chain.from_iterable(map(_as_lists, parts)))
    lengths = {len(points) for points in lists}
    if len(lengths) > 1:
        raise ValueError(
            f"zipped lists have {sorted(lengths)} values: give as many of each, or take product."
        )
    return [_join(points) for points in zip(*lists, strict=True)]


def chain(*parts: Sequence[Point]) -> list[Point]:
    """The points of one part after those of another; what is there already is left out."""
    points: list[Point] = []
    for point in itertools.chain(*parts):
        if point not in points:
            points.append(dict(point))
    return points


def sample(space: Space, count: int, seed: int) -> list[Point]:
    """Points drawn at random, the same for the same seed; more of them begin with the fewer."""
    generator = random.Random(seed)
    return [{key: values.draw(generator) for key, values in space.items()} for _ in range(count)]


def _as_lists(part: Lists | Sequence[Point]) -> list[list[Point]]:
    """The points of one part; of a dictionary of lists, one list for each of its keys."""
    if isinstance(part, Mapping):
        return [[{str(key): value} for value in values] for key, values in part.items()]
    return [[dict(point) for point in part]]


def _join(points: Iterable[Point]) -> Point:
    joined: Point = {}
    for point in points:
        if twice := sorted(joined.keys() & point.keys()):
            raise ValueError(f"{twice[0]} is set by two parts of the sweep: leave it to one.")
        joined |= point
    return joined
