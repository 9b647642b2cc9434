"""Spaces of random input functions: Gaussian random fields, power series, Chebyshev series.

All in numpy float64: the covariance of a smooth field has a condition number beyond 1e12, and its
Cholesky factor with a jitter of 1e-13 does not exist in float32.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.linalg
from jaxtyping import Float

from research.approximation.deeponet.interpolation import interpolate

KERNELS = ("rbf", "matern12")
JITTER = 1e-13


def covariance(
    kernel: str, x1: Float[np.ndarray, " a"], x2: Float[np.ndarray, " b"], length_scale: float
) -> Float[np.ndarray, "a b"]:
    """Covariance of unit variance: rbf ``exp(-r^2 / (2 l^2))`` or matern12 ``exp(-|r| / l)``.

    Raises:
        ValueError: an unknown kernel, or a length scale that is not positive.
    """
    if not length_scale > 0:
        raise ValueError(f"the length scale is {length_scale}: give a positive one.")
    r = (x1[:, None] - x2[None]) / length_scale
    if kernel == "rbf":
        return np.exp(-0.5 * r**2)
    if kernel == "matern12":
        return np.exp(-np.abs(r))
    raise ValueError(f"unknown kernel {kernel!r}: choose one of {', '.join(KERNELS)}.")


def cholesky_factor(
    kernel: str, grid: Float[np.ndarray, " k"], length_scale: float, jitter: float = JITTER
) -> Float[np.ndarray, "k k"]:
    """Lower factor of the covariance on the grid plus ``jitter`` on its diagonal.

    Raises:
        ValueError: the matrix is not positive definite in float64 with this jitter.
    """
    matrix = covariance(kernel, grid, grid, length_scale) + jitter * np.eye(len(grid))
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"the {kernel} covariance of length scale {length_scale} on {len(grid)} points is "
            f"singular with jitter {jitter}: raise the jitter or take fewer points."
        ) from error


def kl_eigenpairs(
    kernel: str, grid: Float[np.ndarray, " k"], length_scale: float, modes: int
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "k m"]]:
    """The largest eigenvalues of the covariance operator, with eigenfunctions on the grid.

    The operator is discretised by the trapezoid rule (columns times h, the first and last halved);
    eigenfunctions have unit L2 norm by the same rule. Signs are arbitrary in theory: here the value
    at the left end is not negative, so that eigenfunctions vary continuously with the length scale.
    """
    weights = np.full(len(grid), (grid[-1] - grid[0]) / (len(grid) - 1))
    weights[[0, -1]] /= 2
    root = np.sqrt(weights)
    # Similar to the operator's matrix, and symmetric.
    matrix = root[:, None] * covariance(kernel, grid, grid, length_scale) * root[None]
    last = len(grid) - 1
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=(len(grid) - modes, last))
    functions = vectors[:, ::-1] / root[:, None]
    functions = functions * np.where(functions[:1] < 0, -1.0, 1.0)
    return np.maximum(values[::-1], 0.0), functions


@runtime_checkable
class FunctionSpace(Protocol):
    """Random functions: drawn as features, then evaluated anywhere on the space's interval."""

    def sample(self, rng: np.random.Generator, n: int) -> Float[np.ndarray, "n k"]:
        """Features of ``n`` independent functions."""
        ...

    def evaluate(
        self, features: Float[np.ndarray, "n k"], x: Float[np.ndarray, "*rows q"]
    ) -> Float[np.ndarray, "n q"]:
        """Their values at shared points (q,), or at points of each function (n, q)."""
        ...


@dataclasses.dataclass(frozen=True)
class GaussianField:
    """A Gaussian random field on [0, ``length``], drawn on a grid and interpolated between."""

    length: float = 1.0
    length_scale: float = 0.2
    kernel: str = "rbf"
    points: int = 1000
    interpolation: str = "cubic"

    @property
    def grid(self) -> Float[np.ndarray, " k"]:
        """Where the field is drawn."""
        return np.linspace(0.0, self.length, self.points)

    def sample(self, rng: np.random.Generator, n: int) -> Float[np.ndarray, "n k"]:
        """Values on the grid."""
        return rng.standard_normal((n, self.points)) @ _factor(self).T

    def evaluate(
        self, features: Float[np.ndarray, "n k"], x: Float[np.ndarray, "*rows q"]
    ) -> Float[np.ndarray, "n q"]:
        """See :class:`FunctionSpace`."""
        return interpolate(self.grid, features, x, self.interpolation)


