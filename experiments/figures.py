"""Committed figures: what they are drawn from, and how they are written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas


@dataclasses.dataclass(frozen=True)
class Figure:
    """A committed figure: where it is, which result it shows, how it is drawn."""

    path: str
    result: str
    draw: Callable[[dict[str, Any]], Canvas]


def save(figure: Figure, result: dict[str, Any], path: Path, source: str) -> None:
    """Draw and write as SVG; it carries the hash of its result and no date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "longreach", "svg.fonttype": "none", "font.size": 9}):
        canvas = figure.draw(result)
        canvas.savefig(path, format="svg", metadata={"Date": None, "Source": f"result {source}"})
        plt.close(canvas)
