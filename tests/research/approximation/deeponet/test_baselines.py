"""The baselines solve what they can solve exactly."""

import numpy as np
import pytest

from research.approximation.deeponet import baselines
from research.approximation.deeponet.data import Aligned

RNG = np.random.default_rng(0)


def test_the_trapezoid_rule_integrates_lines_exactly() -> None:
    sensors = np.linspace(0, 2, 7)
    y = RNG.uniform(0, 2, (2, 5))
    u = np.stack([sensors, 1 - 3 * sensors])
    exact = np.stack([y[0] ** 2 / 2, y[1] - 1.5 * y[1] ** 2])
    np.testing.assert_allclose(baselines.trapezoid(sensors, u, y), exact, atol=1e-12)
    kink = np.abs(sensors - 1.0)[None]  # its corner is a sensor
    np.testing.assert_allclose(baselines.trapezoid(sensors, kink, np.array([[1.5]])), 0.625)


def test_ridge_finds_a_linear_map_and_takes_its_penalty_from_held_out_functions() -> None:
    u, weights = RNG.normal(size=(60, 8)), RNG.normal(size=(8, 3))
    s = 2.0 + u @ weights
    found = baselines.ridge(u, s)
    new = RNG.normal(size=(5, 8))
    np.testing.assert_allclose(found(new), 2.0 + new @ weights, atol=1e-6)
    assert found.penalty == baselines.PENALTIES[0]
    noisy = baselines.ridge(RNG.normal(size=(12, 8)), RNG.normal(size=(12, 3)))
    assert noisy.penalty >= 0.1
    with pytest.raises(ValueError, match="too few for ridge"):
        baselines.ridge(u[:9], s[:9])


def test_pod_ridge_is_ridge_when_it_keeps_every_mode() -> None:
    u = RNG.normal(size=(40, 6))
    s = u @ RNG.normal(size=(6, 4)) @ RNG.normal(size=(4, 9))
    found = baselines.pod_ridge(u, s, modes=4)
    np.testing.assert_allclose(found(u), s, atol=1e-6)
    assert np.abs(baselines.pod_ridge(u, s, modes=3)(u) - s).max() > 1e-2


@pytest.mark.parametrize("linear", [True, False])
def test_kernel_ridge_learns_an_integral(linear: bool) -> None:
    """From 150 triples of random parabolas; only the linear one extrapolates to larger ones."""
    sensors = np.linspace(0, 1, 9)

    def triples(n: int, size: float) -> Aligned:
        a, y = size * RNG.normal(size=(n, 3)), RNG.uniform(size=(n, 1))
        u = a @ sensors[None] ** np.arange(3)[:, None]
        s = np.sum(a * y ** np.arange(1, 4) / np.arange(1, 4), axis=1)
        return Aligned(u, y, s)

    found = baselines.kernel_ridge(triples(150, 1.0), linear)
    test = triples(50, 1.0)
    assert np.sqrt(np.mean(np.square(found(test) - test.s))) < (1e-3 if linear else 5e-2)
    far = triples(50, 10.0)
    error = np.sqrt(np.mean(np.square(found(far) - far.s)))
    assert error < 1e-2 if linear else error > 0.1
    np.testing.assert_allclose(found(test, rows=7), found(test), atol=1e-9)
