"""Replays of recorded runs under pruners: what is counted, and a comparison of seconds."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pytest

from configs import sweep
from experiments import early_stopping, record, statements
from experiments.curve_files import CurveSet, load_curves
from experiments.shown import early_stopping as shown
from models import lc_pfn as network
from models.lc_pfn_io import LCPFN
from models.params import init
from research.approximation.lc_pfn.normalizer import Normalizer
from tests.train.sweep.sweeps import make
from train.sweep import worker
from train.sweep.study import SharedStudy

optuna.logging.set_verbosity(optuna.logging.ERROR)
CFG = network.Config(width=8, layers=1, heads=2, ffn=16, buckets=20, seq_len=12, dropout=0.0)


@pytest.fixture(scope="module")
def model() -> LCPFN:
    borders = jnp.linspace(-0.1, 1.1, CFG.buckets + 1)
    return LCPFN(init(network.specs(CFG), jax.random.key(1)), borders, CFG)


class AfterTwo(optuna.pruners.BasePruner):
    """Ends every run but the first after its second epoch."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number > 0 and len(trial.intermediate_values) == 2


def test_epochs_and_regret_of_a_replay():
    values = np.array([[5.0, 4.0, 3.0], [6.0, 5.0, 1.0], [4.0, np.nan, np.nan]])
    plain = early_stopping.replay(values, [0, 1, 2], optuna.pruners.NopPruner(), minimize=True)
    assert plain.epochs == [3, 3, 2] and plain.best == 1.0
    cut = early_stopping.replay(values, [0, 1, 2], AfterTwo(), minimize=True)
    assert cut.epochs == [3, 2, 2] and cut.best == 3.0
    other = early_stopping.replay(values, [1, 0, 2], AfterTwo(), minimize=True)
    assert other.epochs == [2, 3, 2] and other.best == 1.0
    upward = early_stopping.replay(-values, [0, 1, 2], AfterTwo(), minimize=False)
    assert upward.epochs == cut.epochs and upward.best == -3.0
    one = CurveSet("x", values, Normalizer(0.0, np.inf, 0.0, 5.0, minimize=True))
    scored = early_stopping.score(one, cut)
    assert scored == {"spent": 7, "whole": 8, "regret": pytest.approx((3.0 - 1.0) / (5.0 - 1.0))}


def test_a_sweep_is_a_set_of_runs(tmp_path: pathlib.Path):
    plan = make(points=sweep.product({"seed": [0, 1, 2]}))
    shared = SharedStudy(tmp_path / "sweep", plan, "none", None)
    assert worker.work(shared)
    (one,) = load_curves(tmp_path / "sweep")
    assert one.name == "sweep" and one.normalizer is not None and one.values.shape == (3, 5)
    assert one.values[1, -1] == pytest.approx(shared.trials()[1].value)
    with pytest.raises(FileNotFoundError, match=r"no study\.log: name the folder of a sweep"):
        load_curves(tmp_path)
    stopped = SharedStudy(tmp_path / "stopped", plan, f"{__name__}:AfterTwo", None)
    assert worker.work(stopped)
    with pytest.raises(ValueError, match="stopped early, or none: sweep with --stop=none"):
        load_curves(tmp_path / "stopped")


@pytest.mark.slow
def test_the_comparison_runs(model: LCPFN, tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    falling = 2 * np.exp(-rng.uniform(0, 1, (6, 1)) * np.arange(12)[None]) + rng.random((6, 1))
    np.savez(tmp_path / "losses.npz", losses=falling)
    np.savez(tmp_path / "accuracies.npz", accuracies=1 - falling / 3)
    files = tuple(str(tmp_path / f"{name}.npz") for name in ("losses", "accuracies"))
    methods = tuple(early_stopping.PRUNERS)
    settings = early_stopping.Settings(files, "", methods, tasks=2, runs=5, seeds=(0, 1))
    rows = early_stopping.run(settings, model)
    by = {row["method"]: row for row in rows}
    assert list(by) == [*methods, "example"]
    assert by["none"]["spent"]["samples"] == [1.0, 1.0] and by["none"]["regret"]["mean"] == 0
    assert by["none"]["kept"]["mean"] == 1
    assert all(0 < by[m]["spent"]["mean"] <= 1 and by[m]["regret"]["mean"] >= 0 for m in methods)
    assert by["patience-20"]["spent"]["mean"] == 1  # the runs are shorter
    assert set(by["example"]["stopped"]) == set(methods) and len(by["example"]["values"]) == 5
    answers = statements.answer(rows, early_stopping.STATEMENTS, 2)
    assert all(a["holds"] is not None for a in answers)
    record.save("e", rows, config=settings, seeds=(0, 1), statements=answers, folder=tmp_path)
    result = record.load("e", tmp_path)
    cells = [shown.pruner_row(row) for row in result["rows"] if shown.is_pruner(row)]
    assert len(cells) == len(methods) and {len(c) for c in cells} == {len(shown.HEADER)}
    canvas = shown.stopping_figure(result)
    assert len(canvas.axes) == 2
    plt.close(canvas)


def test_statements_compare_both_numbers():
    def row(method: str, spent: float, regret: float) -> dict:
        cells = {"spent": spent, "speedup": 1 / spent, "regret": regret, "kept": 0.95}
        return {"method": method} | {k: record.sample([v]) for k, v in cells.items()}

    rows = [row("lc-pfn", 0.5, 0.1), row("median", 0.4, 0.2), row("hyperband", 0.4, 0.05)]
    holds = [a["holds"] for a in statements.answer(rows, early_stopping.STATEMENTS, 1)]
    assert holds == [True, None, True, None, None, False, None, None, None]
