"""Metrics of a run: JSON lines, TensorBoard on request, and a line of progress."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from train.checkpoint import clear_disk_errors
from train.run_folder import write_text


class MetricsFile:
    """``metrics.jsonl``: one object per line with ``step``, in order, each step at most once.

    ``start`` is the update that the run goes on from: lines of later updates, which a killed run
    wrote after its last checkpoint, and a torn last line are removed.
    """

    def __init__(self, path: pathlib.Path, start: int):
        self._path = path
        with clear_disk_errors(path.parent):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
                write_text(path, "".join(f"{line}\n" for line in kept))
            self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system; non-finite numbers become null."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None
                 for k, v in values.items()}  # fmt: skip
        with clear_disk_errors(self._path.parent):
            self._file.write(json.dumps({"step": step, **clean}, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a killed run did not finish


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Window:
    """Metrics of the updates since the last line, kept on the device until they are wanted.

    Its contents can be saved with a checkpoint and loaded again, so that the line that a resumed
    run writes is that of the uninterrupted one to the last bit.
    """

    def __init__(self, rows: list[dict[str, float]] | None = None):
        self._rows = list(rows or [])
        self._device: list[dict[str, jax.Array]] = []

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Metrics of one compiled call: arrays over its updates. Not fetched yet.

        Waits for the call before the last, so that the host is never far ahead of the device.
        """
        if len(self._device) >= 2:
            jax.block_until_ready(self._device[-2])
        self._device.append(metrics)

    def rows(self) -> list[dict[str, float]]:
        """One dictionary of numbers per update (fetches them)."""
        for metrics in jax.device_get(self._device):
            count = len(np.asarray(next(iter(metrics.values()))))
            self._rows += [{k: float(v[i]) for k, v in metrics.items()} for i in range(count)]
        self._device = []
        return self._rows

    def take(self) -> dict[str, float]:
        """Means over the finite updates, weighted by their weight, and empties the window.

        ``weight`` and ``skipped`` are sums.
        """
        rows = self.rows()
        good = [row for row in rows if row["bad_in_row"] == 0]
        total = sum(row["weight"] for row in good)
        names = [name for name in rows[0] if name not in ("weight", "bad_in_row")]
        means = {
            name: sum(row[name] * row["weight"] for row in good) / total if total else math.nan
            for name in names
        }
        self._rows = []
        return {**means, "weight": total, "skipped": len(rows) - len(good)}


class Progress:
    """One line on stderr per log: loss, rate and time left; silent on other processes."""

    def __init__(self, start: int, steps: int, silent: bool):
        self._start, self._steps, self._silent = start, steps, silent
        self._began = time.monotonic()
        self._last = (start, self._began)

    def show(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Print the line; returns the rates, which are machine time and not part of the result."""
        now = time.monotonic()
        before, since = self._last
        self._last = (step, now)
        seconds = (now - since) / max(step - before, 1)
        overall = (now - self._began) / max(step - self._start, 1)
        rate = values.get("weight", 0.0) / max(now - since, 1e-9)
        if not self._silent:
            left = overall * (self._steps - step)
            print(
                f"step {step}/{self._steps}  loss {values['loss']:.4g}  "
                f"{seconds:.3f} s/step  {rate:,.0f} units/s  left {_clock(left)}",
                file=sys.stderr,
                flush=True,
            )
        return {"seconds_per_step": seconds, "weight_per_second": rate}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
