"""LC-PFN as a pruner: what it sees of a study, and when it lets runs go on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from models import lc_pfn as network
from models.lc_pfn_io import LCPFN
from models.params import init
from research.approximation.lc_pfn import pruner as module
from research.approximation.lc_pfn.pruner import LCPFNPruner

optuna.logging.set_verbosity(optuna.logging.ERROR)
CFG = network.Config(width=8, layers=1, heads=2, ffn=16, buckets=20, seq_len=10, dropout=0.0)


@pytest.fixture(scope="module")
def model() -> LCPFN:
    """As it is before training: a law of its own at every epoch, over all bins."""
    borders = jnp.linspace(-0.2, 1.2, CFG.buckets + 1)
    return LCPFN(init(network.specs(CFG), jax.random.key(1)), borders, CFG)


def ask(pruner: LCPFNPruner, curves: list[list[float]]) -> bool:
    """Whether the pruner ends the last of these runs."""
    study = optuna.create_study(direction="minimize" if pruner.minimize else "maximize")
    for curve in curves[:-1]:
        trial = study.ask()
        for step, value in enumerate(curve):
            trial.report(value, 10 * step)
        failed = np.isnan(curve).any()
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if failed else curve[-1], state=state)
    trial = study.ask()
    for step, value in enumerate(curves[-1]):
        trial.report(value, 10 * step)
    return pruner.prune(study, study.trials[-1])


def test_accuracies_go_to_the_rule_as_they_are(model: LCPFN, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(module, "should_stop", lambda *args: seen.append(args) or True)
    pruner = LCPFNPruner(10, False, model, confidence=0.9, rule="final")
    assert ask(pruner, [[0.2, 0.7, 0.6], [0.1, 0.3]])
    ((_, values, best, horizon, confidence, rule, normalizer),) = seen
    np.testing.assert_array_equal(values, [0.1, 0.3])
    assert (best, horizon, confidence, rule, normalizer) == (0.7, 10, 0.9, "final", None)


@pytest.mark.parametrize("minimize", [True, False])
def test_other_ranges_are_normalised_by_what_was_seen(
    minimize: bool, model: LCPFN, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    monkeypatch.setattr(module, "should_stop", lambda *args: seen.append(args) or False)
    sign = 1 if minimize else -1
    curves = [[5.0, 3.0, 2.0], [6.0, 4.0, float("nan")], [7.0, 3.5]]
    assert not ask(LCPFNPruner(10, minimize, model), [[sign * v for v in c] for c in curves])
    ((_, _, best, *_, normalizer),) = seen
    assert best == sign * 2.0 and normalizer.minimize == minimize
    assert sorted((normalizer.soft_lb, normalizer.soft_ub)) == sorted((sign * 2.0, sign * 6.0))
    assert np.isinf([normalizer.lb, normalizer.ub]).all()


def test_a_hopeless_run_ends_and_another_does_not(model: LCPFN):
    low = model.replace(borders=jnp.linspace(0.0, 0.5, CFG.buckets + 1))
    assert ask(LCPFNPruner(10, False, low), [[0.2, 0.9], [0.1, 0.1]])
    assert not ask(LCPFNPruner(10, False, low), [[0.2, 0.3], [0.1, 0.1]])


def test_runs_that_go_on(model: LCPFN, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "should_stop", lambda *args: True)
    pruner = LCPFNPruner(10, True, model, first=3)
    assert ask(pruner, [[5.0, 1.0], [5.0, 4.0, 3.0]])
    assert not ask(pruner, [[5.0, 1.0], [5.0, 4.0]])  # fewer than `first`
    assert not ask(pruner, [[5.0] * 10, [4.0] * 10])  # whole
    assert not ask(pruner, [[5.0, 4.0], [5.0, 4.0, float("nan")]])
    assert not ask(pruner, [[5.0, 5.0], [5.0, 5.0, 5.0]])  # nothing has become better


def test_horizons_beyond_the_network_are_refused(model: LCPFN):
    with pytest.raises(ValueError, match="11 evaluations are longer than the 10 epochs"):
        LCPFNPruner(11, True, model)
    with pytest.raises(ValueError, match="unknown rule 'some'"):
        LCPFNPruner(10, True, model, rule="some")
    with pytest.raises(FileNotFoundError, match="no LC-PFN 'nowhere'"):
        LCPFNPruner(10, True, "nowhere")
