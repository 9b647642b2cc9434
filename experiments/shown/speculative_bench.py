"""What the documents show of the bench of all drafters."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number
from experiments.speculative_bench import RATIOS

PAGE = "research/speculative/README.md"
SMOLLM2 = "speculative_bench_smollm2_135m"
BATCHES = "speculative_bench_smollm2_135m_batches"
SPEC_BENCH = "speculative_bench_smollm2_135m_spec_bench"
SHIPPED = "speculative_bench_python_5m"
NAMES = {
    "none": "plain decoding",
    "lookup": "prompt lookup",
    "recycling": "Token Recycling",
    "draft": "draft model",
    "clover": "Clover-2",
    "medusa": "Medusa",
    "eagle": "EAGLE",
    "eagle2": "EAGLE-2",
    "longspec": "LongSpec",
    "longspec-chain": "LongSpec, chain",
    "specdec": "SpecDec++",
    "swift": "SWIFT",
    "del": "DEL",
}
"""By the part of a drafter's name that says what it is."""
POSITIONS = 4
"""Positions of a draft whose acceptance is shown."""


def label(name: str) -> str:
    """A side's name in tables."""
    kind, _, wanted = name.partition(":")
    if kind == "tuned" and wanted:
        return f"**{label(wanted)}, size by cost**"
    if kind == "found" and wanted:
        return f"{label(wanted)}, search ended"
    if kind == "swift" and wanted:
        return f"{NAMES[kind]}, chain of {wanted}"
    return NAMES.get(kind, name)


def kind(name: str) -> Any:
    """A filter of rows by their kind."""
    return lambda row: row["kind"] == name


def side_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a side on a category."""
    ours = "tokens_per_pass" in row
    return (
        row["category"],
        f"{row['temperature']:g}",
        label(row["drafter"]),
        f"{row['tokens_per_pass']:.2f}" if ours else "",
        f"{row['layer_passes']:.2f}" if ours else "",
        f"{row['drafted_per_emitted']:.2f}" if ours else "",
        accepted(row["by_depth"]) if ours else "",
        number(row["tokens_per_second"], 1),
        number(row["speedup"]) + "x",
    )


def accepted(by_depth: Sequence[float]) -> str:
    """In how many of a hundred rounds the first positions of a draft were kept."""
    return ", ".join(f"{100 * share:.0f}" for share in by_depth[:POSITIONS])


def nodes(row: dict[str, Any]) -> str:
    """The most nodes of a draft; of prompt lookup also its lengths, if they differ."""
    lengths = row.get("lengths") or ()
    differ = len(set(lengths)) > 1
    return f"{row['width']}" + (f" ({', '.join(map(str, lengths))})" if differ else "")


def summary_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a drafter over all categories, greedily."""
    exact = row["exactness"]
    fine = exact["differing"] == exact["near_ties"]
    return (
        label(row["method"]),
        nodes(row),
        f"{row['tokens_per_pass']:.2f}",
        f"{row['draft_cost']:.3f}",
        *(f"{row['modelled'][f'{c:g}']:.2f}x" for c in RATIOS),
        number(row["mean_speedup"]) + "x",
        f"{number(row['best_speedup'])}x ({row['best_category']})",
        f"{(row['param_bytes'] + row['state_bytes']) / 2**20:.1f} MiB",
        f"{'yes' if fine else '**no**'} ({exact['near_ties']} near-ties in {exact['tokens']})",
    )


def cost_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the cost of a pass."""
    return (str(row["width"]), f"{1000 * row['seconds']:.1f}", f"{row['ratio']:.2f}")


def layout_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the two layouts of matrices at one width."""
    plain, rows = ({k: 1000 * row[n][k] for k in ("mean", "spread")} for n in ("plain", "rows"))
    return (str(row["width"]), number(plain, 1), number(rows, 1), number(row["speedup"]) + "x")


