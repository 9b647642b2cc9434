"""What early stopping saves and what it costs: LC-PFN against Optuna's pruners, on recorded runs.

    python -m experiments.early_stopping --curves=FILE.npz,SWEEP_FOLDER,...

Every set of runs is made again in random orders, one run after the other, in an Optuna study with
each pruner: the very objects that ``python -m train.sweep --stop=...`` uses, with values as they
were reported. Counted are the epochs spent, as a share of all, and the regret: by how much the best
value reached falls short of the best of all whole runs, as a share of the range from the set's
median first value to that best. ``--curves`` are files and folders of
:mod:`experiments.curve_files`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from absl import app, flags, logging
from jaxtyping import Float
from optuna.trial import TrialState

from experiments import record, statements
from experiments.curve_files import CurveSet, load_curves
from experiments.lc_pfn_real import KEPT, choose
from experiments.settings import from_flags
from experiments.statements import Row, Statement, value
from models.lc_pfn_io import LCPFN, load
from research.approximation.lc_pfn.pruner import SHIPPED, LCPFNPruner


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is replayed; see the flags."""

    curves: tuple[str, ...]
    model: str
    methods: tuple[str, ...]
    tasks: int
    runs: int
    seeds: tuple[int, ...]


def _patience(epochs: int) -> optuna.pruners.BasePruner:
    """Ends a run that has not improved for so long."""
    with warnings.catch_warnings():
        # That it is experimental is the business of the bounds on Optuna's version.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.PatientPruner(None, patience=epochs)


Make = Callable[[LCPFN, int, bool], optuna.pruners.BasePruner]
PRUNERS: dict[str, Make] = {
    "none": lambda *_: optuna.pruners.NopPruner(),
    "median": lambda *_: optuna.pruners.MedianPruner(),
    "median-at-once": lambda *_: optuna.pruners.MedianPruner(n_startup_trials=1),
    "median-warm": lambda *_: optuna.pruners.MedianPruner(n_warmup_steps=10),
    "hyperband": lambda _, horizon, __: optuna.pruners.HyperbandPruner(max_resource=horizon),
    "hyperband-warm": lambda _, horizon, __: optuna.pruners.HyperbandPruner(10, horizon),
    "patience-5": lambda *_: _patience(5),
    "patience-20": lambda *_: _patience(20),
    "lc-pfn": lambda model, horizon, least: LCPFNPruner(horizon, least, model),
    "lc-pfn-99": lambda model, horizon, least: LCPFNPruner(horizon, least, model, 0.99),
    "lc-pfn-999": lambda model, horizon, least: LCPFNPruner(horizon, least, model, 0.999),
    "lc-pfn-final": lambda model, horizon, least: LCPFNPruner(horizon, least, model, rule="final"),
}
"""Optuna's at their defaults but for what their names say (``median-at-once`` decides from the
second run on, the ``warm`` ones from the tenth epoch on), and ours at several confidences."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a pruner did to runs: epochs of each, in the order of the values; the best value."""

    epochs: list[int]
    best: float


def replay(
    values: Float[np.ndarray, "runs t"],
    order: Sequence[int],
    pruner: optuna.pruners.BasePruner,
    minimize: bool,
    name: str = "replay",
) -> Replay:
    """Make the runs again in this order. One that is NaN from some epoch on fails there.

    Hyperband's brackets are drawn by the study's name.
    """
    direction = "minimize" if minimize else "maximize"
    study = optuna.create_study(study_name=name, direction=direction, pruner=pruner)
    better = min if minimize else max
    epochs, best = [0] * len(values), np.inf if minimize else -np.inf
    for run in order:
        trial = study.ask()
        state, last = TrialState.COMPLETE, None
        for epoch, current in enumerate(values[run].tolist(), start=1):
            epochs[run] = epoch
            if np.isnan(current):
                state = TrialState.FAIL
                break
            last, best = current, better(best, current)
            trial.report(last, epoch)
            if epoch < values.shape[1] and trial.should_prune():
                state = TrialState.PRUNED
                break
        study.tell(trial, last if state == TrialState.COMPLETE else None, state=state)
    return Replay(epochs, float(best))


def replay_set(one: CurveSet, method: str, model: LCPFN, seed: int) -> Replay:
    """A set in the order of a seed, which is the same for all methods."""
    order = np.random.default_rng(seed).permutation(len(one.values)).tolist()
    minimize = one.normalizer is not None
    pruner = PRUNERS[method](model, one.values.shape[1], minimize)
    return replay(one.values, order, pruner, minimize, f"{one.name}, order {seed}")


