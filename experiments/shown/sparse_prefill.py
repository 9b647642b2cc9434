"""What the documents show of sparse prefill."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number

PAGE = "research/context/qwen25_1m/README.md"
QUALITY = "sparse_prefill_smollm2_135m"
COST = "bench_sparse_prefill_smollm2_135m"

PATTERNS = {
    "vertical_slash": "**vertical-slash**",
    "naive": "vertical-slash, rotations of dual chunk attention",
    "a_shape": "sink and local window",
    "random": "random columns, sink and local band",
    "block_sparse": "blocks by mean products",
}


def curve_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a pattern: density, recall and error at each budget."""
    return (
        PATTERNS[row["method"]],
        *(
            f"{d['mean']:.2f}: {r['mean']:.3f}, {e['mean']:.3f}"
            for d, r, e in zip(row["density"], row["recall"], row["error"], strict=True)
        ),
    )


def refined_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a way to raise budgets."""
    return (
        {"refined": "**per head**", "uniform": "all heads alike"}[row["method"]],
        f"{row['budget']['mean']:,.0f}",
        number(row["passes"], 1),
        number(row["lowest"], 3),
        number(row["mean"], 3),
        number(row["at_cap"], 1),
    )


def speed_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a timed policy."""
    return (
        f"{row['length']:,}",
        row["policy"],
        "" if row["density"] is None else f"{row['density']:.2f}",
        "" if row["recall"] is None else f"{row['recall']:.3f}",
        number(row["seconds"]),
        number(row["tokens_per_second"], 0),
        number(row["speedup"]) + "x",
    )


def memory_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the compiler's memory of a piece."""
    return (f"{row['piece']:,}", f"{row['bytes'] / 1e9:.2f} GB", f"{100 * row['share']:.1f}%")


def curves(result: dict[str, Any]) -> Canvas:
    """Left: recall over density by pattern. Right: error of outputs."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for row in result["rows"]:
        if "recall" not in row:
            continue
        density = [x["mean"] for x in row["density"]]
        for axis, name in zip(axes, ("recall", "error"), strict=True):
            values = [x["mean"] for x in row[name]]
            spread = [x["spread"] for x in row[name]]
            label = PATTERNS[row["method"]].strip("*")
            axis.errorbar(density, values, spread, marker="o", ms=3, capsize=2, label=label)
    axes[0].set_ylabel("retained attention (recall)")
    axes[1].set_ylabel("error of outputs, relative")
    for axis in axes:
        axis.set_xlabel("computed share of causal pairs")
        axis.set_ylim(0, np.ceil(10 * axis.get_ylim()[1]) / 10)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


TABLES: tuple[Rendered, ...] = (
    Statements("sparse-statements", PAGE, QUALITY),
    Table(
        "sparse-patterns",
        PAGE,
        QUALITY,
        ("pattern", *(f"budget {i + 1}" for i in range(4))),
        curve_row,
        keep=lambda row: "recall" in row,
    ),
    Table(
        "sparse-refinement",
        PAGE,
        QUALITY,
        ("raised", "total budget", "passes", "lowest recall", "mean recall", "heads at the cap"),
        refined_row,
        keep=lambda row: "budget" in row,
    ),
    Table(
        "sparse-speed",
        PAGE,
        COST,
        ("tokens", "policy", "density", "recall", "seconds", "tokens/s", "over fastest dense"),
        speed_row,
        keep=lambda row: row["kind"] == "speed",
    ),
    Table(
        "sparse-memory",
        PAGE,
        COST,
        ("tokens per piece", "temporary memory", "of all at once"),
        memory_row,
        keep=lambda row: row["kind"] == "memory",
    ),
)

FIGURES = (Figure("experiments/results/sparse_prefill.svg", QUALITY, curves),)
