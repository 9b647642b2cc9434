"""Real processes: killed, stopped, wrongly started, and two of them training together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.source_tree import ROOT
from train.metrics import read_metrics

CONFIG = "tests/train/regression.py"


def launch(folder: pathlib.Path, *flags: str, config: str = CONFIG) -> subprocess.Popen[str]:
    """Start ``python -m train`` with one CPU device."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={folder}", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], folder: pathlib.Path, step: int) -> None:
    """Return when the run has logged ``step``; read its errors if it ends before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and re.search(rf'"step": {step},', path.read_text()):
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within two minutes")


def finish(process: subprocess.Popen[str]) -> str:
    """Its error output; fails unless it ends with 0."""
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return errors


def losses(folder: pathlib.Path) -> list[tuple[int, Any, Any]]:
    found = read_metrics(folder / "metrics.jsonl")
    return [(x["step"], x.get("loss"), x.get("evaluation/norm")) for x in found]


def test_killed_and_stopped_runs_continue_to_the_last_bit(tmp_path: pathlib.Path):
    slow = "--config.task.delay=0.005"
    whole = launch(tmp_path / "whole", slow)
    folder = tmp_path / "parts"
    first = launch(folder, slow)
    wait_for_step(first, folder, 16)
    first.send_signal(signal.SIGKILL)
    first.communicate()  # waits, and closes the pipe
    second = launch(folder, slow)
    wait_for_step(second, folder, 24)
    second.send_signal(signal.SIGTERM)
    assert "stopped by a signal and saved" in finish(second)
    assert "finished at step 40" in finish(launch(folder, slow))
    finish(whole)
    assert losses(folder) == losses(tmp_path / "whole")
    run = json.loads((folder / "run.json").read_text())
    assert len(run["launches"]) == 3
    assert run["launches"][-1]["command"].startswith("python -m train --config=" + CONFIG)
    assert json.loads((folder / "config.json").read_text())["task"]["delay"] == 0.005


def test_two_processes_train_checkpoint_and_resume(tmp_path: pathlib.Path):
    """One of them gets SIGTERM; both save the same step, and the pair goes on from there."""
    alone = launch(tmp_path / "alone")

    def pair(*flags: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [
            launch(
                tmp_path / "pair", "--distributed", f"--coordinator={address}",
                "--num_processes=2", f"--process_id={i}", "--mesh=data=2", *flags,
            )
            for i in range(2)
        ]  # fmt: skip

    slow = "--config.task.delay=0.01"
    first = pair(slow)
    wait_for_step(first[0], tmp_path / "pair", 12)
    first[1].send_signal(signal.SIGTERM)
    said = [finish(p) for p in first]
    step = re.search(r"stopped by a signal and saved at step (\d+)", said[0])
    assert step and 12 <= int(step[1]) < 40, said
    assert said[1].count("stopped") == 0  # process 0 alone reports
    for process in pair(slow):
        finish(process)
    finish(alone)
    together, single = losses(tmp_path / "pair"), losses(tmp_path / "alone")
    assert [x[0] for x in together] == [x[0] for x in single]
    for a, b in zip(together, single, strict=True):
        np.testing.assert_allclose([v for v in a if v], [v for v in b if v], rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.task.widht=3"], "widht"),
        (["--mesh=data=3"], "needs 3 devices"),
        (["--config.clip=sometimes"], "config.clip is 'sometimes': choose one of"),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path: pathlib.Path, flags: list[str], message: str):
    process = launch(tmp_path / "run", *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert message in errors
    if "widht" not in message:
        assert "Traceback" not in errors and errors.count("error:") == 1
