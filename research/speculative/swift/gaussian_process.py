"""A Gaussian process over the unit cube with a Matern 5/2 kernel, and its next point to try.

The surrogate of SWIFT's search (arXiv 2410.06916), as the library ``bayes_opt`` has it: values are
normalised, the one length scale maximises the marginal likelihood, the acquisition is the upper
confidence bound. float64 in numpy.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy import linalg, optimize
from scipy.spatial.distance import cdist

RANDOM_POINTS = 10_000
"""Where the bound is looked at before the best few places are refined."""
REFINED = 5
LENGTH_SCALES = (1e-2, 1e2)


def matern(distance: Float[np.ndarray, "*s"], scale: float) -> Float[np.ndarray, "*s"]:
    """The kernel of smoothness 5/2: ``(1 + r + r^2 / 3) exp(-r)``, ``r = sqrt(5) d / scale``."""
    r = math.sqrt(5) * distance / scale
    return (1 + r + r**2 / 3) * np.exp(-r)


def _log_likelihood(distance: np.ndarray, y: np.ndarray, scale: float, noise: float) -> float:
    try:
        lower = linalg.cholesky(
            matern(distance, scale) + noise * np.eye(len(y)), lower=True, check_finite=False
        )
    except linalg.LinAlgError:
        return -math.inf
    weights = linalg.cho_solve((lower, True), y, check_finite=False)
    return -0.5 * float(y @ weights) - float(np.log(np.diag(lower)).sum())


class GaussianProcess:
    """The posterior given values at some points.

    Args:
        points: (n, d), n at least 1.
        values: (n,).
        noise: variance of the normalised values beside the process.
    """

    def __init__(
        self, points: Float[np.ndarray, "n d"], values: Float[np.ndarray, " n"], noise: float
    ):
        self.points = points
        self.mean, spread = float(values.mean()), float(values.std())
        self.spread = spread if spread > 0 else 1.0
        y = (values - self.mean) / self.spread
        distance = cdist(points, points)
        self.scale = self._fit(distance, y, noise)
        gram = matern(distance, self.scale) + noise * np.eye(len(y))
        self.lower = linalg.cholesky(gram, lower=True)
        self.weights = linalg.cho_solve((self.lower, True), y)

    @staticmethod
    def _fit(distance: np.ndarray, y: np.ndarray, noise: float) -> float:
        """The likeliest length scale: the best of a grid, refined between its neighbours."""
        grid = np.linspace(math.log(LENGTH_SCALES[0]), math.log(LENGTH_SCALES[1]), 15)
        found = [_log_likelihood(distance, y, math.exp(x), noise) for x in grid]
        best = int(np.argmax(found))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        refined = optimize.minimize_scalar(
            lambda x: -_log_likelihood(distance, y, math.exp(x), noise),
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-2},
        )
        return math.exp(refined.x)

    def predict(
        self, x: Float[np.ndarray, "m d"]
    ) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
        """Mean and standard deviation at ``x``, in the units of the values."""
        cross = matern(cdist(x, self.points), self.scale)
        solved = linalg.solve_triangular(self.lower, cross.T, lower=True)
        variance = np.maximum(1 - np.sum(solved**2, axis=0), 0)
        return self.mean + self.spread * (cross @ self.weights), self.spread * np.sqrt(variance)


def suggest(
    points: Float[np.ndarray, "n d"],
    values: Float[np.ndarray, " n"],
    rng: np.random.Generator,
    kappa: float,
    noise: float,
) -> Float[np.ndarray, " d"]:
    """The point of the unit cube with the largest ``mean + kappa * deviation``.

    Without any values it is a uniform one.
    """
    count, size = points.shape
    if count == 0:
        return rng.random(size)
    process = GaussianProcess(points, values, noise)

    def bound(x: np.ndarray) -> np.ndarray:
        mean, deviation = process.predict(x.reshape(-1, size))
        return mean + kappa * deviation

    tried = rng.random((RANDOM_POINTS, size))
    tried = tried[np.argsort(-bound(tried))[:REFINED]]
    for start in tried.copy():
        better = optimize.minimize(
            lambda x: -bound(x)[0], start, method="L-BFGS-B", bounds=[(0, 1)] * size
        )
        tried = np.vstack([tried, np.clip(better.x, 0, 1)])
    return tried[np.argmax(bound(tried))]
