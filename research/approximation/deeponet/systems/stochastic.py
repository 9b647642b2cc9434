"""Equations with a random coefficient: their statistics, and their solutions path by path."""

import numpy as np
from jaxtyping import Float

from research.approximation.deeponet.interpolation import interpolate
from research.approximation.deeponet.spaces import kl_eigenpairs


def kl_basis(
    kernel: str, length_scales: Float[np.ndarray, " n"], modes: int, points: int
) -> Float[np.ndarray, "n modes points"]:
    """For each length scale: eigenfunctions times roots of eigenvalues, on linspace(0, 1)."""
    grid = np.linspace(0.0, 1.0, points)
    pairs = (kl_eigenpairs(kernel, grid, float(scale), modes) for scale in length_scales)
    return np.stack([(functions * np.sqrt(values)[None]).T for values, functions in pairs])


def sensor_values(
    bases: Float[np.ndarray, "n modes points"], sensors: int
) -> Float[np.ndarray, "n width"]:
    """The branch's input: every eigenfunction on equispaced sensors, one after the other."""
    n, modes, points = bases.shape
    grid, at = np.linspace(0.0, 1.0, points), np.linspace(0.0, 1.0, sensors)
    return interpolate(grid, bases.reshape(n * modes, points), at).reshape(n, modes * sensors)


def cumulative(values: Float[np.ndarray, "*batch k"]) -> Float[np.ndarray, "*batch k"]:
    """Integral from 0 by the trapezoid rule, for values on linspace(0, 1)."""
    h = 1.0 / (values.shape[-1] - 1)
    steps = 0.5 * h * (values[..., 1:] + values[..., :-1])
    return np.concatenate([np.zeros_like(values[..., :1]), np.cumsum(steps, axis=-1)], axis=-1)


def _exponent(length_scales: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Variance of ``int_0^t k`` for the covariance exp(-|r| / l)."""
    scale = length_scales[:, None]
    return 2.0 * scale * t[None] + 2.0 * scale**2 * np.expm1(-t[None] / scale)


def sode_mean(
    length_scales: Float[np.ndarray, " n"], t: Float[np.ndarray, " q"], start: float = 1.0
) -> Float[np.ndarray, "n q"]:
    """Mean of the solution of ``dy = k(t) y dt``, k a Gaussian field of covariance exp(-|r|/l)."""
    return start * np.exp(0.5 * _exponent(length_scales, t))


def sode_second_moment(
    length_scales: Float[np.ndarray, " n"], t: Float[np.ndarray, " q"], start: float = 1.0
) -> Float[np.ndarray, "n q"]:
    """Mean of its square."""
    return start**2 * np.exp(2.0 * _exponent(length_scales, t))


def sode_path(
    field: Float[np.ndarray, "*batch k"], start: float = 1.0
) -> Float[np.ndarray, "*batch k"]:
    """The solution for one path k of the field, given on linspace(0, 1)."""
    return start * np.exp(cumulative(field))


def spde_path(
    b: Float[np.ndarray, "*batch k"], force: float = 10.0
) -> Float[np.ndarray, "*batch k"]:
    """``-(e^b s')' = f`` with s = 0 at both ends, for b given on linspace(0, 1).

    In closed form up to the trapezoid rule: ``s = C v1 - v2`` with ``v1 = int e^-b``,
    ``v2 = int e^-b f t dt`` and ``C = v2(1) / v1(1)``.
    """
    t = np.linspace(0.0, 1.0, b.shape[-1]).reshape((1,) * (b.ndim - 1) + (-1,))
    v1, v2 = cumulative(np.exp(-b)), cumulative(np.exp(-b) * force * t)
    return v2[..., -1:] / v1[..., -1:] * v1 - v2
