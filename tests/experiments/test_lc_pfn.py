"""LC-PFN's experiment: recorded curves from files, replays, statements, and a run of seconds."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import curve_runs, lc_pfn, lc_pfn_prior, lc_pfn_real, record, statements
from experiments.curve_files import CurveSet, load_curves
from experiments.lc_pfn_statements import STATEMENTS
from experiments.report import markdown
from experiments.shown import lc_pfn as shown
from models import lc_pfn as network
from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn.prior import sample_prior

CFG = network.Config(width=8, layers=1, heads=2, ffn=16, buckets=20, seq_len=100, dropout=0.0)


@pytest.fixture(scope="module")
def model() -> LCPFN:
    """Random weights, so that what it predicts depends on what it sees."""
    leaves, tree = jax.tree.flatten(network.specs(CFG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.4 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    drawn = sample_prior(jax.random.key(0), 200).noisy
    borders = jnp.asarray(bar.fit_borders(drawn, CFG.buckets))
    return LCPFN(jax.tree.unflatten(tree, values), borders, CFG)


def test_losses_by_task(tmp_path: pathlib.Path):
    losses = np.array([[0.7, 0.5, 0.4], [0.9, 3e30, np.nan], [np.nan, 1.0, 1.0], [0.5, 0.45, 0.3]])
    np.savez(tmp_path / "set.npz", **{"a/valid_loss": losses, "a/hp": np.zeros(3), "b/hp": losses})
    (one,) = load_curves(tmp_path / "set.npz")
    assert one.name == "set/a" and one.normalizer is not None
    assert one.curves.shape == (3, 3)  # the run that began with NaN is no run
    assert one.normalizer.soft_ub == 0.7 and one.normalizer.ub == math.inf
    np.testing.assert_allclose(one.normalizer.inverse(one.curves[0]), losses[0])
    assert one.curves[1, 1] == 0 and np.isnan(one.curves[1, 2])
    assert (np.diff(one.curves[[0, 2]]) > 0).all()  # a falling loss rises


def test_plain_and_lcdb_files(tmp_path: pathlib.Path):
    accuracies = np.array([[0.2, 0.4, np.nan], [0.1, 0.3, 0.5]])
    np.savez(tmp_path / "plain.npz", accuracies=accuracies)
    (one,) = load_curves(tmp_path / "plain.npz")
    np.testing.assert_array_equal(one.curves, accuracies)
    np.savez(tmp_path / "losses.npz", losses=1 / accuracies)
    assert load_curves(tmp_path / "losses.npz")[0].normalizer is not None
    np.savez(
        tmp_path / "lcdb.npz",
        valid=np.concatenate([accuracies, accuracies[:1]]),
        openmlid=np.array([3, 3, 5]),
        learner=np.array(["a", "b", "a"]),
    )
    (one,) = load_curves(tmp_path / "lcdb.npz")  # a data set with one learner has no choice
    assert one.name == "lcdb/3" and one.curves.shape == (2, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 2))}, "name an array losses"),
        ({"losses": np.zeros(3)}, "give \\(runs, evaluations\\)"),
        ({"losses": -np.ones((2, 3))}, "below 0"),
        ({"accuracies": np.full((2, 3), 55.0)}, "divide percentages"),
        ({"losses": np.full((2, 3), np.nan)}, "no run"),
    ],
)
def test_bad_files(tmp_path: pathlib.Path, arrays: dict[str, np.ndarray], message: str):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_curves(tmp_path / "none.npz")
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_curves(tmp_path / "x.npz")


def test_runs_made_here(tmp_path: pathlib.Path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 30)
    settings = curve_runs.Settings(f"text:{tmp_path}", 6, 8, 5, 32, 0)
    curves, rates = curve_runs.run(settings)
    assert curves.shape == (6, 8) and rates.shape == (6,) and (np.diff(np.sort(rates)) > 0).all()
    best = np.nanargmin(curves[:, -1])
    assert 1e-3 < rates[best] and curves[best, -1] < curves[best, 0] - 0.5
    np.testing.assert_array_equal(curve_runs.run(settings)[0], curves)


@pytest.mark.slow
def test_measures_of_a_network(model: LCPFN):
    curves = np.asarray(sample_prior(jax.random.key(2), 20).noisy, np.float64)
    found = lc_pfn_prior.measure_network(model, curves, (5, 40))
    x = jnp.tile(jnp.arange(1.0, 101.0)[None], (20, 1))
    y = jnp.asarray(curves, jnp.float32)
    logits = network.forward(model.params, CFG, x, y, jnp.full(20, 40))[:, 40:]
    each = bar.log_prob(model.borders, logits, y[:, 40:])
    assert found["log_likelihood"][1] == pytest.approx(float(each.mean()), abs=1e-4)
    ends = bar.icdf(model.borders, logits, jnp.array([0.05, 0.95]), exact_tails=True)
    inside = (y[:, 40:] > ends[..., 0]) & (y[:, 40:] < ends[..., 1])
    assert found["coverage"][1] == pytest.approx(float(inside.mean()), abs=1e-3)
    errors = np.asarray(bar.median(model.borders, logits[:, -1])) - curves[:, -1]
    assert found["median_mse"][1] == pytest.approx(np.square(errors).mean(), rel=1e-3)


def test_baselines_cover_what_they_were_fitted_to():
    curves = np.asarray(sample_prior(jax.random.key(3), 2000).noisy, np.float64)
    prior = lc_pfn_prior.measure_baseline("prior", curves, curves, (10,))
    last = lc_pfn_prior.measure_baseline("last", curves, curves, (10,))
    joint = lc_pfn_prior.measure_baseline("joint", curves, curves, (10,))
    assert prior["log_likelihood"] < last["log_likelihood"] < joint["log_likelihood"]
    assert prior["median_mse"] > joint["median_mse"] and 0.85 < prior["coverage"][0] <= 1


def test_stopping_scores():
    runs = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.15, 0.9], [0.5, 0.45, 0.4, 0.3]])
    plain = [[(12, 0.0), (12, 0.0)]]
    found = lc_pfn_real._score([[(6, 0.0), (6, 0.4)]], plain)
    assert found == {"speedup": 2.0, "kept": 0.5, "regret": 0.2, "sets_sped_up": 0.0}
    assert lc_pfn_real._score([[(6, 0.0), (8, 0.0)]], plain)["sets_sped_up"] == 1.0
    chosen = lc_pfn_real.choose([CurveSet("a", runs, None)] * 3, 2, 2, seed=0)
    assert len(chosen) == 2 and all(len(one.curves) == 2 for one in chosen)


def test_rules_on_recorded_curves(model: LCPFN):
    curves = np.clip(np.asarray(sample_prior(jax.random.key(4), 6).noisy, np.float64)[:, :30], 0, 1)
    sets = [CurveSet("a", curves, None)]
    found = lc_pfn_real.stopping(model, sets, 5, 0.95, 0)
    assert found["no stopping"] == {"speedup": 1, "kept": 1, "regret": 0, "sets_sped_up": 0}
    assert found["patience 5"]["speedup"] > found["patience 20"]["speedup"] >= 1
    assert found["final"]["speedup"] >= found["any"]["speedup"] >= 1
    train = np.asarray(sample_prior(jax.random.key(5), 500).noisy, np.float64)
    likely = lc_pfn_real.likelihood(model, sets, train, (5, 40))
    assert all(values[0] is not None and values[1] is None for values in likely.values())


@pytest.mark.slow
def test_posterior_gaps(model: LCPFN, monkeypatch: pytest.MonkeyPatch):
    context, truth, posterior = lc_pfn_prior.reference(0, 12, 40_000)
    assert len(context) == len(truth) == len(posterior.ess) and (posterior.ess > 200).all()
    assert set((~np.isnan(context)).sum(1)) <= set(range(1, 11))
    found = lc_pfn_prior.gap(model, context, truth, posterior)
    assert found["median_gap"] > 0 and found["likelihood_gap"] > 0  # nobody beats the posterior
    monkeypatch.setattr(lc_pfn_prior, "ENOUGH", 50_000)
    with pytest.raises(ValueError, match="raise --importance_draws"):
        lc_pfn_prior.reference(0, 1, 20_000)


def settings(folder: pathlib.Path, curves: str) -> lc_pfn.Settings:
    """An experiment of seconds."""
    return lc_pfn.Settings(
        model="",
        folder=str(folder / "protocol"),
        seeds=(0, 1),
        stages=(10, 20),
        batch=4,
        cutoffs=(5, 40),
        test_curves=16,
        train_curves=300,
        contexts=10,
        importance_draws=40_000,
        mcmc_curves=1,
        mcmc_steps=20,
        curves=(curves,),
        tasks=1,
        runs=4,
        orders=3,
        confidence=0.95,
    )


@pytest.mark.slow
def test_the_experiment_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(lc_pfn.PROTOCOL, "width", 8)
    monkeypatch.setattr(shown, "CUTOFFS", (5, 40))
    accuracies = np.asarray(sample_prior(jax.random.key(4), 6).noisy)
    np.savez(tmp_path / "real.npz", accuracies=np.clip(accuracies, 0, 1))
    chosen = settings(tmp_path, str(tmp_path / "real.npz"))
    rows = lc_pfn.run(chosen)
    by = {row["method"]: row for row in rows}
    assert {"lc-pfn-10", "lc-pfn-20", "last", "joint", "mcmc", "sampler", "stop any"} <= by.keys()
    assert len(by["lc-pfn-20"]["log_likelihood"][0]["samples"]) == 2
    assert by["mcmc"]["speed_ratio"]["mean"] > 1
    answers = statements.answer(rows, STATEMENTS, 2)
    assert all(a["holds"] is not None for a in answers)
    assert "lc-pfn-20" in lc_pfn.show(rows)
    # A second run goes on from the folder, and finds everything trained.
    again = lc_pfn.train_stages(chosen, 0)
    assert list(again) == ["lc-pfn-10", "lc-pfn-20"]
    path = record.save("lc_pfn", rows, config=chosen, seeds=chosen.seeds, folder=tmp_path)
    check_shown(record.load("lc_pfn", path.parent))


def check_shown(result: dict[str, Any]) -> None:
    """Every table has a row, every figure draws."""
    for table in shown.TABLES[:-1]:
        assert isinstance(table, shown.Table)
        cells = [table.row(row) for row in result["rows"] if table.keep(row)]
        assert cells and "|" in markdown(table.header[: len(cells[0])], cells)
    for figure in shown.FIGURES:
        plt.close(figure.draw(result))
