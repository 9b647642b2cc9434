"""Shapes given by a formula: signed distances, negative inside, and points on the surface."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "n 3"]


@runtime_checkable
class Shape(Protocol):
    """A solid inside of [-1, 1]^3."""

    def distance(self, points: Points) -> Float[np.ndarray, " n"]:
        """Signed distance to the surface, negative inside."""
        ...

    def surface(self, count: int, rng: np.random.Generator) -> Points:
        """Random points on the surface."""
        ...


class _Implicit:
    """Surface points for a shape that has a formula."""

    def distance(self, points: Points) -> Float[np.ndarray, " n"]:
        raise TypeError(f"{type(self).__name__} must define distance().")

    def surface(self, count: int, rng: np.random.Generator) -> Points:
        """Uniform points of a thin shell, moved onto the surface along the gradient.

        Their density is that of the area up to the shell's width times the curvature.
        """
        kept: list[np.ndarray] = []
        while sum(map(len, kept)) < count:
            points = rng.uniform(-1, 1, (200_000, 3))
            points = points[np.abs(self.distance(points)) < 0.02]
            for _ in range(6):
                value, slope = self.distance(points), self._slope(points)
                points = points - value[:, None] * slope / np.sum(slope**2, -1, keepdims=True)
            # At an edge the gradient jumps, and a few points bounce between its two sides.
            kept.append(points[np.abs(self.distance(points)) < 1e-6])
        return np.concatenate(kept)[:count]

    def _slope(self, points: Points, step: float = 1e-5) -> Points:
        shifts = step * np.eye(3)
        up, down = (
            np.stack([self.distance(points + s * shift[None]) for shift in shifts], axis=-1)
            for s in (1, -1)
        )
        return (up - down) / (2 * step)


@dataclasses.dataclass(frozen=True)
class Torus(_Implicit):
    """A torus around the z axis; distances are exact."""

    major: float = 0.55
    minor: float = 0.25

    def distance(self, points: Points) -> Float[np.ndarray, " n"]:
        """See :class:`Shape`."""
        ring = np.hypot(points[:, 0], points[:, 1]) - self.major
        return np.hypot(ring, points[:, 2]) - self.minor


@dataclasses.dataclass(frozen=True)
class Csg(_Implicit):
    """A box without a ball and with a bar through it.

    Made of exact distances by minima and maxima: right on the surface and in sign, and a lower
    bound of the true distance's size elsewhere.
    """

    box: float = 0.6
    ball: float = 0.72
    bar: float = 0.2

    def distance(self, points: Points) -> Float[np.ndarray, " n"]:
        """See :class:`Shape`."""
        carved = np.maximum(
            _box(points, np.full(3, self.box)), self.ball - np.linalg.norm(points, axis=-1)
        )
        return np.minimum(carved, _box(points, np.asarray([self.bar, self.bar, 0.9])))


def _box(points: np.ndarray, half: np.ndarray) -> np.ndarray:
    over = np.abs(points) - half[None]
    outside = np.linalg.norm(np.maximum(over, 0), axis=-1)
    return outside + np.minimum(over.max(axis=-1), 0)


SHAPES: dict[str, Shape] = {"torus": Torus(), "csg": Csg()}
"""Shapes by name."""
