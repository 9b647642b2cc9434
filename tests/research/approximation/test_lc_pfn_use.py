"""Using a trained LC-PFN: predictions, stopping rules, replays and the simple baselines."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models import lc_pfn
from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn import predict as predict_module
from research.approximation.lc_pfn.baselines import (
    joint_normal,
    last_value,
    normal_log_density,
    prior_marginal,
)
from research.approximation.lc_pfn.normalizer import Normalizer
from research.approximation.lc_pfn.predict import predict, predict_logits
from research.approximation.lc_pfn.prior import sample_prior
from research.approximation.lc_pfn.stopping import replay, should_stop, thresholds

pytestmark = pytest.mark.slow  # a minute in all: it runs with the slow tier

CFG = lc_pfn.Config(width=16, layers=2, heads=2, ffn=32, buckets=40, seq_len=20, dropout=0.0)
EPOCHS = np.arange(1.0, 7.0)
VALUES = np.array([0.2, 0.3, 0.38, 0.44, 0.47, 0.5])
LOSS = Normalizer(0.0, np.inf, 0.0, 3.0, minimize=True)


@pytest.fixture(scope="module")
def model() -> LCPFN:
    """Random weights: that they predict badly does not matter here."""
    leaves, tree = jax.tree.flatten(lc_pfn.specs(CFG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.4 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    drawn = sample_prior(jax.random.key(0), 500, seq_len=20).noisy
    borders = jnp.asarray(bar.fit_borders(drawn, 40))
    return LCPFN(jax.tree.unflatten(tree, values), borders, CFG)


def test_a_prediction_is_the_networks(model: LCPFN):
    query = np.array([7.0, 20.0, 9.5])
    found = predict(model, EPOCHS, VALUES, query, levels=(0.9, 0.1))
    x = jnp.asarray(np.concatenate([EPOCHS, query])[None], jnp.float32)
    y = jnp.asarray(np.concatenate([VALUES, np.full(3, np.nan)])[None], jnp.float32)
    logits = lc_pfn.forward(model.params, CFG, x, y, jnp.array([6]))[0, 6:]
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    levels = jnp.array([0.1, 0.9], jnp.float32)
    assert found.levels == (0.1, 0.9) and found.epochs.tolist() == query.tolist()
    np.testing.assert_allclose(
        found.quantiles, bar.icdf(model.borders, logits, levels).T, atol=1e-4
    )
    np.testing.assert_allclose(found.median, bar.median(model.borders, logits), atol=1e-4)
    np.testing.assert_allclose(found.mean, bar.mean(model.borders, logits), atol=1e-4)
    below = bar.cdf(model.borders, logits, jnp.full(3, 0.6), exact_tails=True)
    np.testing.assert_allclose(found.probability_better(0.6), 1 - below, atol=1e-4)


def test_a_query_needs_no_order_and_no_company(model: LCPFN):
    both = predict(model, EPOCHS, VALUES, [8, 15])
    alone = predict(model, EPOCHS, VALUES, [15])
    np.testing.assert_allclose(both.quantiles[:, 1:], alone.quantiles, atol=1e-4)
    some = predict(model, EPOCHS[[0, 2, 5]], VALUES[[0, 2, 5]], [15])
    assert np.abs(some.median - alone.median).max() > 1e-4
    many = predict(model, EPOCHS, VALUES, np.linspace(1, 20, 50))
    np.testing.assert_allclose(
        many.median[-1:], predict(model, EPOCHS, VALUES, [20]).median, atol=1e-4
    )


def test_losses_come_back_in_their_units(model: LCPFN):
    losses = 2.5 * np.exp(-0.2 * EPOCHS) + 0.3
    query = [10, 20]
    found = predict(model, EPOCHS, losses, query, levels=(0.05, 0.5, 0.95), normalizer=LOSS)
    assert (np.diff(found.quantiles, axis=0) > 0).all()
    units = predict(model, EPOCHS, LOSS(losses), query, levels=(0.05, 0.95))
    np.testing.assert_allclose(found.quantiles[0], LOSS.inverse(units.quantiles[1]), rtol=1e-3)
    np.testing.assert_allclose(found.quantiles[2], LOSS.inverse(units.quantiles[0]), rtol=1e-3)
    np.testing.assert_allclose(found.median, found.quantiles[1], rtol=1e-5)
    np.testing.assert_allclose(found.mean, LOSS.inverse(units.mean), rtol=1e-3)
    better = units.probability_better(float(LOSS(np.array(0.8))))
    np.testing.assert_allclose(found.probability_better(0.8), better, atol=1e-4)


def test_exact_tails_reach_beyond_the_borders(model: LCPFN):
    tilted = dataclasses.replace(
        model, params=jax.tree.map(lambda x: x, model.params).replace(out=_tilted(model))
    )
    plain, exact = (
        predict(tilted, EPOCHS, VALUES, [9], levels=(0.99,), exact_tails=e) for e in (False, True)
    )
    assert plain.quantiles[0] <= model.borders[-1] < exact.quantiles[0]


def _tilted(model: LCPFN):
    """An output layer that always prefers the last bin."""
    out = model.params.out
    return out.replace(b=out.b.at[-1].add(50.0))


def test_predictions_share_one_program(model: LCPFN):
    before = predict_module._summarise._cache_size()
    for count in (1, 3, 6):
        predict(model, EPOCHS[:count], VALUES[:count], np.arange(count + 1, 21), levels=(0.2,))
    assert predict_module._summarise._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": VALUES[:3]}, "6 epochs do not go with 3 values"),
        ({"values": [*VALUES[:5], np.nan]}, "NaN"),
        ({"values": [*VALUES[:5], 1.7]}, r"to 1\.7 are not accuracies"),
        ({"epochs": EPOCHS[::-1]}, "must rise"),
        ({"epochs": [1, 2, 2, 3, 4, 5]}, "must rise"),
        ({"epochs": EPOCHS - 1}, "from 1 on"),
        ({"epochs": [1, 2, 3, 4, np.nan, 6]}, "from 1 on"),
        ({"epochs": EPOCHS * 4}, "reach 24 but the model was trained on curves of 20"),
        ({"epochs": [], "values": []}, "at least one"),
        ({"query": [21]}, "query epochs reach 21"),
        ({"query": []}, "query epochs must be"),
        ({"levels": (0.5, 1.0)}, "between 0 and 1"),
        ({"levels": ()}, "between 0 and 1"),
        ({"normalizer": Normalizer(0.0, 0.4, 0.0, 0.4)}, "beyond the normaliser's bounds"),
    ],
)
def test_curves_that_cannot_be_predicted(model: LCPFN, change, message):
    given = {"epochs": EPOCHS, "values": VALUES, "query": [10], **change}
    with pytest.raises(ValueError, match=message):
        predict(model, **given)


def curves(runs: int = 6) -> np.ndarray:
    """Noisy curves (runs, 20) within [0, 1]."""
    drawn = np.asarray(sample_prior(jax.random.key(5), runs, seq_len=20).noisy)
    return np.clip(drawn, 0, 1).astype(np.float64)


@pytest.mark.parametrize(
    ("rule", "normalizer"), list(itertools.product(("any", "final"), (None, LOSS))), ids=str
)
def test_stopping_is_the_probability_of_better_values(model: LCPFN, rule, normalizer):
    values = VALUES if normalizer is None else 2.5 * np.exp(-0.2 * EPOCHS) + 0.3
    later = [20] if rule == "final" else np.arange(7, 21)
    prediction = predict(model, EPOCHS, values, later, normalizer=normalizer)
    best = float(values[-1])
    chance = float(prediction.probability_better(best).max())
    assert 0 < chance < 1
    for confidence, expected in ((1 - chance - 1e-3, True), (1 - chance + 1e-3, False)):
        found = should_stop(model, values, best, 20, confidence, rule, normalizer)
        assert found == expected


@pytest.mark.parametrize("rule", ["any", "final"])
def test_thresholds_say_when_to_stop(model: LCPFN, rule: str):
    runs = curves(3)
    limits = thresholds(model, runs, 0.9, rule)
    assert limits.shape == runs.shape and np.isneginf(limits[:, -1]).all()
    for run, epoch in ((0, 0), (1, 6), (2, 18)):
        seen, limit = runs[run, : epoch + 1], limits[run, epoch]
        assert should_stop(model, seen, float(limit) + 1e-3, 20, 0.9, rule)
        assert not should_stop(model, seen, float(limit) - 1e-3, 20, 0.9, rule)


def test_diverged_runs_end(model: LCPFN):
    runs = curves(2)
    runs[1, 5:] = np.nan
    limits = thresholds(model, runs)
    whole = thresholds(model, curves(2))
    np.testing.assert_allclose(limits[1, :5], whole[1, :5], atol=1e-4)
    assert np.isneginf(limits[1, 5:]).all()
    assert replay(runs, [0, 1]).stopped_at.tolist() == [20, 6]


def test_bad_settings_of_rules(model: LCPFN):
    with pytest.raises(ValueError, match="unknown rule"):
        should_stop(model, VALUES, 0.5, 20, rule="all")
    with pytest.raises(ValueError, match="confidence"):
        thresholds(model, curves(2), 1.0)
    with pytest.raises(ValueError, match="nothing is left"):
        should_stop(model, VALUES, 0.5, 6)
    with pytest.raises(ValueError, match="longer than the model's 20"):
        thresholds(model, np.zeros((2, 21)))
    with pytest.raises(ValueError, match="not accuracies"):
        thresholds(model, curves(2) + 1)
    with pytest.raises(ValueError, match="each of 2 runs once"):
        replay(curves(2), [0, 0])
    with pytest.raises(ValueError, match="patience"):
        replay(curves(2), [0, 1], patience=0)


def test_replays_by_hand():
    runs = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.15, 0.9], [0.5, 0.45, 0.4, 0.3]])
    whole = replay(runs, [2, 0, 1])
    assert whole.epochs == 12 and whole.regret == 0
    patient = replay(runs, [0, 1, 2], patience=2)
    assert patient.stopped_at.tolist() == [4, 3, 3] and patient.regret == pytest.approx(0.4)
    limits = np.array(
        [[0.5, 0.5, 0.5, -np.inf], [0.4, 0.6, 0.5, -np.inf], [0.55, 0.5, 0.4, -np.inf]]
    )
    # Run 0 goes to its end (0.4 is the best), which is the limit of run 1 after one epoch; run 2
    # raises the best to 0.5 and reaches its limit after two.
    stopped = replay(runs, [0, 1, 2], limits)
    assert stopped.stopped_at.tolist() == [4, 1, 2] and stopped.epochs == 7
    assert stopped.regret == pytest.approx(0.4)
    assert replay(runs, [2, 0, 1], limits).stopped_at.tolist() == [1, 1, 2]


def test_the_last_value_baseline():
    train = np.array([[0.0, 0.1, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2]])
    test = np.array([[0.5, 0.6, 0.9, 0.9]])
    mean, std = last_value(train, test, 2)
    change = np.array([0.2, 0.3, 0.0, 0.0])
    np.testing.assert_allclose(mean, [[0.6 + change.mean()] * 2])
    np.testing.assert_allclose(std, [[change.std()] * 2])


def test_marginal_and_joint_baselines():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(5, 5)) + np.eye(5)
    train = rng.normal(size=(200_000, 5)) @ factor.T
    test = train[:3]
    mean, std = prior_marginal(train, test, 2)
    np.testing.assert_allclose(std[0], np.sqrt(np.diag(factor @ factor.T))[2:], rtol=0.02)
    assert np.abs(mean).max() < 0.05
    covariance = factor @ factor.T
    gain = covariance[2:, :2] @ np.linalg.inv(covariance[:2, :2])
    mean, std = joint_normal(train, test, 2)
    np.testing.assert_allclose(mean, test[:, :2] @ gain.T, atol=0.05)
    left = covariance[2:, 2:] - gain @ covariance[:2, 2:]
    np.testing.assert_allclose(std[0], np.sqrt(np.diag(left)), rtol=0.02)
    density = normal_log_density((mean, std), test[:, 2:])
    np.testing.assert_allclose(density, stats.norm.logpdf(test[:, 2:], mean, std))


def test_many_curves_at_once(model: LCPFN):
    x = jnp.tile(jnp.arange(1.0, 21.0)[None], (4, 1))
    y = jnp.asarray(curves(4), jnp.float32)
    logits = predict_logits(model, x, y, jnp.array([3, 6, 9, 19]))
    found = predict(model, np.arange(1, 10), curves(4)[2, :9], [15])
    np.testing.assert_allclose(logits[2, 14:15], found.logits, atol=1e-4)
