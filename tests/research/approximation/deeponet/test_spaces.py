"""Random functions have the law they claim; interpolation is exact where it must be."""

import numpy as np
import pytest

from research.approximation.deeponet import spaces
from research.approximation.deeponet.interpolation import hermite, interpolant, interpolate
from research.approximation.deeponet.spaces import (
    Chebyshev,
    GaussianField,
    KarhunenLoeve,
    PowerSeries,
)

GRID = np.linspace(0.0, 1.0, 24)


@pytest.mark.parametrize("kernel", spaces.KERNELS)
def test_sample_covariance(kernel: str) -> None:
    """Each entry within 4 standard errors, of 20,000 draws; variance 1; seeds differ."""
    field = GaussianField(length_scale=0.3, kernel=kernel, points=24)
    draws = field.sample(np.random.default_rng(0), 20_000)
    wanted = spaces.covariance(kernel, GRID, GRID, 0.3)
    error = np.sqrt((1.0 + wanted**2) / len(draws))
    found = draws.T @ draws / len(draws)
    # Of 300 different entries one in 50 trials leaves 4 standard errors; they are correlated.
    assert np.abs((found - wanted) / error).max() < 4
    assert np.abs(np.diag(found) - 1).max() < 4 * np.sqrt(2 / len(draws))
    other = field.sample(np.random.default_rng(1), 100)
    assert np.abs(np.sum(other * draws[:100]) / np.sum(draws[:100] ** 2)) < 0.2
    np.testing.assert_array_equal(field.sample(np.random.default_rng(0), 5)[0], draws[0])


def test_the_convention_of_the_kernels() -> None:
    x = np.array([0.0, 0.3])
    assert spaces.covariance("rbf", x, x, 0.3)[0, 1] == pytest.approx(np.exp(-0.5))
    assert spaces.covariance("matern12", x, x, 0.3)[0, 1] == pytest.approx(np.exp(-1.0))
    with pytest.raises(ValueError, match="unknown kernel"):
        spaces.covariance("matern52", x, x, 0.3)
    with pytest.raises(ValueError, match="give a positive one"):
        spaces.covariance("rbf", x, x, 0.0)


def test_the_factor_needs_float64() -> None:
    """The default grid: the factor exists with a jitter of 1e-13, and in float32 it does not."""
    field = GaussianField()
    matrix = spaces.covariance("rbf", field.grid, field.grid, 0.2)
    factor = spaces.cholesky_factor("rbf", field.grid, 0.2)
    assert np.abs(factor @ factor.T - matrix).max() < 1e-12
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky((matrix + 1e-13 * np.eye(1000)).astype(np.float32))
    with pytest.raises(ValueError, match="raise the jitter"):
        spaces.cholesky_factor("rbf", np.zeros(3), 0.2, jitter=-1e-3)


def test_karhunen_loeve_eigenpairs() -> None:
    values, functions = spaces.kl_eigenpairs("matern12", GRID, 0.4, 24)
    weights = np.full(24, 1 / 23)
    weights[[0, -1]] /= 2
    np.testing.assert_allclose(functions.T * weights @ functions, np.eye(24), atol=1e-9)
    kernel = (functions * values) @ functions.T
    np.testing.assert_allclose(kernel, spaces.covariance("matern12", GRID, GRID, 0.4), atol=1e-9)
    assert (functions[0] >= 0).all() and values[:-1].min() > 0
    # Known in closed form: w tan(w / 2) = 1 / l gives the first eigenvalue 2 l / (1 + l^2 w^2).
    w = 1.9  # solved below by Newton's method
    for _ in range(50):
        f = w * np.tan(w / 2) - 2.5
        w -= f / (np.tan(w / 2) + 0.5 * w / np.cos(w / 2) ** 2)
    exact = 0.8 / (1 + (0.4 * w) ** 2)
    fine = spaces.kl_eigenpairs("matern12", np.linspace(0, 1, 400), 0.4, 1)[0][0]
    assert fine == pytest.approx(exact, rel=1e-4)


def test_karhunen_loeve_field_has_nearly_unit_variance() -> None:
    space = KarhunenLoeve(length_scale=0.5, modes=12, points=60)
    x = np.linspace(0, 1, 7)
    np.testing.assert_allclose(np.sum(space.basis(x) ** 2, axis=0), 1.0, atol=1e-3)
    features = space.sample(np.random.default_rng(0), 3)
    shared = space.evaluate(features, x)
    own = space.evaluate(features, np.broadcast_to(x, (3, 7)))
    np.testing.assert_allclose(shared, own, atol=1e-12)


@pytest.mark.parametrize("space", [PowerSeries(terms=5, bound=2.0), Chebyshev(terms=5)])
def test_series(space: PowerSeries | Chebyshev) -> None:
    a = space.sample(np.random.default_rng(0), 4)
    assert np.abs(a).max() <= space.bound and a.std() > 0.4 * space.bound
    x = np.random.default_rng(1).uniform(size=(4, 6))
    polynomial = np.polynomial.chebyshev.chebval
    if isinstance(space, PowerSeries):
        polynomial = np.polynomial.polynomial.polyval
    z = x if isinstance(space, PowerSeries) else 2 * x - 1
    wanted = np.stack([polynomial(row, c) for row, c in zip(z, a, strict=True)])
    np.testing.assert_allclose(space.evaluate(a, x), wanted, atol=1e-12)
    np.testing.assert_allclose(space.evaluate(a, x[0])[0], wanted[0], atol=1e-12)


def test_interpolation_is_exact_for_its_polynomials() -> None:
    """A not-a-knot spline reproduces cubics, its derivative theirs; lines reproduce lines."""
    x = np.random.default_rng(0).uniform(size=(2, 30))
    cubics = np.stack([GRID**3 - GRID, 2 - GRID**2])
    exact = np.stack([x[0] ** 3 - x[0], 2 - x[1] ** 2])
    np.testing.assert_allclose(interpolate(GRID, cubics, x), exact, atol=1e-13)
    slope = np.stack([3 * x[0] ** 2 - 1, -2 * x[1]])
    np.testing.assert_allclose(interpolant(GRID, cubics).derivative()(x), slope, atol=1e-11)
    lines = np.stack([GRID, 1 - 3 * GRID])
    found = interpolate(GRID, lines, x[0], "linear")
    np.testing.assert_allclose(found, np.stack([x[0], 1 - 3 * x[0]]), atol=1e-13)
    found = hermite(GRID, cubics, np.stack([3 * GRID**2 - 1, -2 * GRID]), x)
    np.testing.assert_allclose(found, exact, atol=1e-13)
    ends = interpolate(GRID, cubics, np.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, cubics[:, [0, -1]], atol=1e-13)


def test_nothing_is_extrapolated() -> None:
    with pytest.raises(ValueError, match="draw the functions on a longer interval"):
        interpolate(GRID, GRID[None], np.array([0.5, 1.01]))
    with pytest.raises(ValueError, match="choose cubic or linear"):
        interpolate(GRID, GRID[None], GRID, "quintic")
    with pytest.raises(ValueError, match="3 values do not fit 24 knots"):
        interpolate(GRID, np.zeros((1, 3)), GRID)
