"""Training runs side by side: ``python -m experiments.compare RUN...``.

One column per run: how far it is, its last loss and evaluation, its speed, and the settings in
which the runs differ. Nothing in the runs' folders is changed, so they may still be going on.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app

from train.config import flatten
from train.metrics import read_metrics

MISSING = "-"


def read_run(run: pathlib.Path) -> dict[str, Any]:
    """What is to be told about one run: a flat mapping of names to values, settings included.

    Raises:
        FileNotFoundError: it is no run's folder.
        ValueError: its files cannot be read.
    """
    for name in ("config.json", "run.json", "metrics.jsonl"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} has no {name}: name the --workdir of a training run.")
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        launches = json.loads((run / "run.json").read_text(encoding="utf-8"))["launches"]
        lines = read_metrics(run / "metrics.jsonl")
    except (ValueError, KeyError) as error:
        raise ValueError(f"a file in {run} is damaged ({error}): restore it.") from error
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    speed = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    return {
        "step": f"{last.get('step', 0)} of {config['steps']}",
        "loss": last.get("loss"),
        **{name: number for name, number in last.items() if name.startswith("evaluation/")},
        "skipped updates": sum(line.get("skipped", 0) for line in lines),
        "seconds per step (median)": statistics.median(speed) if speed else None,
        "launches": len(launches),
        "commit": (launches[-1]["commit"] or "unknown")[:10],
        **{f"config.{name}": value for name, value in flatten(config).items()},
    }


def tabulate(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row per name; settings that are the same in all runs are left out."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    rows = [["", *runs]]
    for name in names:
        values = [run.get(name) for run in runs.values()]
        if name.startswith("config.") and all(v == values[0] for v in values):
            continue
        rows.append([name, *map(_cell, values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str]) -> None:
    """Print the table; bad input is one sentence."""
    if len(arguments) < 2:
        raise app.UsageError("name the folder of at least one run.")
    try:
        runs = {name: read_run(pathlib.Path(name)) for name in arguments[1:]}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(tabulate(runs))


if __name__ == "__main__":
    app.run(main)
