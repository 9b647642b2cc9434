"""What the documents show of LongSpec: agreement by position, passes, attention in two parts."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number
from experiments.shown.long_context import percent

PAGE = "research/speculative/longspec/README.md"
RESULT = "longspec_python_5m"
OTHERS = "longspec_python_5m_policies"
NAMES = {
    "full": "**LongSpec**",
    "no-offset": "trained at short positions only",
    "no-noise": "trained with nothing hidden",
    "window-only": "without the target's keys",
    "full-window": "all of its own keys",
    "lookup": "prompt lookup",
}
NEAR, FAR = 256, 2048
DRAFT_HEADER = (
    "draft",
    f"right up to {NEAR}",
    f"right from 1,024 to {FAR:,}",
    "steps 2 to 4 there",
    "tokens per pass, chain",
    "tree",
    "bytes of its own at 4,096",
    "at 16,384",
)


def is_draft(row: dict[str, Any]) -> bool:
    """Whether the row is a draft or a rival, not a timing."""
    return row["method"] in NAMES


def draft_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a draft; a rival has tokens per pass only."""
    name = NAMES[row["method"]]
    if "edges" not in row:
        return (name, "", "", "", "", number(row["tokens_per_pass"]), "", "")
    later = ", ".join(percent(row[f"top1@{FAR}/step{step}"], 1) for step in (2, 3, 4))
    return (
        name,
        percent(row[f"top1@{NEAR}/step1"], 1),
        percent(row[f"top1@{FAR}/step1"], 1),
        later,
        number(row["tokens_per_pass/chain"]),
        number(row["tokens_per_pass/tree"]),
        f"{row['bytes']['bytes@4096']:,}",
        f"{row['bytes']['bytes@16384']:,}",
    )


OTHER_HEADER = (
    "policy",
    f"right up to {NEAR}",
    f"right from 1,024 to {FAR:,}",
    "steps 2 to 4 there",
    "tokens per pass, chain",
    "tree",
    "texts that differ",
)


def policy_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a policy that one draft decodes under."""
    later = ", ".join(percent(row[f"top1@{FAR}/step{step}"], 1) for step in (2, 3, 4))
    return (
        row["policy"],
        percent(row[f"top1@{NEAR}/step1"], 1),
        percent(row[f"top1@{FAR}/step1"], 1),
        later,
        number(row["tokens_per_pass/chain"]),
        number(row["tokens_per_pass/tree"]),
        f"{row['mismatches/chain']['max'] + row['mismatches/tree']['max']:.0f}",
    )


ATTENTION_HEADER = ("slots", "dense, ms", "two parts, ms", "largest difference")


def is_timing(row: dict[str, Any]) -> bool:
    """Whether the row compares the two ways to attend."""
    return "dense_ms" in row


def attention_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a size of the cache."""
    return (
        f"{int(row['method'].removeprefix('attention-')):,}",
        number(row["dense_ms"], 1),
        number(row["hybrid_ms"], 1),
        f"{row['error']['mean']:.0e}",
    )


def agreement(result: dict[str, Any]) -> Canvas:
    """How often the draft's best token is the target's by position, at two of its steps."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, step in zip(axes, (1, 3), strict=True):
        for row in filter(lambda row: "edges" in row, result["rows"]):
            found = [row[f"top1@{edge}/step{step}"] for edge in row["edges"]]
            means, spreads = ([v[k] for v in found] for k in ("mean", "spread"))
            label = NAMES[row["method"]].strip("*")
            axis.errorbar(row["edges"], means, spreads, marker="o", ms=3, capsize=2, label=label)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="positions up to", title=f"step {step} of a draft", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of tokens that are the target's")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


TABLES: tuple[Rendered, ...] = (
    Table("longspec", PAGE, RESULT, DRAFT_HEADER, draft_row, is_draft),
    Statements("longspec-statements", PAGE, RESULT),
    Table("longspec-policies", PAGE, OTHERS, OTHER_HEADER, policy_row),
    Table("longspec-attention", PAGE, RESULT, ATTENTION_HEADER, attention_row, is_timing),
)
FIGURES = (Figure("experiments/results/longspec.svg", RESULT, agreement),)
