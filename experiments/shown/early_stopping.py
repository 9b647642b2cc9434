"""What the documents show of early stopping."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number

PAGE = "research/approximation/lc_pfn/README.md"
RESULT = "early_stopping"
OURS = "lc-pfn"
EXAMPLE = "lc-pfn-999"

LABELS = {
    "none": "none",
    "median": "median (Optuna)",
    "median-at-once": "median from the second run on (Optuna)",
    "median-warm": "median from the tenth epoch on (Optuna)",
    "hyperband": "Hyperband (Optuna)",
    "hyperband-warm": "Hyperband from the tenth epoch on (Optuna)",
    "patience-5": "patience of 5 epochs (Optuna)",
    "patience-20": "patience of 20 epochs (Optuna)",
    OURS: "**LC-PFN**",
    "lc-pfn-99": "LC-PFN, confidence 0.99",
    "lc-pfn-999": "LC-PFN, confidence 0.999",
    "lc-pfn-final": "LC-PFN, asked about the last epoch alone",
}
HEADER = ("pruner", "epochs spent", "fewer epochs", "regret", "best run kept")


def is_pruner(row: dict[str, Any]) -> bool:
    """Whether the row is of a pruner, not the example."""
    return "regret" in row


def pruner_row(row: dict[str, Any]) -> tuple[str, ...]:
    """What a pruner spends and loses."""
    return (
        LABELS[row["method"]],
        f"{100 * row['spent']['mean']:.0f}%",
        number(row["speedup"]) + "x",
        number(row["regret"], 4),
        f"{100 * row['kept']['mean']:.0f}%",
    )


def stopping_figure(result: dict[str, Any]) -> Canvas:
    """Epochs against regret for every pruner, and one set of runs with what LC-PFN cut off."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4))
    left.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # pyright: ignore
    for row in filter(is_pruner, result["rows"]):
        left.errorbar(
            100 * row["spent"]["mean"],
            row["regret"]["mean"],
            xerr=100 * row["spent"]["spread"],
            yerr=row["regret"]["spread"],
            marker="*" if row["method"].startswith(OURS) else "o",
            ms=10 if row["method"].startswith(OURS) else 5,
            ls="",
            label=LABELS[row["method"]].replace("**", ""),
        )
    left.set_xlabel("epochs spent (% of all)")
    left.set_ylabel("regret")
    left.legend(fontsize=6.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    _draw_example(right, next(row for row in result["rows"] if row["method"] == "example"))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _draw_example(axis: Axes, row: dict[str, Any]) -> None:
    for values, end in zip(row["values"], row["stopped"][EXAMPLE], strict=True):
        epochs = range(1, len(values) + 1)
        axis.plot(epochs, values, color="#dadce0", lw=0.7)
        axis.plot(epochs[:end], values[:end], color="#1a73e8", lw=1.1)
        if end < len(values):
            axis.plot(end, values[end - 1], "x", color="#d93025", ms=4)
    firsts = sorted(values[0] for values in row["values"])
    least = min(min(values) for values in row["values"])
    top = firsts[len(firsts) // 2]
    axis.set_ylim(least - 0.05 * (top - least), top + 0.2 * (top - least))
    axis.set_xlabel("epoch (blue: made, grey: saved)")
    axis.set_ylabel("reported value")
    axis.set_title(f"{row['name']}, {LABELS[EXAMPLE]}", fontsize=9)


TABLES: tuple[Rendered, ...] = (
    Table("early-stopping", PAGE, RESULT, HEADER, pruner_row, is_pruner),
    Statements("early-stopping-statements", PAGE, RESULT),
)

FIGURES = (Figure("experiments/results/early_stopping.svg", RESULT, stopping_figure),)
