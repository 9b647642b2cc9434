"""Sweeps as processes: killed, in parallel, through submitit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.source_tree import ROOT

SWEEP = "tests/train/sweep/sweeps.py"


def launch(folder: pathlib.Path, *flags: str, **changes: Any) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONWARNINGS": "",
        "PYTHONPATH": str(ROOT),
        "LONGREACH_TEST_SWEEP": json.dumps(changes),
    }
    command = [
        sys.executable,
        "-m",
        "train.sweep",
        f"--sweep={SWEEP}",
        f"--folder={folder}",
        *flags,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, errors = process.communicate(timeout=180)
    assert process.returncode == status, errors
    return out, errors


def results(folder: pathlib.Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("trials/*/result.json")):
        record = json.loads(path.read_text())
        found[json.dumps(record["point"], sort_keys=True)] = record["value"]
    return found


def wait_for(path: pathlib.Path, text: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise AssertionError(f"{path} does not get {text!r}")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: pathlib.Path) -> None:
    """SIGKILL in the second trial; two workers then finish it. The whole run is the judge."""
    slow = {"rows": 0.004, "points": [{"seed": s} for s in range(4)]}
    whole = launch(tmp_path / "whole", **slow)
    finish(whole)
    killed = launch(tmp_path / "parts", **slow)
    wait_for(tmp_path / "parts/trials/0001/run/metrics.jsonl", '"step": 24', killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(results(tmp_path / "parts")) == 1
    out, errors = finish(launch(tmp_path / "parts", "--workers=2", **slow))
    assert results(tmp_path / "parts") == results(tmp_path / "whole") != {}
    assert "4 complete" in out or out.count("1 complete") == 4
    assert "2 workers" in errors and "4 trials have ended" in errors
    logs = "".join(p.read_text() for p in (tmp_path / "parts/workers").glob("*.log"))
    assert logs.count("trial 0:") == 0, "what was finished ran again"
    assert logs.count("trial 1: {") == 1 and "step 8 evaluation" in logs
    first_steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "parts/trials/0001/run/metrics.jsonl").read_text().splitlines()
    ]
    assert first_steps == sorted(first_steps)


@pytest.mark.slow
def test_jobs_of_a_cluster(tmp_path: pathlib.Path) -> None:
    """submitit's own local cluster runs the very jobs that SLURM would get."""
    points = [{"seed": s} for s in range(2)]
    flags = ("--cluster=local", "--workers=2", "--cluster_options=timeout_min=3")
    out, errors = finish(launch(tmp_path / "jobs", *flags, points=points))
    assert "submitted" in errors and len(results(tmp_path / "jobs")) == 2
    assert "best: norm" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stop=medain",), "error: unknown --stop=medain"),
        (("--workers=0",), "error: --workers=0"),
        (("--cluster=local", "--cluster_options=fast"), "error: --cluster_options: 'fast'"),
    ],
)
def test_bad_flags_are_one_sentence(flags: tuple, message: str, tmp_path: pathlib.Path) -> None:
    _, errors = finish(launch(tmp_path / "s", *flags), status=1)
    assert errors.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in errors


def test_a_signal_saves_and_says_so(tmp_path: pathlib.Path) -> None:
    slow = {"rows": 0.02, "points": [{"seed": 0}]}
    process = launch(tmp_path / "s", **slow)
    wait_for(tmp_path / "s/trials/0000/run/metrics.jsonl", '"step": 8', process)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, status=1)
    assert "the same command goes on from here" in errors
    assert not results(tmp_path / "s")
