"""The binned density against numpy integrals, at its edges, and through gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ops import bar_distribution as bar

BORDERS = jnp.array([-1.0, -0.5, 0.1, 0.4, 2.0], jnp.float32)
LOGITS = jnp.array([[0.3, -1.0, 2.0, 0.5], [1.0, 1.0, -3.0, 0.0]], jnp.float32)


def density(row: int, full_support: bool = True):
    """The density of one row as a float function."""
    logits = LOGITS[row]
    return lambda y: float(
        jnp.exp(bar.log_prob(BORDERS, logits, jnp.asarray(y, jnp.float32), full_support))
    )


def integral(function, low: float, high: float) -> float:
    """Over a range, panel by panel between borders, where the density is smooth."""
    inside = [float(b) for b in BORDERS if low < b < high]
    ends = [low, *inside, high]
    return sum(
        integrate.fixed_quad(np.vectorize(function), a, b, n=20)[0]
        for a, b in itertools.pairwise(ends)
    )


def test_borders_hold_equal_shares():
    values = np.random.default_rng(0).permutation(1003).astype(np.float32)
    borders = bar.fit_borders(values.reshape(17, 59), 20)
    used = values[:1000]  # the remainder is dropped from the end
    counts = np.bincount(np.asarray(bar.bucket_index(jnp.asarray(borders), jnp.asarray(used))))
    assert (counts == 50).all()
    assert borders[0] == used.min() and borders[-1] == used.max()


def test_ties_move_single_values():
    values = np.round(np.random.default_rng(1).normal(size=20_000), 3).astype(np.float32)
    borders = bar.fit_borders(values, 20)
    counts = np.bincount(np.asarray(bar.bucket_index(jnp.asarray(borders), jnp.asarray(values))))
    assert counts.sum() == 20_000 and np.abs(counts - 1000).max() < 20


@pytest.mark.parametrize(
    ("values", "buckets", "message"),
    [
        ([1.0, 2.0, 3.0], 1, "at least 2"),
        ([1.0, 2.0, 3.0], 4, "3 values"),
        ([1.0, np.nan, 3.0], 2, "finite"),
        ([1.0, 1.0, 1.0, 1.0], 2, "no width"),
    ],
)
def test_bad_values_for_borders(values, buckets, message):
    with pytest.raises(ValueError, match=message):
        bar.fit_borders(np.array(values, np.float32), buckets)


def test_logits_of_another_size_are_refused():
    with pytest.raises(ValueError, match="5 borders do not bound 3 bins"):
        bar.mean(BORDERS, LOGITS[:, :3])


def test_values_on_and_beyond_borders():
    y = jnp.array([-3.0, -1.0, -0.5, -0.49, 0.4, 2.0, 9.0], jnp.float32)
    assert bar.bucket_index(BORDERS, y).tolist() == [0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("row", [0, 1])
def test_the_density_integrates_to_one(row: int):
    assert integral(density(row), -6.0, 12.0) == pytest.approx(1.0, abs=1e-4)
    assert integral(density(row, False), -1.0, 2.0) == pytest.approx(1.0, abs=1e-5)
    assert density(row, False)(-1.01) == density(row, False)(2.01) == 0.0


@pytest.mark.parametrize("row", [0, 1])
def test_half_of_an_end_bin_lies_beyond_its_border(row: int):
    mass = np.asarray(jax.nn.softmax(LOGITS[row]))
    assert integral(density(row), -8.0, -1.0) == pytest.approx(mass[0] / 2, abs=1e-5)
    assert integral(density(row), 2.0, 14.0) == pytest.approx(mass[-1] / 2, abs=1e-4)


def test_half_normals_are_scipys():
    scale = 0.5 / stats.halfnorm.ppf(0.5)
    expected = stats.halfnorm.logpdf(np.array([0.2, 1.7]), scale=scale)
    logits = jnp.array([[50.0, 0.0, 0.0, 0.0]] * 2, jnp.float32)
    found = bar.log_prob(BORDERS, logits, jnp.array([-0.7, -2.2], jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("full_support", [True, False])
@pytest.mark.parametrize("row", [0, 1])
def test_moments_are_integrals(row: int, full_support: bool):
    p, ends = density(row, full_support), (-8.0, 14.0) if full_support else (-1.0, 2.0)
    mean = integral(lambda y: y * p(y), *ends)
    assert float(bar.mean(BORDERS, LOGITS, full_support)[row]) == pytest.approx(mean, abs=1e-4)
    if not full_support:
        variance = integral(lambda y: (y - mean) ** 2 * p(y), *ends)
        assert float(bar.variance(BORDERS, LOGITS)[row]) == pytest.approx(variance, rel=1e-4)


def test_variance_of_a_narrow_law_keeps_its_digits():
    borders = jnp.array([0.0, 0.9, 0.9001, 1.0], jnp.float32)
    logits = jnp.array([[-60.0, 0.0, -60.0]], jnp.float32)
    width = float(borders[2] - borders[1])
    np.testing.assert_allclose(bar.variance(borders, logits), [width**2 / 12], rtol=1e-3)


@pytest.mark.parametrize("exact_tails", [True, False])
def test_quantiles_invert_the_distribution_function(exact_tails: bool):
    levels = jnp.linspace(0.001, 0.999, 331, dtype=jnp.float32)
    y = bar.icdf(BORDERS, LOGITS, levels, exact_tails)
    assert (jnp.diff(y) > 0).all()
    logits = jnp.broadcast_to(LOGITS[:, None], (2, 331, 4))
    back = bar.cdf(BORDERS, logits, y, exact_tails)
    np.testing.assert_allclose(back, np.tile(levels, (2, 1)), atol=2e-6)
    assert bool((y < BORDERS[0]).any()) == bool((y > BORDERS[-1]).any()) == exact_tails


def test_the_distribution_function_is_an_integral():
    for y in (-1.5, -0.7, 0.2, 0.39, 1.0, 3.0):
        found = bar.cdf(BORDERS, LOGITS[:1], jnp.array([y], jnp.float32), exact_tails=True)
        assert float(found[0]) == pytest.approx(integral(density(0), -8.0, y), abs=1e-4)
    ends = bar.cdf(BORDERS, LOGITS[:1].repeat(2, 0), jnp.array([-1.5, 3.0], jnp.float32))
    np.testing.assert_allclose(ends, [0.0, 1.0], atol=1e-6)


def test_levels_at_the_ends_and_bins_without_mass():
    levels = jnp.array([0.0, 1.0], jnp.float32)
    np.testing.assert_allclose(bar.icdf(BORDERS, LOGITS, levels), [[-1.0, 2.0]] * 2, rtol=1e-6)
    empty = jnp.array([[-jnp.inf, 0.0, 0.0, -jnp.inf]], jnp.float32)
    found = bar.icdf(BORDERS, empty, jnp.array([0.25, 0.5, 0.75], jnp.float32))
    np.testing.assert_allclose(found, [[-0.2, 0.1, 0.25]], atol=1e-6)


def test_quantile_is_a_central_interval():
    interval = bar.quantile(BORDERS, LOGITS, center_prob=0.8)
    levels = jnp.array([0.1, 0.9], jnp.float32)
    np.testing.assert_allclose(interval, bar.icdf(BORDERS, LOGITS, levels), rtol=1e-5)
    median = bar.median(BORDERS, LOGITS)
    assert ((interval[:, 0] < median) & (median < interval[:, 1])).all()


def test_improvement():
    best = jnp.array([0.4, 0.25], jnp.float32)
    p = np.asarray(jax.nn.softmax(LOGITS))
    np.testing.assert_allclose(
        bar.expected_improvement(BORDERS, LOGITS, best),
        [p[0, 3] * 0.8, p[1, 3] * 0.95 + p[1, 2] * 0.075],  # the last is too much by a factor of 2
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        bar.probability_of_improvement(BORDERS, LOGITS, best),
        [p[0, 3], p[1, 3] + p[1, 2] / 2],
        rtol=1e-5,
    )
    below = bar.cdf(BORDERS, LOGITS, best)
    found = bar.probability_of_improvement(BORDERS, LOGITS, best)
    np.testing.assert_allclose(found, 1 - below, rtol=1e-5)


@pytest.mark.parametrize("full_support", [True, False])
def test_gradients_are_finite_and_right(full_support: bool):
    y = jnp.array([-0.95, -0.5, 0.2, 0.4, 2.0], jnp.float32)
    logits = jnp.tile(LOGITS[:1], (5, 1))

    def loss(logits: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(bar.log_prob(BORDERS, logits, y, full_support))

    by_logits, by_y = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, y)
    one_hot = jax.nn.one_hot(bar.bucket_index(BORDERS, y), 4)
    np.testing.assert_allclose(by_logits, one_hot - jax.nn.softmax(logits), atol=1e-6)
    assert np.isfinite(by_y).all() and by_y[2] == 0
    far = jax.grad(loss, argnums=(0, 1))(logits[:2], jnp.array([-50.0, 70.0], jnp.float32))
    assert all(np.isfinite(g).all() for g in far)
