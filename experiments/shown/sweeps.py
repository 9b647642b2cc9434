"""What the documents show of sweeps: the table and the picture that each sweep leaves."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure as Canvas

from experiments import record
from experiments.figures import Figure
from experiments.report import Rendered, caption, markdown
from experiments.sweeps import to_trial
from train.sweep.plan import load_sweep
from train.sweep.report import draw, summary, table

PAGE = "train/sweep/README.md"
GRID, SEARCH = "sweep_tiny_lm", "sweep_tiny_lm_search"
STOPS = (f"{SEARCH}_none", f"{SEARCH}_median", SEARCH)
"""The same search under several pruners."""


@dataclasses.dataclass(frozen=True)
class SweepTable:
    """The table of a recorded sweep, as the sweep itself writes it, and its summary."""

    name: str
    document: str
    result: str

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        sweep = load_sweep(result["config"]["sweep"])
        trials = [to_trial(row) for row in result["rows"]]
        header, lines = table(sweep, trials)
        said = summary(sweep, trials)
        return f"{markdown(header, lines)}\n\n{said}\n\n{caption(result)}"


@dataclasses.dataclass(frozen=True)
class Pruners:
    """What searches under several pruners found and spent."""

    name: str
    document: str
    results: tuple[str, ...]

    def render(self) -> str:
        """Its Markdown."""
        lines = []
        for result in map(record.load, self.results):
            rows, config = result["rows"], result["config"]
            done = [row["value"] for row in rows if row["state"] == "complete"]
            spent = sum(len(row["curve"]) for row in rows)
            options = ", ".join(config["stop_options"])
            lines.append(
                (
                    f"`{config['stop']}`" + (f", {options}" if options else ""),
                    f"{len(done)} of {len(rows)}",
                    str(spent),
                    f"{min(done):.3f}",
                )
            )
        header = ("`--stop`", "runs to the end", "evaluations", "best, bits per byte")
        return markdown(header, lines)


def picture(result: dict[str, Any]) -> Canvas:
    """The picture of a recorded sweep."""
    trials = [to_trial(row) for row in result["rows"]]
    return draw(load_sweep(result["config"]["sweep"]), trials)


TABLES: tuple[Rendered, ...] = (
    SweepTable("sweep-grid", PAGE, GRID),
    Pruners("sweep-pruners", PAGE, STOPS),
    SweepTable("sweep-search", PAGE, STOPS[1]),
)
FIGURES = (
    Figure("experiments/results/sweep_grid.svg", GRID, picture),
    Figure("experiments/results/sweep_search.svg", STOPS[1], picture),
)
