"""A sweep at a glance: one table and one picture of all its trials."""

import csv
import io
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from optuna.trial import FrozenTrial, TrialState

from configs.sweep import Sweep
from train.run_folder import write_text
from train.sweep.plan import at_point, horizon

REPEATS = "seed"
"""Points that differ in this key alone are one line of the table, with mean and spread."""
MAX_PANELS = 4
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def table(sweep: Sweep, trials: Sequence[FrozenTrial]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, the best first: varied keys, metric, spread over seeds, runs, evaluations.

    The metric is that of the complete runs; lines without one follow with the reason.
    """
    keys = _varied(trials)
    groups: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        point = {k: v for k, v in _point(trial).items() if k != REPEATS}
        groups.setdefault(json.dumps(point, sort_keys=True), []).append(trial)
    sign = 1 if sweep.minimize else -1
    lines: list[tuple[float, list[str]]] = []
    for group in groups.values():
        values = [_value(t) for t in group if t.state == TrialState.COMPLETE]
        mean = statistics.fmean(values) if values else float("inf") * sign
        spread = f"{statistics.stdev(values):.4g}" if len(values) > 1 else ""
        spent = sum(len(t.intermediate_values) for t in group)
        cells = [_show(_point(group[0]).get(key)) for key in keys if key != REPEATS]
        cells += [f"{mean:.5g}" if values else "", spread, _states(group), str(spent)]
        lines.append((sign * mean, cells))
    header = [key for key in keys if key != REPEATS]
    header += [sweep.metric, "spread", "runs", "evaluations"]
    return header, [cells for _, cells in sorted(lines, key=lambda line: line[0])]


def summary(sweep: Sweep, trials: Sequence[FrozenTrial]) -> str:
    """The best trial, what was spent, and what early stopping saved, in one or two sentences."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    text = "no run is complete yet"
    if done:
        best = (min if sweep.minimize else max)(done, key=_value)
        text = f"best: {sweep.metric} {_value(best):.5g} at {json.dumps(_point(best))}"
    spent = sum(len(t.intermediate_values) for t in trials)
    ended = [t for t in trials if t.state.is_finished()]
    whole = sum(horizon(at_point(sweep, _point(t))) for t in ended)
    if stopped := sum(t.state == TrialState.PRUNED for t in trials):
        text += f"; {stopped} runs stopped early: {spent} evaluations of {whole}"
    return text


def write_report(sweep: Sweep, trials: Sequence[FrozenTrial], folder: pathlib.Path) -> str:
    """Write ``table.md``, ``table.csv`` and ``plot.svg``; returns the table as text."""
    header, lines = table(sweep, trials)
    rows = [header, ["---"] * len(header), *lines]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    write_text(folder / "table.md", f"{text}\n\n{summary(sweep, trials)}\n")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *lines])
    write_text(folder / "table.csv", buffer.getvalue())
    with plt.rc_context({"svg.hashsalt": "longreach", "svg.fonttype": "none", "font.size": 9}):
        figure = draw(sweep, trials)
        figure.savefig(folder / "plot.svg", metadata={"Date": None})
        plt.close(figure)
    return text


def draw(sweep: Sweep, trials: Sequence[FrozenTrial]) -> Any:
    """Left: every run's metric by evaluation. Right: the last metric against each varied key."""
    keys = [k for k in _varied(trials) if k != REPEATS][:MAX_PANELS] or [REPEATS]
    figure, axes = plt.subplots(1, 1 + len(keys), figsize=(4.2 + 2.8 * len(keys), 3.4))
    curves, panels = axes[0], axes[1:]
    measured = [t for t in trials if t.intermediate_values]
    order = sorted(measured, key=_value, reverse=not sweep.minimize)
    colours = plt.get_cmap("viridis")(np.linspace(0.9, 0.0, max(len(order), 1)))
    for trial, colour in zip(reversed(order), colours, strict=False):
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        curves.plot(steps, values, color=colour, lw=1)
        if trial.state == TrialState.PRUNED:
            curves.plot(steps[-1], values[-1], "x", color=colour, ms=5)
    curves.set_xlabel("evaluation (crosses: stopped early; dark: better)")
    curves.set_ylabel(sweep.metric)
    _bound(curves, [v for t in measured for v in t.intermediate_values.values()])
    for key, panel in zip(keys, panels, strict=True):
        _against(panel, key, measured)
        _bound(panel, [_value(t) for t in measured])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _against(panel: Axes, key: str, trials: Sequence[FrozenTrial]) -> None:
    """The last metric against a key, on a logarithmic axis if its values span a factor of 20."""
    settings = [_point(t).get(key) for t in trials]
    numbers = [s for s in settings if isinstance(s, int | float) and not isinstance(s, bool)]
    names = sorted({_show(s) for s in settings})
    numeric = len(numbers) == len(settings)
    at = numbers if numeric else [float(names.index(_show(s))) for s in settings]
    for state, marker in ((TrialState.COMPLETE, "o"), (TrialState.PRUNED, "x")):
        chosen = [(x, _value(t)) for x, t in zip(at, trials, strict=True) if t.state == state]
        x, y = ([pair[i] for pair in chosen] for i in (0, 1))
        panel.plot(x, y, marker, color="#1a73e8", ms=4, alpha=0.8)
    if not numeric:
        panel.set_xticks(range(len(names)), names)
    elif numbers and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
        panel.set_xscale("log")
    panel.set_xlabel(key)


def _bound(axis: Axes, values: Sequence[float]) -> None:
    """Leave the worst tenth out of sight if it would flatten the rest."""
    if len(values) < 10:
        return
    low, high = np.quantile(values, [0.0, 0.9])
    if max(values) > high + 4 * (high - low) and high > low:
        axis.set_ylim(low - 0.1 * (high - low), high + 0.3 * (high - low))


def _varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """Keys whose values differ between trials, in the order of the points."""
    keys = dict.fromkeys(key for trial in trials for key in _point(trial))
    return [k for k in keys if len({_show(_point(t).get(k)) for t in trials}) > 1] or list(keys)


def _point(trial: FrozenTrial) -> dict[str, Any]:
    return trial.user_attrs.get("point", {})


def _value(trial: FrozenTrial) -> float:
    if trial.value is not None:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)]


def _states(group: Sequence[FrozenTrial]) -> str:
    counts = {name: sum(t.state == state for t in group) for state, name in STATES.items()}
    return ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
