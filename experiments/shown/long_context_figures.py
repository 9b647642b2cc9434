"""Pictures of long-context evaluation: loss by position, accuracy by depth and by distance.

Baselines are drawn in every panel, in grey; the other policies share panels, a few in each.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

BASELINES = {"dense": "-", "window": "--"}
"""What every panel shows, and its line; a window may carry its size."""
LINES = 6
"""Most further policies in a panel."""
MAPS = 8
"""Most heat maps side by side."""


def of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind: loss, task or summary."""
    return [row for row in result["rows"] if row["kind"] == kind]


def baseline(policy: str) -> str:
    """The baseline that a policy is, or nothing."""
    kind = policy.partition(":")[0]
    return kind if kind in BASELINES else ""


def panels(policies: Iterable[str]) -> list[list[str]]:
    """The policies of every panel: the baselines, and a few others."""
    named = list(dict.fromkeys(policies))
    always = [name for name in named if baseline(name)]
    others = [name for name in named if not baseline(name)]
    starts = range(0, max(len(others), 1), LINES)
    return [always + others[start : start + LINES] for start in starts]


def style(policy: str) -> dict[str, Any]:
    """How the line of a policy looks."""
    if kind := baseline(policy):
        return {"color": "#80868b", "ls": BASELINES[kind], "lw": 1.2}
    return {"lw": 1, "marker": "."}


def curves(result: dict[str, Any]) -> Canvas:
    """Loss by position at the longest length; the trained length is marked."""
    rows = of_kind(result, "loss")
    longest = max(row["length"] for row in rows)
    by_policy = {row["policy"]: row for row in rows if row["length"] == longest}
    shown = panels(by_policy)
    across = min(len(shown), 3)
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(3.6 * across + 1, 3.2 * down),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    best = min(sample["mean"] for row in rows for sample in row["nats"])
    for axis, policies in zip(axes.flat, shown, strict=False):
        for policy in policies:
            row = by_policy[policy]
            means = np.array([sample["mean"] for sample in row["nats"]])
            spread = np.array([sample["spread"] for sample in row["nats"]])
            (line,) = axis.plot(row["edges"], means, label=policy, **style(policy))
            band = {"alpha": 0.12, "color": line.get_color()}
            axis.fill_between(row["edges"], means - spread, means + spread, **band)
        mark_trained(axis, result)
        # What breaks leaves the picture, so that the others can be told apart.
        axis.set_ylim(best - 0.2, best + 4)
        finish(axis, "position in the text")
        axis.set_xscale("log", base=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("nats per token")
    figure.tight_layout()
    return figure


def finish(axis: Axes, xlabel: str) -> None:
    """A legend and no box."""
    axis.set_xlabel(xlabel)
    axis.legend(fontsize=6)
    axis.spines[["top", "right"]].set_visible(False)


def mark_trained(axis: Axes, result: dict[str, Any]) -> None:
    """A line where the trained length ends."""
    trained = of_kind(result, "summary")[0]["trained"]
    axis.axvline(trained, color="black", lw=0.8, ls=":")
    axis.annotate(
        "trained length", (trained, 1), xycoords=("data", "axes fraction"), fontsize=7,
        xytext=(3, -8), textcoords="offset points",
    )  # fmt: skip


def with_depth(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of tasks whose evidence stands at a depth."""
    return [row for row in of_kind(result, "task") if row["depths"] != [None]]


def heat_maps(result: dict[str, Any]) -> Canvas:
    """Accuracy by depth and length, a map per policy and task; the trained length is marked."""
    rows = with_depth(result)
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    across = min(len(policies), MAPS)
    bands = [(t, policies[i : i + across]) for t in tasks for i in range(0, len(policies), across)]
    figure, axes = plt.subplots(
        len(bands), across, figsize=(1.2 + 1.5 * across, 0.6 + 1.5 * len(bands)), squeeze=False
    )
    trained = of_kind(result, "summary")[0]["trained"]
    beyond = sum(length <= trained for length in lengths)
    found = {(row["task"], row["policy"], row["length"]): row for row in rows}
    for i, (task, named) in enumerate(bands):
        for axis in axes[i, len(named) :]:
            axis.set_visible(False)
        for axis, policy in zip(axes[i], named, strict=False):
            grid = np.array(
                [[s["mean"] for s in found[task, policy, n]["by_depth"]] for n in lengths]
            ).T
            shown = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.axvline(beyond - 0.5, color="black", lw=1, ls=":")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6, rotation=60)
            axis.set_yticks([0, len(grid) - 1], ["", ""])
            axis.set_title(textwrap.fill(policy, 20), fontsize=6)
        axes[i, 0].set_yticks([0, len(grid) - 1], ["start", "end"], fontsize=6)
        axes[i, 0].set_ylabel(task, fontsize=7)
    figure.tight_layout()
    figure.colorbar(shown, ax=axes, fraction=0.02, label="accuracy")
    return figure


def distances(result: dict[str, Any]) -> Canvas:
    """Accuracy by the distance of the evidence from the end of the prompt, a row per task."""
    rows = with_depth(result)
    longest = max(row["length"] for row in rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = panels(row["policy"] for row in rows)
    size = (3.4 * len(shown) + 0.6, 2.6 * len(tasks) + 0.4)
    figure, axes = plt.subplots(len(tasks), len(shown), figsize=size, squeeze=False, sharey=True)
    found = {(r["task"], r["policy"]): r for r in rows if r["length"] == longest}
    for i, task in enumerate(tasks):
        for axis, policies in zip(axes[i], shown, strict=True):
            _draw_distances(axis, [found[task, policy] for policy in policies])
            mark_trained(axis, result)
            axis.set(title=task, ylim=(-0.03, 1.03))
            finish(axis, "tokens from the evidence to the end")
        axes[i, 0].set_ylabel("accuracy")
    figure.tight_layout()
    return figure


def _draw_distances(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        found = [(i, s["mean"]) for i, s in enumerate(row["by_distance"]) if s is not None]
        middles = [(i + 0.5) * row["width"] for i, _ in found]
        axis.plot(middles, [mean for _, mean in found], label=row["policy"], **style(row["policy"]))
