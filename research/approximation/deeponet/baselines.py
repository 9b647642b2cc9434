"""What an operator network must beat: quadrature, and linear and kernel maps of the sensor values.

All of them are solved in closed form in float64; penalties and length scales are chosen on
held-out functions of the training data.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from jaxtyping import Float

from models.pod import pod_basis
from research.approximation.deeponet.data import Aligned

PENALTIES = tuple(10.0 ** np.arange(-10, 1))
HELD_OUT = 5
"""One in so many functions chooses the penalty."""


def trapezoid(
    sensors: Float[np.ndarray, " m"], u: Float[np.ndarray, "n m"], y: Float[np.ndarray, "n q"]
) -> Float[np.ndarray, "n q"]:
    """``int_0^y u`` of the straight lines between the sensors, which begin at 0."""
    u = np.asarray(u, np.float64)
    steps = 0.5 * np.diff(sensors)[None] * (u[:, 1:] + u[:, :-1])
    whole = np.concatenate([np.zeros((len(u), 1)), np.cumsum(steps, axis=1)], axis=1)
    piece = np.clip(np.searchsorted(sensors, y, side="right") - 1, 0, len(sensors) - 2)
    part = y - sensors[piece]
    left, right = (np.take_along_axis(u, piece + i, 1) for i in (0, 1))
    slope = (right - left) / np.diff(sensors)[piece]
    return np.take_along_axis(whole, piece, 1) + part * (left + 0.5 * slope * part)


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A linear map with an intercept: ``mean_s + (u - mean_u) @ weights``."""

    mean_u: Float[np.ndarray, " m"]
    mean_s: Float[np.ndarray, " q"]
    weights: Float[np.ndarray, "m q"]
    penalty: float

    def __call__(self, u: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n q"]:
        """Outputs for sensor values."""
        return self.mean_s[None] + (u - self.mean_u[None]) @ self.weights


def ridge(
    u: Float[np.ndarray, "n m"],
    s: Float[np.ndarray, "n q"],
    penalties: Sequence[float] = PENALTIES,
) -> Ridge:
    """Ridge regression from sensor values to all grid values.

    Penalties are relative to the largest eigenvalue of the inputs' covariance; the one with the
    smallest error on every fifth function is used on all of them.

    Raises:
        ValueError: fewer functions than are needed to hold some out.
    """
    u, s = np.asarray(u, np.float64), np.asarray(s, np.float64)
    if len(u) < 2 * HELD_OUT:
        raise ValueError(f"{len(u)} functions are too few for ridge: give {2 * HELD_OUT} or more.")
    held = np.arange(len(u)) % HELD_OUT == 0
    fits = _ridges(u[~held], s[~held], penalties)
    best = min(fits, key=lambda fit: float(np.mean(np.square(fit(u[held]) - s[held]))))
    return _ridges(u, s, [best.penalty])[0]


def _ridges(u: np.ndarray, s: np.ndarray, penalties: Sequence[float]) -> list[Ridge]:
    mean_u, mean_s = u.mean(0), s.mean(0)
    left, singular, right = np.linalg.svd(u - mean_u[None], full_matrices=False)
    projected = left.T @ (s - mean_s[None])
    return [
        Ridge(
            mean_u,
            mean_s,
            (right.T * (singular / (singular**2 + p * singular[0] ** 2))[None]) @ projected,
            p,
        )
        for p in penalties
    ]


@dataclasses.dataclass(frozen=True)
class PodRidge:
    """Ridge regression from sensor values to POD coefficients."""

    mean: Float[np.ndarray, " q"]
    basis: Float[np.ndarray, "q p"]
    coefficients: Ridge

    def __call__(self, u: Float[np.ndarray, "n m"]) -> Float[np.ndarray, "n q"]:
        """Outputs for sensor values."""
        return self.mean[None] + self.coefficients(u) @ self.basis.T


def pod_ridge(u: Float[np.ndarray, "n m"], s: Float[np.ndarray, "n q"], modes: int) -> PodRidge:
    """POD of the outputs, then :func:`ridge` to the coefficients."""
    mean, basis, _ = pod_basis(s, modes)
    return PodRidge(mean, basis, ridge(u, (np.asarray(s, np.float64) - mean[None]) @ basis))


@dataclasses.dataclass(frozen=True)
class KernelRidge:
    """Regression on triples with the kernel ``(u . u' / m) or rbf(u, u')`` times ``rbf(y, y')``."""

    train: Aligned
    dual: Float[np.ndarray, " n"]
    mean: float
    linear: bool
    scale_u: float
    scale_y: float
    penalty: float

    def __call__(self, test: Aligned, rows: int = 2000) -> Float[np.ndarray, " k"]:
        """Values for the functions and queries of ``test``."""
        parts = []
        for i in range(0, len(test.u), rows):
            u, y = test.u[i : i + rows], test.y[i : i + rows]
            gram = _gram(u, self.train.u, self.linear, self.scale_u)
            parts.append(gram * _rbf(y, self.train.y, self.scale_y) @ self.dual)
        return self.mean + np.concatenate(parts)


def _rbf(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    a, b = np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale
    square = np.sum(a**2, 1)[:, None] + np.sum(b**2, 1)[None] - 2.0 * a @ b.T
    return np.exp(-0.5 * np.maximum(square, 0.0))


def _gram(a: np.ndarray, b: np.ndarray, linear: bool, scale: float) -> np.ndarray:
    m = a.shape[1]
    if linear:
        return np.asarray(a, np.float64) @ np.asarray(b, np.float64).T / m
    return _rbf(a, b, scale * np.sqrt(m))


def kernel_ridge(
    train: Aligned,
    linear: bool,
    scales_u: Sequence[float] = (1.0, 2.0, 4.0),
    scales_y: Sequence[float] = (0.1, 0.3, 1.0),
    penalties: Sequence[float] = (1e-9, 1e-7, 1e-5),
) -> KernelRidge:
    """Kernel ridge regression on single triples, as a DeepONet sees them; O(n^3).

    With ``linear`` it is the best linear operator of the data (smooth in y), else a Gaussian
    process. Scales of u are in root mean squares over the sensors. All settings are chosen on every
    fifth triple, whose functions the others must not share: give one query per function.
    """
    held = np.arange(len(train.u)) % HELD_OUT == 0
    part = Aligned(train.u[~held], train.y[~held], train.s[~held])
    rest = Aligned(train.u[held], train.y[held], train.s[held])
    settings = [
        {"scale_u": scale_u, "scale_y": scale_y, "penalty": penalty}
        for scale_u in ((1.0,) if linear else scales_u)
        for scale_y in scales_y
        for penalty in penalties
    ]

    def error(chosen: dict[str, float]) -> float:
        found = _fit_kernel(part, linear, **chosen)
        return np.inf if found is None else float(np.mean(np.square(found(rest) - rest.s)))

    found = _fit_kernel(train, linear, **min(settings, key=error))
    if found is None:
        raise ValueError("every kernel matrix is singular: give larger penalties.")
    return found


def _fit_kernel(
    train: Aligned, linear: bool, scale_u: float, scale_y: float, penalty: float
) -> KernelRidge | None:
    """None if the matrix is not positive definite."""
    gram = _gram(train.u, train.u, linear, scale_u) * _rbf(train.y, train.y, scale_y)
    gram[np.diag_indices_from(gram)] += penalty * np.trace(gram) / len(gram)
    mean = 0.0 if linear else float(np.mean(train.s, dtype=np.float64))
    try:
        factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True)
    except np.linalg.LinAlgError:
        return None
    dual = scipy.linalg.cho_solve(factor, np.asarray(train.s, np.float64) - mean)
    return KernelRidge(train, dual, mean, linear, scale_u, scale_y, penalty)
