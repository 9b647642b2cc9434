"""A sweep in one process: every point once, failures kept apart, early stopping, resuming."""

import json
import pathlib
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from configs import sweep
from models.sharding import make_mesh
from tests.train.sweep.sweeps import make
from train import loop
from train.sweep import worker
from train.sweep.__main__ import _by_name
from train.sweep.plan import at_point, load_sweep
from train.sweep.report import summary, table, write_report
from train.sweep.study import SharedStudy

optuna.logging.set_verbosity(optuna.logging.ERROR)


def share(
    folder: pathlib.Path,
    plan: sweep.Sweep,
    stop: str = "none",
    storage: str | None = None,
    **options: Any,
) -> SharedStudy:
    return SharedStudy(folder, plan, stop, storage, options)


def values(shared: SharedStudy) -> list[float | None]:
    return [trial.value for trial in shared.trials()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The folders in which a training was started."""
    started: list[pathlib.Path] = []

    def counted(config: Any, folder: pathlib.Path, *args: Any, **options: Any) -> Any:
        started.append(folder)
        return loop.train(config, folder, *args, **options)

    monkeypatch.setattr(worker, "train", counted)
    return started


class AfterTwo(optuna.pruners.BasePruner):
    """Stops every run but the first after its second evaluation."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number > 0 and len(trial.intermediate_values) >= 2


def test_every_point_runs_once_and_is_reported(tmp_path: pathlib.Path, calls: list) -> None:
    plan = make()
    shared = share(tmp_path, plan)
    assert worker.work(shared) and worker.work(share(tmp_path, plan))
    assert len(calls) == len(set(calls)) == 6
    points = [trial.user_attrs["point"] for trial in shared.trials()]
    assert points == plan.points
    assert {len(t.intermediate_values) for t in shared.trials()} == {5}
    alone = loop.train(at_point(plan, plan.points[3]), tmp_path / "alone", make_mesh(""))
    assert shared.trials()[3].value == pytest.approx(alone.evaluation["norm"], rel=1e-6)

    header, lines = table(plan, shared.trials())
    assert header == ["optimizer.learning_rate", "norm", "spread", "runs", "evaluations"]
    assert len(lines) == 3 and all(line[3:] == ["2 complete", "10"] for line in lines)
    means = [float(line[1]) for line in lines]
    assert means == sorted(means)
    text = write_report(plan, shared.trials(), tmp_path)
    assert text in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().count("\n") == 4
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    best = min(v for v in values(shared) if v is not None)
    assert f"{best:.5g}" in summary(plan, shared.trials())


def test_more_points_go_on_in_the_same_folder(tmp_path: pathlib.Path, calls: list) -> None:
    points = sweep.product({"seed": [0, 1]})
    worker.work(share(tmp_path, make(points=points)))
    worker.work(share(tmp_path, make(points=sweep.product({"seed": [0, 1, 2]}))))
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"steps is 40 in .* and 48 now.*new --folder"):
        share(tmp_path, make(config={"steps": 48}))
    with pytest.raises(ValueError, match=r"metric is 'norm'"):
        share(tmp_path, make(metric="other"))


def test_failures_are_kept_with_their_reason(tmp_path: pathlib.Path) -> None:
    points = sweep.product({"task.poison": [0, 2**31]})
    plan = make(points=points, rows=0.0, config={"max_bad_steps": 2})
    shared = share(tmp_path, plan)
    assert worker.work(shared)
    bad, good = shared.trials()
    assert bad.state == TrialState.FAIL and "not finite" in bad.user_attrs["reason"]
    assert good.state == TrialState.COMPLETE
    record = json.loads((tmp_path / "trials" / "0000" / "result.json").read_text())
    assert record["state"] == "fail" and "not finite" in record["reason"]
    assert [line[3] for line in table(plan, shared.trials())[1]] == ["1 complete", "1 failed"]


def test_a_pruner_stops_runs_early(tmp_path: pathlib.Path) -> None:
    plan = make(points=sweep.product({"seed": [0, 1, 2]}))
    shared = share(tmp_path, plan, stop=f"{__name__}:AfterTwo")
    assert worker.work(shared)
    states = [t.state for t in shared.trials()]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert [len(t.intermediate_values) for t in shared.trials()] == [5, 2, 2]
    assert "2 runs stopped early: 9 evaluations of 15" in summary(plan, shared.trials())


@pytest.mark.parametrize("stop", ["median", "hyperband"])
def test_optuna_pruners_run(stop: str, tmp_path: pathlib.Path) -> None:
    shared = share(tmp_path, make(points=sweep.product({"seed": [0, 1]})), stop=stop)
    assert worker.work(shared)
    assert all(t.state.is_finished() for t in shared.trials())