def batch_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a batch."""
    return (
        label(row["drafter"]),
        str(row["batch"]),
        number(row["tokens_per_second"], 1),
        number(row["speedup"]) + "x",
    )


def ranking(result: dict[str, Any]) -> Canvas:
    """Left: greedy speedup by category and side. Right: the cost of a pass by its width."""
    sides = [r for r in result["rows"] if r["kind"] == "side" and r["temperature"] == 0]
    categories = list(dict.fromkeys(r["category"] for r in sides))
    names = list(dict.fromkeys(r["drafter"] for r in sides))
    means = {
        name: np.mean([r["speedup"]["mean"] for r in sides if r["drafter"] == name])
        for name in names
    }
    names.sort(key=lambda name: means[name], reverse=True)
    figure, (bars, curve) = plt.subplots(
        1, 2, figsize=(10, 0.5 * len(names) + 1.6), width_ratios=(2, 1)
    )
    height = 0.8 / len(categories)
    for i, category in enumerate(categories):
        by = {r["drafter"]: r["speedup"] for r in sides if r["category"] == category}
        bars.barh(
            [n + (i - (len(categories) - 1) / 2) * height for n in range(len(names))],
            [by[name]["mean"] for name in names],
            xerr=[by[name]["spread"] for name in names],
            height=height,
            label=category,
            error_kw={"lw": 0.8},
        )
    bars.set_yticks(range(len(names)), [label(name).strip("*") for name in names])
    bars.invert_yaxis()
    bars.axvline(1.0, color="black", lw=0.8)
    bars.set_xlabel("tokens per second over plain decoding (greedy, batch 1)")
    bars.legend(fontsize=7)
    costs = [r for r in result["rows"] if r["kind"] == "cost"]
    curve.plot([r["width"] for r in costs], [r["ratio"] for r in costs], marker="o", ms=3)
    curve.set(xlabel="tokens of a pass", ylabel="seconds over those of one token")
    curve.set_ylim(0)
    for axis in (bars, curve):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


SIDE_HEADER = (
    "prompts", "temperature", "drafter", "tokens per pass", "all layers per token",
    "drafted per token", f"% kept at positions 1 to {POSITIONS}", "tokens/s", "over plain",
)  # fmt: skip
SUMMARY_HEADER = (
    "drafter", "nodes", "tokens per pass", "draft cost",
    *(f"modelled, pass {c:g}" for c in RATIOS),
    "measured, mean of categories", "measured, best", "memory", "exact",
)  # fmt: skip
COST_HEADER = ("tokens of a pass", "ms", "over one token")

BATCH_HEADER = ("drafter", "batch", "tokens/s", "over plain")


TABLES: tuple[Rendered, ...] = (
    Table("bench-summary", PAGE, SMOLLM2, SUMMARY_HEADER, summary_row, kind("summary")),
    Statements("bench-statements", PAGE, SMOLLM2, unit="repeats"),
    Table("bench-sides", PAGE, SMOLLM2, SIDE_HEADER, side_row, kind("side")),
    Table("bench-spec", PAGE, SPEC_BENCH, SUMMARY_HEADER, summary_row, kind("summary")),
    Table("bench-spec-sides", PAGE, SPEC_BENCH, SIDE_HEADER, side_row, kind("side")),
    Table("bench-shipped", PAGE, SHIPPED, SUMMARY_HEADER, summary_row, kind("summary")),
    Statements("bench-shipped-statements", PAGE, SHIPPED, unit="repeats"),
    Table("bench-shipped-sides", PAGE, SHIPPED, SIDE_HEADER, side_row, kind("side")),
    Table("bench-shipped-batch", PAGE, SHIPPED, BATCH_HEADER, batch_row, kind("batch")),
    Table("bench-batch", PAGE, BATCHES, BATCH_HEADER, batch_row, kind("batch")),
    Table("bench-cost", PAGE, SMOLLM2, COST_HEADER, cost_row, kind("cost")),
    Table(
        "bench-layout",
        PAGE,
        "bench_layout",
        ("tokens of a pass", "ms, plain", "ms, by rows", "plain over rows"),
        layout_row,
    ),
)
FIGURES = (Figure("experiments/results/speculative_bench.svg", SMOLLM2, ranking),)
