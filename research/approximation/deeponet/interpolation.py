"""Piecewise polynomials through values on knots: not-a-knot cubic splines, and straight lines."""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.interpolate import CubicSpline

CHUNK = 2_000_000
"""Values that are interpolated at a time; a spline has four coefficients for each."""


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """Polynomials between knots, their coefficients made once: gather and Horner from then on.

    Attributes:
        knots: ascending.
        coefficients: (order, n, pieces), the highest power first, in the distance to the left knot.
    """

    knots: Float[np.ndarray, " k"]
    coefficients: Float[np.ndarray, "order n pieces"]

    def __call__(self, x: Float[np.ndarray, "*rows q"]) -> Float[np.ndarray, "n q"]:
        """Values at ``x``: shared points (q,), or points of each function (n, q).

        Raises:
            ValueError: a point outside the knots (by more than rounding).
        """
        low, high = self.knots[0], self.knots[-1]
        slack = 1e-9 * (high - low)
        if x.size and not (x.min() >= low - slack and x.max() <= high + slack):
            raise ValueError(
                f"asked for values at {x.min()} to {x.max()}, known are {low} to {high}: "
                "draw the functions on a longer interval."
            )
        piece = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, len(self.knots) - 2)
        distance = x - self.knots[piece]
        if x.ndim == 1:
            pick = lambda c: c[:, piece]
            distance = distance[None]
        else:
            pick = lambda c: np.take_along_axis(c, piece, axis=1)
        value = pick(self.coefficients[0])
        for c in self.coefficients[1:]:
            value = value * distance + pick(c)
        return value

    def derivative(self) -> "Interpolant":
        """The derivative, piece by piece."""
        powers = np.arange(len(self.coefficients) - 1, 0, -1.0)
        return Interpolant(self.knots, self.coefficients[:-1] * powers[:, None, None])


def interpolant(
    knots: Float[np.ndarray, " k"], values: Float[np.ndarray, "n _"], kind: str = "cubic"
) -> Interpolant:
    """The interpolant of each row of ``values``; kind: cubic (not-a-knot) or linear.

    Raises:
        ValueError: an unknown kind, or values of another number of knots.
    """
    if values.shape[1] != len(knots):
        raise ValueError(f"{values.shape[1]} values do not fit {len(knots)} knots: match them.")
    if kind == "cubic":
        pieces = CubicSpline(knots, values, axis=1, bc_type="not-a-knot").c
        # scipy: (4, pieces, n)
        return Interpolant(knots, np.ascontiguousarray(np.swapaxes(pieces, 1, 2)))
    if kind == "linear":
        slopes = np.diff(values, axis=1) / np.diff(knots)[None]
        return Interpolant(knots, np.stack([slopes, values[:, :-1]]))
    raise ValueError(f"unknown interpolation {kind!r}: choose cubic or linear.")


def interpolate(
    knots: Float[np.ndarray, " k"],
    values: Float[np.ndarray, "n _"],
    x: Float[np.ndarray, "*rows q"],
    kind: str = "cubic",
) -> Float[np.ndarray, "n q"]:
    """Values of many functions at ``x``, a part of the functions at a time."""
    step = max(1, CHUNK // len(knots))
    parts = [
        interpolant(knots, values[i : i + step], kind)(x if x.ndim == 1 else x[i : i + step])
        for i in range(0, len(values), step)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, x.shape[-1]))


def hermite(
    t: Float[np.ndarray, " k"],
    s: Float[np.ndarray, "n k"],
    slope: Float[np.ndarray, "n k"],
    x: Float[np.ndarray, "n q"],
) -> Float[np.ndarray, "n q"]:
    """Cubic Hermite interpolation of solutions whose derivative is known; error O(h^4).

    ``t`` is equispaced and ``x`` lies within it.
    """
    h = (t[-1] - t[0]) / (len(t) - 1)
    piece = np.clip(((x - t[0]) / h).astype(np.int64), 0, len(t) - 2)
    r = (x - t[piece]) / h
    left, right = (np.take_along_axis(s, piece + i, 1) for i in (0, 1))
    d_left, d_right = (h * np.take_along_axis(slope, piece + i, 1) for i in (0, 1))
    rise = right - left
    a, b = d_left - rise, rise - d_right
    return left + r * rise + r * (1 - r) * ((1 - r) * a + r * b)