def score(one: CurveSet, done: Replay) -> dict[str, float]:
    """Epochs spent, those of whole runs, and the regret."""
    ended = np.isnan(one.values)
    whole = int(np.where(ended.any(1), ended.argmax(1) + 1, ended.shape[1]).sum())
    top = np.nanmax(one.values) if one.normalizer is None else np.nanmin(one.values)
    scale = max(abs(float(top) - float(np.median(one.values[:, 0]))), 1e-12)
    regret = abs(float(top) - done.best) / scale
    return {"spent": float(sum(done.epochs)), "whole": float(whole), "regret": regret}


def run(settings: Settings, model: LCPFN) -> list[dict[str, Any]]:
    """A row for each pruner, whose samples are over seeds, each over all sets; and an example."""
    sets = [one for path in settings.curves for one in load_curves(path)]
    rows = []
    for method in settings.methods:
        per_seed = []
        for seed in settings.seeds:
            chosen = choose(sets, settings.tasks, settings.runs, seed)
            found = [score(one, replay_set(one, method, model, seed)) for one in chosen]
            spent = sum(f["spent"] for f in found) / sum(f["whole"] for f in found)
            per_seed.append(
                {
                    "spent": spent,
                    "speedup": 1 / spent,
                    "regret": float(np.mean([f["regret"] for f in found])),
                    "kept": float(np.mean([f["regret"] <= KEPT for f in found])),
                }
            )
        samples = record.samples(per_seed)
        rows.append({"method": method, **samples})
        print(
            f"{method:18} epochs {100 * samples['spent']['mean']:5.1f}%  regret "
            f"{samples['regret']['mean']:.4f}  best kept {100 * samples['kept']['mean']:.0f}%",
            flush=True,
        )
    return [*rows, example(settings, sets[-1], model)]


def example(settings: Settings, one: CurveSet, model: LCPFN) -> dict[str, Any]:
    """One set's curves and where every pruner ended its runs, for the figure."""
    (chosen,) = choose([one], 1, settings.runs, settings.seeds[0])
    stopped = {
        method: replay_set(chosen, method, model, settings.seeds[0]).epochs
        for method in settings.methods
    }
    values = [[float(f"{v:.5g}") for v in row if not np.isnan(v)] for row in chosen.values]
    return {"method": "example", "name": one.name, "values": values, "stopped": stopped}


def _saves(method: str) -> Callable[[dict[str, Row], int], bool]:
    return lambda rows, seed: (
        value(rows[method], "speedup", seed) >= 1.5 and value(rows[method], "kept", seed) >= 0.9
    )


def _not_beaten(rival: str) -> Callable[[dict[str, Row], int], bool]:
    """Whether the rival spends more or regrets more, or both."""

    def test(rows: dict[str, Row], seed: int) -> bool:
        ours, theirs = rows["lc-pfn"], rows[rival]
        names = ("spent", "regret")
        return any(value(theirs, name, seed) > value(ours, name, seed) for name in names)

    return test


RIVALS = (
    "median",
    "median-at-once",
    "median-warm",
    "hyperband",
    "hyperband-warm",
    "patience-5",
    "patience-20",
)
STATEMENTS = (
    *(
        Statement(
            f"{words} spends 1.5 times fewer epochs and keeps the best run in 90%",
            (method,),
            _saves(method),
        )
        for method, words in (
            ("lc-pfn", "LC-PFN at a confidence of 0.95"),
            ("lc-pfn-999", "LC-PFN at 0.999"),
        )
    ),
    *(
        Statement(
            f"{rival} spends more epochs or has more regret than LC-PFN",
            ("lc-pfn", rival),
            _not_beaten(rival),
        )
        for rival in RIVALS
    ),
)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = from_flags(Settings)
    if unknown := set(settings.methods) - set(PRUNERS):
        raise app.UsageError(f"--methods: unknown {sorted(unknown)}, known are {list(PRUNERS)}.")
    rows = run(settings, load(settings.model))
    name = record.name_of("early_stopping", None, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_list("curves", None, "Recorded curves: .npz files, folders of sweeps.")
    flags.mark_flag_as_required("curves")
    flags.DEFINE_string("model", SHIPPED, "The network: a folder, or the name of a shipped one.")
    flags.DEFINE_list("methods", list(PRUNERS), "What to compare.")
    flags.DEFINE_integer("tasks", 16, "At most so many sets, drawn by the seed.", lower_bound=1)
    flags.DEFINE_integer("runs", 20, "At most so many runs of each.", lower_bound=2)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the choice of sets and runs, and their order.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
