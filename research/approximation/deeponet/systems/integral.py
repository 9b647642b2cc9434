"""Integral operators: the Legendre transform and the Caputo fractional derivative."""

import numpy as np
import scipy.special
from jaxtyping import Float

from research.approximation.deeponet.interpolation import interpolant
from research.approximation.deeponet.spaces import GaussianField


def legendre_transform(
    space: GaussianField, features: Float[np.ndarray, "n k"], orders: int = 20, nodes: int = 200
) -> Float[np.ndarray, "n orders"]:
    """``int_{-1}^{1} P_j(x) u(x) dx`` for j = 0 .. ``orders - 1``, by Gauss quadrature.

    The space's interval [0, ``length``] is mapped to [-1, 1].
    """
    x, weights = np.polynomial.legendre.leggauss(nodes)
    values = space.evaluate(features, 0.5 * space.length * (x + 1.0))
    return values @ (weights[:, None] * np.polynomial.legendre.legvander(x, orders - 1))


def caputo(
    grid: Float[np.ndarray, " k"],
    values: Float[np.ndarray, "n k"],
    y: Float[np.ndarray, " q"],
    alpha: float,
    nodes: int = 48,
) -> Float[np.ndarray, "n q"]:
    """Caputo's derivative of order ``alpha`` in (0, 1) with its lower end at 0.

    ``1 / Gamma(1 - alpha) int_0^y (y - x)^(-alpha) u'(x) dx`` of the cubic spline through the
    values on ``grid`` (which begins at 0), by Gauss-Jacobi quadrature, whose weight is the kernel.

    Raises:
        ValueError: an order outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"the order is {alpha}: give one between 0 and 1.")
    x, weights = scipy.special.roots_jacobi(nodes, -alpha, 0.0)
    slope = interpolant(grid, values).derivative()
    at = slope((0.5 * y[:, None] * (x[None] + 1.0)).reshape(-1)).reshape(len(values), len(y), nodes)
    scale = (0.5 * y) ** (1.0 - alpha) / scipy.special.gamma(1.0 - alpha)
    return (at @ weights) * scale[None]
