"""Runs side by side."""

import json
import pathlib
from typing import Any

import pytest

from experiments.compare import main, read_run, tabulate


def write_run(folder: pathlib.Path, lines: list[dict[str, Any]], **config: Any) -> pathlib.Path:
    """A run's folder as the training loop leaves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"steps": 30, "task": {"width": 8}} | config))
    launch = {"command": "x", "commit": "0123456789abcdef"}
    (folder / "run.json").write_text(json.dumps({"launches": [launch, launch]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """One run at its end and one that has just begun, with another seed and width."""
    lines = [
        {"step": 10, "loss": 3.0, "skipped": 1, "seconds_per_step": 0.5},
        {"step": 20, "loss": 2.0, "skipped": 0, "seconds_per_step": 0.1},
        {"step": 30, "loss": 1.25, "skipped": 2, "seconds_per_step": 0.2},
        {"step": 30, "evaluation/bits": 1.5},
    ]
    return [
        write_run(tmp_path / "a", lines, seed=0),
        write_run(tmp_path / "b", [], seed=1, task={"width": 16, "kind": "x"}),
    ]


def test_a_run_in_numbers(runs: list[pathlib.Path]) -> None:
    run = read_run(runs[0])
    assert run["step"] == "30 of 30" and run["loss"] == 1.25 and run["evaluation/bits"] == 1.5
    assert run["skipped updates"] == 3 and run["seconds per step (median)"] == 0.2
    assert run["launches"] == 2 and run["commit"] == "0123456789"
    assert run["config.task.width"] == 8


def test_the_table_shows_settings_that_differ(runs: list[pathlib.Path]) -> None:
    lines = tabulate({run.name: read_run(run) for run in runs}).splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines}
    assert rows["loss"] == ["1.25", "-"] and rows["evaluation/bits"] == ["1.5", "-"]
    assert rows["config.seed"] == ["0", "1"] and rows["config.task.width"] == ["8", "16"]
    assert rows["config.task.kind"] == ["-", "x"]
    assert "config.steps" not in rows, "the same in both"


def test_what_is_no_run_is_refused(
    runs: list[pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", *map(str, runs)])
    assert "config.seed" in capsys.readouterr().out
    (runs[1] / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(SystemExit):
        main(["compare", *map(str, runs)])
    assert "is damaged" in capsys.readouterr().err
    (runs[1] / "config.json").unlink()
    with pytest.raises(SystemExit):
        main(["compare", str(runs[1])])
    assert "name the --workdir" in capsys.readouterr().err