@functools.lru_cache(maxsize=8)
def _factor(field: GaussianField) -> np.ndarray:
    return cholesky_factor(field.kernel, field.grid, field.length_scale)


@dataclasses.dataclass(frozen=True)
class KarhunenLoeve:
    """A Gaussian random field on [0, 1] cut after ``modes`` eigenfunctions."""

    length_scale: float = 0.2
    kernel: str = "rbf"
    modes: int = 10
    points: int = 1000
    interpolation: str = "cubic"

    def sample(self, rng: np.random.Generator, n: int) -> Float[np.ndarray, "n k"]:
        """Independent standard normal numbers, one per mode."""
        return rng.standard_normal((n, self.modes))

    def basis(self, x: Float[np.ndarray, " q"]) -> Float[np.ndarray, "k q"]:
        """Eigenfunctions times the roots of their eigenvalues at ``x``."""
        grid = np.linspace(0.0, 1.0, self.points)
        values, functions = kl_eigenpairs(self.kernel, grid, self.length_scale, self.modes)
        return interpolate(grid, (functions * np.sqrt(values)[None]).T, x, self.interpolation)

    def evaluate(
        self, features: Float[np.ndarray, "n k"], x: Float[np.ndarray, "*rows q"]
    ) -> Float[np.ndarray, "n q"]:
        """See :class:`FunctionSpace`."""
        if x.ndim == 1:
            return features @ self.basis(x)
        basis = self.basis(x.reshape(-1)).reshape(self.modes, *x.shape)
        return np.einsum("nk,knq->nq", features, basis)


@dataclasses.dataclass(frozen=True)
class PowerSeries:
    """``sum_i a_i x^i`` with ``terms`` coefficients uniform in [-bound, bound]."""

    terms: int = 100
    bound: float = 1.0

    def sample(self, rng: np.random.Generator, n: int) -> Float[np.ndarray, "n k"]:
        """Coefficients, of the constant first."""
        return rng.uniform(-self.bound, self.bound, (n, self.terms))

    def evaluate(
        self, features: Float[np.ndarray, "n k"], x: Float[np.ndarray, "*rows q"]
    ) -> Float[np.ndarray, "n q"]:
        """See :class:`FunctionSpace`."""
        x = x[None] if x.ndim == 1 else x
        value = np.zeros((len(features), x.shape[-1]))
        for a in features.T[::-1]:
            value = value * x + a[:, None]
        return value


@dataclasses.dataclass(frozen=True)
class Chebyshev:
    """``sum_i a_i T_i(2 x - 1)`` on [0, 1], coefficients uniform in [-bound, bound]."""

    terms: int = 20
    bound: float = 1.0

    def sample(self, rng: np.random.Generator, n: int) -> Float[np.ndarray, "n k"]:
        """Coefficients, of T_0 first."""
        return rng.uniform(-self.bound, self.bound, (n, self.terms))

    def evaluate(
        self, features: Float[np.ndarray, "n k"], x: Float[np.ndarray, "*rows q"]
    ) -> Float[np.ndarray, "n q"]:
        """See :class:`FunctionSpace`."""
        z = 2.0 * (x[None] if x.ndim == 1 else x) - 1.0
        before, last = (
            np.zeros((len(features), z.shape[-1])),
            np.zeros((len(features), z.shape[-1])),
        )
        for a in features.T[:0:-1]:  # Clenshaw's recurrence
            before, last = last, 2.0 * z * last - before + a[:, None]
        return z * last - before + features[:, :1]


SPACES = {
    "gaussian": GaussianField,
    "karhunen_loeve": KarhunenLoeve,
    "power_series": PowerSeries,
    "chebyshev": Chebyshev,
}
"""Spaces by the name that configs use."""
