"""The prior over curves, its sampler, the normaliser, and the posteriors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.approximation.lc_pfn import prior
from research.approximation.lc_pfn.normalizer import Normalizer
from research.approximation.lc_pfn.posterior import (
    COORDINATES,
    DIMENSIONS,
    importance_posterior,
    log_posterior,
    mcmc_posterior,
)
from research.approximation.lc_pfn.prior import (
    NOISE_LOG_MEAN,
    PARAMETERS,
    LogNormal,
    accepted,
    draw_parameters,
    evaluate,
    sample_prior,
)

pytestmark = pytest.mark.slow  # a minute in all: it runs with the slow tier

X = jnp.arange(1, 101, dtype=jnp.float32)


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)


@pytest.mark.parametrize("kind", ["peaked", "uniform"])
def test_accepted_curves_rise_within_the_unit_interval(kind: str):
    drawn = sample_prior(key(), 3000, kind=kind)
    clean = np.asarray(drawn.clean)
    assert clean.shape == drawn.noisy.shape == (3000, 100) and drawn.sigma.shape == (3000,)
    assert (clean >= 0).all() and (clean <= 1).all() and (clean[:, -1] > clean[:, 0]).all()
    # Noise is neither clipped nor rejected, has the curve's standard deviation, and is independent.
    noise = (np.asarray(drawn.noisy) - clean) / np.asarray(drawn.sigma)[:, None]
    assert (np.asarray(drawn.noisy) > 1).any() and (np.asarray(drawn.noisy) < 0).any()
    assert stats.kstest(noise[:, ::7].ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01
    assert stats.kstest((np.log(drawn.sigma) - NOISE_LOG_MEAN), "norm").pvalue > 1e-3


@pytest.mark.parametrize("kind", ["peaked", "uniform"])
def test_rejection_leaves_the_law_as_it_is(kind: str):
    """Against plain rejection in one go, at which no candidate is passed over for its ends."""
    values = evaluate(draw_parameters(key(1), 40_000, kind=kind), X)
    plain = np.asarray(values)[np.asarray(accepted(values))]
    drawn = np.asarray(sample_prior(key(2), 5000, kind=kind).clean)
    for epoch in (0, 1, 9, 99):
        assert stats.ks_2samp(plain[:, epoch], drawn[:, epoch]).pvalue > 1e-3, epoch
    gains = [curves[:, -1] - curves[:, 0] for curves in (plain, drawn)]
    assert stats.ks_2samp(*gains).pvalue > 1e-3


def test_the_sampler_goes_on_until_it_has_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prior, "CANDIDATES", 1)
    monkeypatch.setattr(prior, "SURVIVORS", 1)
    few = prior.sample_prior.__wrapped__(key(), 50)
    clean = np.asarray(few.clean)
    assert np.asarray(accepted(few.clean)).all() and len(np.unique(clean[:, 0])) == 50
    plain = np.asarray(sample_prior(key(9), 2000).clean)
    assert stats.ks_2samp(plain[:, 20], clean[:, 20]).pvalue > 1e-3


def test_the_same_key_gives_the_same_curves_and_no_two_are_alike():
    one, two = sample_prior(key(3), 64), sample_prior(key(3), 64)
    np.testing.assert_array_equal(one.noisy, two.noisy)
    assert len(np.unique(np.asarray(one.clean)[:, 0])) == 64
    assert not np.allclose(one.clean, sample_prior(key(4), 64).clean)


def test_weights_are_not_normalised():
    drawn = draw_parameters(key(), 5000)
    weights = np.stack([drawn[f"{family}.weight"] for family in prior.PRIOR_FAMILIES])
    assert all(stats.kstest(w, "uniform").pvalue > 1e-3 for w in weights)
    assert weights.sum(0).max() > 2 and abs(np.corrcoef(weights)[0, 1]) < 0.05


@pytest.mark.parametrize("kind", ["peaked", "uniform"])
def test_parameters_have_their_laws(kind: str):
    drawn = draw_parameters(key(5), 4000, kind=kind)
    for family, laws in PARAMETERS[kind].items():
        for name, law in laws.items():
            values = np.asarray(drawn[f"{family}.{name}"])
            if isinstance(law, LogNormal):
                expected = stats.norm(law.mean, law.std)
                values = np.log(values)
            else:
                expected = stats.uniform(law.low, law.high - law.low)
            assert stats.kstest(values, expected.cdf).pvalue > 1e-3, (family, name)


def test_the_sum_of_families():
    drawn = draw_parameters(key(6), 3)
    one = {name: float(value[1]) for name, value in drawn.items()}
    x = np.arange(1.0, 101.0)
    expected = (
        one["pow3.weight"] * (one["pow3.c"] - one["pow3.a"] * x ** -one["pow3.alpha"])
        + one["ilog2.weight"] * (one["ilog2.c"] - one["ilog2.a"] / np.log(x + 1))
        + one["janoschek.weight"]
        * (
            one["janoschek.a"]
            - (one["janoschek.a"] - one["janoschek.beta"])
            * np.exp(-one["janoschek.k"] * x ** one["janoschek.delta"])
        )
    )
    np.testing.assert_allclose(evaluate(drawn, X)[1], expected, rtol=1e-4, atol=1e-5)
    only = sample_prior(key(7), 20, families=("ilog2",))
    assert np.asarray(accepted(only.clean)).all()


def test_what_is_accepted():
    rising = jnp.linspace(0.1, 0.9, 5)
    bad = jnp.stack([rising, rising[::-1], rising.at[2].set(1.01), rising.at[2].set(-0.01)])
    assert accepted(bad).tolist() == [True, False, False, False]
    assert not accepted(rising.at[2].set(jnp.nan)[None])[0]
    assert not accepted(jnp.full((1, 5), 0.5))[0]


def test_unknown_priors():
    with pytest.raises(ValueError, match="choose peaked or uniform"):
        sample_prior(key(), 4, kind="flat")
    with pytest.raises(ValueError, match=r"no laws for families \['vap'\]"):
        sample_prior(key(), 4, families=("pow3", "vap"))
    with pytest.raises(ValueError, match="at least one"):
        sample_prior(key(), 4, families=())


BOUNDS = [
    (0.0, 1.0, 0.0, 1.0),
    (-np.inf, np.inf, -1.0, 2.0),
    (-np.inf, 5.0, 0.0, 3.0),
    (0.0, np.inf, 0.0, 2.3),
    (0.2, 1.4, 0.3, 1.0),
]


@pytest.mark.parametrize(("bounds", "minimize"), list(itertools.product(BOUNDS, [False, True])))
def test_the_normaliser_and_its_inverse(bounds: tuple[float, ...], minimize: bool):
    normalizer = Normalizer(*bounds, minimize=minimize)
    lb, ub, soft_lb, soft_ub = bounds
    low, high = max(lb, soft_lb - 5), min(ub, soft_ub + 5)
    values = np.linspace(low, high, 101)
    units = normalizer(values)
    assert (np.diff(units) * (-1 if minimize else 1) > 0).all()
    np.testing.assert_allclose(normalizer.inverse(units), values, rtol=1e-6, atol=1e-9)
    ends = [1.0, 0.0] if minimize else [0.0, 1.0]
    np.testing.assert_allclose(normalizer(np.array([lb, ub])), ends, atol=1e-12)
    np.testing.assert_allclose(normalizer.inverse(np.array(ends)), [lb, ub])
    beyond = normalizer.inverse(np.array([-0.3, 1.2]))
    np.testing.assert_allclose(beyond, [ub, lb] if minimize else [lb, ub])
    assert np.isnan(normalizer(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    "bounds", [(0, 1, 1, 0.5), (0, 1, -1, 1), (0, 1, 0, 2), (-np.inf, 1, -np.inf, 1), (0, 1, 1, 1)]
)
def test_bounds_out_of_order(bounds):
    with pytest.raises(ValueError, match="not in the order"):
        Normalizer(*(float(b) for b in bounds))


def test_values_beyond_hard_bounds():
    with pytest.raises(ValueError, match=r"from -0\.5 to 2 go beyond"):
        Normalizer(0.0, 1.0, 0.0, 1.0)(np.array([-0.5, 2.0, np.nan]))


def test_importance_sampling_of_a_normal_case():
    """Without data the posterior is the prior; a point without noise almost decides its epoch."""
    context = np.array([[0.5, np.nan], [0.5, 0.55]])
    truth = np.full((2, 2), 0.55)
    levels = (0.1, 0.5, 0.9)
    found = importance_posterior(key(), context, (2, 100), levels, truth, draws=40_000)
    again = importance_posterior(key(), context, (2, 100), levels, draws=40_000)
    np.testing.assert_array_equal(found.mean, again.mean)
    assert again.log_density is None and found.log_density is not None
    assert (found.ess > 50).all() and found.ess[0] > found.ess[1]
    assert (np.diff(found.quantiles, axis=-1) > 0).all()
    # Weighted draws by hand.
    drawn = [sample_prior(jax.random.fold_in(key(), i), 20_000) for i in range(2)]
    clean, sigma = (np.concatenate([getattr(d, n) for d in drawn]) for n in ("clean", "sigma"))
    likelihood = stats.norm.pdf(0.5, clean[:, 0], sigma) * stats.norm.pdf(0.55, clean[:, 1], sigma)
    weight = likelihood / likelihood.sum()
    assert found.mean[1, 1] == pytest.approx(weight @ clean[:, 99], rel=1e-4)
    density = stats.norm.pdf(0.55, clean[:, 99], sigma)
    assert found.log_density[1, 1] == pytest.approx(np.log(weight @ density), rel=1e-4)
    assert found.ess[1] == pytest.approx(1 / (weight**2).sum(), rel=1e-3)


def test_posteriors_refuse_bad_contexts():
    good = np.array([[0.5, 0.6]])
    for sampler in (importance_posterior, mcmc_posterior):
        for context in (np.array([[np.nan, 0.5]]), np.full((1, 2), np.nan), np.zeros((1, 101))):
            with pytest.raises(ValueError, match="without a gap"):
                sampler(key(), context, (10,), (0.5,))
        for targets in ((), (0,), (101,)):
            with pytest.raises(ValueError, match="must be epochs"):
                sampler(key(), good, targets, (0.5,))
    with pytest.raises(ValueError, match="26, twice"):
        mcmc_posterior(key(), good, (10,), (0.5,), walkers=20)
    with pytest.raises(ValueError, match="burn-in"):
        mcmc_posterior(key(), good, (10,), (0.5,), steps=10, burn_in=10)


def test_log_posterior_is_prior_times_likelihood():
    drawn = draw_parameters(key(8), 200)
    columns = [
        np.log(drawn[name]) if isinstance(law, LogNormal) else drawn[name]
        for name, law in COORDINATES
    ]
    state = np.stack([*columns, np.linspace(-6, -2, 200)], 1).astype(np.float32)
    assert DIMENSIONS == state.shape[1] == 13
    context = np.array([0.4, 0.5, np.nan])
    found = np.asarray(log_posterior(jnp.asarray(state), jnp.asarray(context, jnp.float32), 100))
    clean = np.asarray(evaluate(drawn, X))
    good = np.asarray(accepted(jnp.asarray(clean)))
    assert 10 < good.sum() < 100 and np.isneginf(found[~good]).all()
    expected = stats.norm(NOISE_LOG_MEAN, 1).logpdf(state[:, -1])
    for i, (_, law) in enumerate(COORDINATES):
        if isinstance(law, LogNormal):
            expected = expected + stats.norm(law.mean, law.std).logpdf(state[:, i])
    sigma = np.exp(state[:, -1])
    expected = expected + stats.norm.logpdf(0.4, clean[:, 0], sigma)
    expected = (expected + stats.norm.logpdf(0.5, clean[:, 1], sigma))[good]
    difference = expected - found[good]
    np.testing.assert_allclose(difference, difference[0], rtol=1e-3, atol=2e-3)
    outside = jnp.asarray(state).at[:, 0].set(1.5)
    assert np.isneginf(log_posterior(outside, jnp.asarray(context, jnp.float32), 100)).all()


def test_chains_come_near_importance_sampling():
    context = np.array([[0.3, 0.42, 0.45, 0.52, 0.5]])
    levels, targets = (0.1, 0.5, 0.9), (6, 100)
    exact = importance_posterior(key(), context, targets, levels, draws=200_000)
    chain = mcmc_posterior(key(1), context, targets, levels, np.full((1, 2), 0.5), steps=600)
    assert exact.ess[0] > 200 and chain.log_density is not None
    assert (np.abs(chain.quantiles[..., 1] - exact.quantiles[..., 1]) < 0.3 * exact.std).all()
    assert (chain.std < 2 * exact.std).all() and (chain.std > 0.7 * exact.std).all()
