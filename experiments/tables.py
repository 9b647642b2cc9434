"""Which tables stand where. Each is shown in full: losing rows are not left out."""

from typing import Any

from experiments.methods import MethodTable
from experiments.report import Rendered, number

METHODS = {
    "none": "plain decoding",
    "lookup": "prompt lookup (no training)",
    "recycling": "Token Recycling (no training)",
    "draft": "draft model",
    "medusa": "Medusa, 4 heads",
    "medusa-63": "Medusa, its own 63-node tree",
    "clover": "**Clover-2**",
    "clover-no-regression": "Clover-2 without regression",
    "clover-no-augment": "Clover-2 without augmenting block",
    "clover-no-distill": "Clover-2 without distillation",
    "clover1": "Clover-1 (reconstruction)",
    "eagle-like": "one-layer EAGLE-like",
}


def is_exact(row: dict[str, Any]) -> bool:
    """Whether no greedy token differs from plain decoding except by near-ties between widths."""
    return all(
        e["differing"] == e["near_ties"] and e["same_width_mismatches"] == 0
        for e in row["exactness"]
    )


def speculative_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the drafter comparison."""
    ties = sum(e["near_ties"] for e in row["exactness"])
    total = sum(e["tokens"] for e in row["exactness"])
    return (
        METHODS[row["method"]],
        number(row["tokens_per_pass@0"]),
        number(row["tokens_per_pass@1"]),
        number(row["draft_cost"], 3),
        number(row["modelled_speedup"]) + "x",
        number(row["measured_speedup"]) + "x",
        f"{'yes' if is_exact(row) else '**no**'} ({ties} near-ties in {total})",
    )


SPECULATIVE_HEADER = (
    "drafter",
    "tokens per pass, greedy",
    "temperature 1",
    "draft cost",
    "modelled speedup",
    "measured here",
    "exact",
)


def decode_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the decoding benchmark."""
    share = row["bandwidth_share"]
    return (
        row["model"],
        row["side"],
        number(row["tokens_per_second"], 1),
        f"{row['ours_over_this']:.2f}x",
        "" if share is None else f"{100 * share:.0f}%",
    )


TABLES: tuple[Rendered, ...] = (MethodTable("methods", "WORKSPACE.md"),)
"""Every committed table."""
