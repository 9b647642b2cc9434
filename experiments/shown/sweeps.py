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


def picture(result: dict[str, Any]) -> Canvas:
    """The picture of a recorded sweep."""
    trials = [to_trial(row) for row in result["rows"]]
    return draw(load_sweep(result["config"]["sweep"]), trials)


TABLES: tuple[Rendered, ...] = (
    SweepTable("sweep-grid", PAGE, GRID),
    SweepTable("sweep-search", PAGE, SEARCH),
)
FIGURES = (
    Figure("experiments/results/sweep_grid.svg", GRID, picture),
    Figure("experiments/results/sweep_search.svg", SEARCH, picture),
)