def test_pruners_take_options(tmp_path: pathlib.Path) -> None:
    plan = make(points=sweep.product({"seed": [0]}))
    pruner = share(tmp_path / "a", plan, "hyperband", reduction_factor=2).study.pruner
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    assert pruner._reduction_factor == 2
    with pytest.raises(ValueError, match=r"--stop=median does not take --stop_options.*patience"):
        share(tmp_path / "b", plan, "median", patience=3)
    assert _by_name("x", ["a=1", "b=0.5", "c=any"]) == {"a": 1, "b": 0.5, "c": "any"}
    with pytest.raises(ValueError, match="--x: 'a' is not NAME=VALUE"):
        _by_name("x", ["a"])


def test_a_search_draws_its_trials_and_goes_on(tmp_path: pathlib.Path, calls: list) -> None:
    space = {
        "optimizer.learning_rate": sweep.log_uniform(1e-3, 1e-1),
        "seed": sweep.integers(0, 9),
        "clip": sweep.choice("norm", "none"),
    }
    storage = f"sqlite:///{tmp_path}/study.db"
    for trials in (3, 5):
        plan = make(points=sweep.Search(space, trials))
        shared = share(tmp_path, plan, storage=storage)
        assert worker.work(shared)
        drawn = [t.user_attrs["point"] for t in shared.trials()]
        shared.study._storage.remove_session()
        shared.study._storage._backend.engine.dispose()  # Python 3.13 reports what is left open
    assert len(calls) == 5 and drawn[0] != drawn[3]
    assert all(1e-3 <= p["optimizer.learning_rate"] <= 1e-1 for p in drawn)
    assert all(p["clip"] in ("norm", "none") and 0 <= p["seed"] <= 9 for p in drawn)


def test_what_a_dead_worker_left_is_taken_up_and_nothing_else(tmp_path: pathlib.Path) -> None:
    plan = make(points=sweep.product({"seed": [0, 1, 2]}))
    shared = share(tmp_path, plan)
    held, dead = shared.next_trial(), shared.next_trial()
    assert held is not None and dead is not None
    dead.release()  # as the system does when its process ends
    assert worker.work(share(tmp_path, plan))
    states = [t.state for t in shared.trials()]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]
    held.release()
    assert worker.work(share(tmp_path, plan))
    assert all(t.state == TrialState.COMPLETE for t in shared.trials())


def test_a_metric_that_is_not_measured_ends_the_worker(tmp_path: pathlib.Path) -> None:
    shared = share(tmp_path, make(metric="accuracy"))
    with pytest.raises(worker.SweepError, match=r"'accuracy'.*one of norm"):
        worker.work(shared)
    assert not any(t.state.is_finished() for t in shared.trials())


@pytest.mark.parametrize(
    ("changes", "stop", "message"),
    [
        ({}, "medain", "unknown --stop=medain"),
        ({"config": {"evaluate_every": 0}}, "median", "evaluate_every"),
    ],
)
def test_pruners_that_do_not_fit(changes: Any, stop: str, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        share(tmp_path, make(**changes), stop=stop)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no get_sweep"),
        ("def get_sweep(): return 3", "returns no Sweep"),
        ("points=[]", "no points"),
        ("points=[{'optimizer.learning_rat': 1.0}]", r"did you mean optimizer\.learning_rate"),
        ("points=[{'steps': 'ten'}]", "does not fit"),
        ("points=[{'steps': 0}]", "at least 1"),
        ("points=sweep.Search({'seed': sweep.choice((1, 2))}, 3)", "can choose among"),
        ("points=sweep.Search({'sed': sweep.choice(1)}, 3)", "did you mean seed"),
        ("points=sweep.Search({'seed': sweep.choice(1)}, 3, 'grid')", "unknown sampler 'grid'"),
    ],
)
def test_sweep_files_are_checked_before_anything_runs(
    text: str, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "s.py"
    if text.startswith("points"):
        text = (
            "from configs import sweep\nfrom tests.train.sweep.sweeps import make\n"
            f"def get_sweep(): return make({text})"
        )
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sweep(path)
    with pytest.raises(FileNotFoundError, match="no sweep"):
        load_sweep(tmp_path / "other.py")


def test_references_between_keys_follow_a_point() -> None:
    plan = make()
    width = plan.config.get_ref("steps")
    plan.config.evaluate_every = width
    assert at_point(plan, {"steps": 80}).evaluate_every == 80
    assert at_point(plan, {"seed": 1}).evaluate_every == 40


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_workers_that_begin_together_draw_different_points(sampler: str, tmp_path: pathlib.Path):
    space = {"optimizer.learning_rate": sweep.log_uniform(1e-4, 1e-1)}
    plan = make(points=sweep.Search(space, trials=8, sampler=sampler))
    workers = [share(tmp_path, plan) for _ in range(2)]
    claims = [one.next_trial() for _ in range(4) for one in workers]
    drawn = [claim.point["optimizer.learning_rate"] for claim in claims if claim is not None]
    assert workers[0].next_trial() is None
    for claim in claims:
        assert claim is not None
        claim.release()
    assert len(set(drawn)) == 8
