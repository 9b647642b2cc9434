"""Figures drawn from results. Colours tell what needs training from what does not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

COLOURS = {"plain": "#9aa0a6", "free": "#1a73e8", "trained": "#e8710a"}
FREE = ("lookup", "recycling", "draft")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A committed figure: where it is, which result it shows, how it is drawn."""

    path: str
    result: str
    draw: Callable[[dict[str, Any]], Canvas]


def _colour(method: str) -> str:
    if method == "none":
        return COLOURS["plain"]
    return COLOURS["free"] if method in FREE else COLOURS["trained"]


def tokens_per_pass(result: dict[str, Any]) -> Canvas:
    """Left: tokens per target pass by method. Right: how deep drafts are accepted."""
    rows = result["rows"]
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(10, 0.34 * len(rows) + 1.8))
    names = [r["method"] for r in rows]
    for name, colour, offset in (
        ("tokens_per_pass@0", 1.0, -0.2),
        ("tokens_per_pass@1", 0.45, 0.2),
    ):
        values = [r[name] for r in rows]
        bars.barh(
            [i + offset for i in range(len(rows))],
            [v["mean"] for v in values],
            xerr=[v["spread"] for v in values],
            height=0.38,
            color=[_colour(n) for n in names],
            alpha=colour,
            error_kw={"lw": 0.8},
        )
    bars.set_yticks(range(len(rows)), names)
    bars.invert_yaxis()
    bars.axvline(1.0, color="black", lw=0.8)
    bars.set_xlabel("tokens per pass of the target (solid: greedy, pale: temperature 1)")
    for row in rows:
        depths = row["by_depth@0"]
        if depths:
            curves.plot(
                range(1, len(depths) + 1),
                [d["mean"] for d in depths],
                marker="o",
                ms=3,
                label=row["method"],
            )
    curves.set_xlabel("drafted tokens accepted in a round, at least")
    curves.set_ylabel("share of rounds (greedy)")
    curves.set_ylim(0, 1)
    curves.legend(fontsize=7)
    for axis in (bars, curves):
        axis.spines[["top", "right"]].set_visible(False)
    host = result["host"]
    figure.suptitle(
        f"{result['config']['model']}: every text equals plain decoding "
        f"({host['cores']} cores, {host['platform']})",
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def save(figure: Figure, result: dict[str, Any], path: Path, source: str) -> None:
    """Draw and write as SVG; it carries the hash of its result and no date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "longreach", "svg.fonttype": "none", "font.size": 9}):
        canvas = figure.draw(result)
        canvas.savefig(path, format="svg", metadata={"Date": None, "Source": f"result {source}"})
        plt.close(canvas)


FIGURES: tuple[Figure, ...] = (
    Figure("experiments/results/speculative.svg", "speculative_python_5m", tokens_per_pass),
)
"""Every committed figure."""
