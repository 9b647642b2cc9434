import pathlib
from typing import Any

import pytest
from optuna.trial import TrialState

from experiments import sweeps
from experiments.shown.sweeps import SweepTable
from tests.train.sweep import sweeps as example
from train.sweep.report import summary, table

ROWS: list[dict[str, Any]] = [
    {"point": {"optimizer.learning_rate": 0.01}, "state": "complete", "value": 1.0,
     "curve": [[1, 2.0], [2, 1.0]]},
    {"point": {"optimizer.learning_rate": 0.1}, "state": "stopped early", "value": None,
     "curve": [[1, 3.0]]},
]  # fmt: skip


def settings(folder: pathlib.Path, **changes: Any) -> sweeps.Settings:
    given: dict[str, Any] = {
        "sweep": example.__file__, "folder": str(folder), "stop": "none", "stop_options": (),
        "workers": 1,
    }  # fmt: skip
    return sweeps.Settings(**(given | changes))


def test_rows_and_trials_are_the_same_thing():
    trials = [sweeps.to_trial(row) for row in ROWS]
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert [sweeps.to_row(trial) for trial in trials] == ROWS


def test_a_recorded_sweep_gives_the_table_that_it_wrote_itself(monkeypatch: pytest.MonkeyPatch):
    sweep, trials = example.make(), [sweeps.to_trial(row) for row in ROWS]
    header, lines = table(sweep, trials)
    result = {
        "rows": ROWS, "config": {"sweep": example.__file__}, "commit": "0" * 40, "seeds": [0],
        "host": {"processor": "x", "cores": 1, "platform": "cpu"}, "versions": {"jax": "0"},
        "modified": False, "date": "today", "command": "this",
    }  # fmt: skip
    monkeypatch.setattr("experiments.record.load", lambda name: result)
    text = SweepTable("any", "any.md", "any").render()
    for line in (header, *lines):
        assert "| " + " | ".join(line) + " |" in text
    assert summary(sweep, trials) in text


@pytest.mark.slow
def test_the_command_records_every_trial(tmp_path: pathlib.Path):
    rows = sweeps.run(settings(tmp_path / "sweep"))
    assert len(rows) == 6
    assert all(row["state"] == "complete" and row["value"] is not None for row in rows)
    assert all(len(row["curve"]) == 5 for row in rows)


def test_a_sweep_that_fails_says_so(tmp_path: pathlib.Path):
    with pytest.raises(RuntimeError, match="did not come to its end"):
        sweeps.run(settings(tmp_path / "sweep", stop="no_such_pruner"))
