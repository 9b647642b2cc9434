"""What the documents show of lossless speculation."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments.exactness import EXACT, is_exact
from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number

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
    "eagle-features": "the same from features alone",
    "eagle-tokens": "the same from tokens alone",
    "eagle-chain": "the same over a chain",
    "eagle-2": "the same over EAGLE-2's tree",
}


def label(row: dict[str, Any]) -> str:
    """A drafter's name in tables."""
    shared = ", frozen head plus rank-64 maps" if row["shared_head"] else ""
    return METHODS[row["method"]] + shared


def speculative_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the drafter comparison."""
    ties = sum(e["near_ties"] for e in row["exactness"])
    total = sum(e["tokens"] for e in row["exactness"])
    return (
        label(row),
        number(row["tokens_per_pass@0"]),
        number(row["tokens_per_pass@1"]),
        number(row["draft_cost"], 3),
        *(number(row[f"modelled_speedup@{t}"]) + "x" for t in "01"),
        *(number(row[f"measured_speedup@{t}"]) + "x" for t in "01"),
        f"{'yes' if is_exact(row) else '**no**'} ({ties} near-ties in {total})",
    )


SPECULATIVE_HEADER = (
    "drafter",
    "tokens per pass, T = 0",
    "T = 1",
    "draft cost",
    "modelled speedup, T = 0",
    "T = 1",
    "measured here, T = 0",
    "T = 1",
    "exact",
)


COUNTED_HEADER = (*SPECULATIVE_HEADER[:6], SPECULATIVE_HEADER[8])


def counted_row(row: dict[str, Any]) -> tuple[str, ...]:
    """The same without seconds, of a run beside which the machine did other work."""
    cells = speculative_row(row)
    return (*cells[:6], cells[8])


HEADS = 5


def accuracy_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the accuracy per head, in percent: the guess is right (is among the best three)."""
    cells = [label(row)]
    for i in range(1, HEADS + 1):
        both = [row["accuracy"].get(f"top{k}/head{i}") for k in (1, 3)]
        means = [100 * sample["mean"] for sample in both if sample is not None]
        cells.append("{:.1f} ({:.1f})".format(*means) if len(means) == 2 else "")
    return tuple(cells)


def is_trained(row: dict[str, Any]) -> bool:
    """Whether the row's drafter has heads of its own, shown once per training."""
    return bool(row["accuracy"]) and row["method"] != "medusa-63"


ACCURACY_HEADER = ("drafter", *(f"head {i}" for i in range(1, HEADS + 1)))


RECYCLING = {
    "recycling": "**Token Recycling**",
    "accepted": "learning from accepted nodes only",
    "frozen": "frozen after five prompts",
    "chain": "chain of 6 in place of the tree",
    "bigrams": "corpus bigrams, frozen, same tree",
    "lookup": "prompt lookup, 10 tokens",
}


def recycling_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of Token Recycling's own experiment."""
    low, high = (speedup["mean"] for speedup in row["modelled_speedup"])
    ties = sum(e["near_ties"] for e in row["exactness"])
    return (
        RECYCLING[row["method"]],
        number(row["tokens_per_pass"]),
        number(row["first"]),
        number(row["last"]),
        f"{100 * row['duplicates']['mean']:.0f}%",
        f"{low:.2f}x to {high:.2f}x",
        f"{'yes' if is_exact(row) else '**no**'} ({ties} near-ties)",
    )


RECYCLING_HEADER = (
    "drafter",
    "tokens per pass",
    "first five prompts",
    "last half",
    "repeated siblings",
    "modelled speedup, last half",
    "exact",
)


# Colours tell what needs training from what does not.
COLOURS = {"plain": "#9aa0a6", "free": "#1a73e8", "trained": "#e8710a"}
FREE = ("lookup", "recycling", "draft")


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


CLOVER = "research/speculative/clover/README.md"
SMOLLM2 = "speculative_smollm2_135m"
EAGLE_PAGE = "research/speculative/README.md"
EAGLE = "speculative_python_5m_eagle"
EAGLE_SAID = (
    "EAGLE's layer is right more often than one that sees no tokens",
    "EAGLE's layer is right more often than one that sees no features",
    "EAGLE's static tree takes more tokens per pass than a chain as deep",
    "EAGLE-2's tree takes at least as many as the static one of equal size",
    EXACT.text,
)
RECYCLING_PAGE = "research/speculative/token_recycling/README.md"

TABLES: tuple[Rendered, ...] = (
    Table("speculative", "README.md", "speculative_python_5m", SPECULATIVE_HEADER, speculative_row),
    Table("speculative", CLOVER, "speculative_python_5m", SPECULATIVE_HEADER, speculative_row),
    Table("accuracy", CLOVER, "speculative_python_5m", ACCURACY_HEADER, accuracy_row, is_trained),
    Statements("statements", CLOVER, "speculative_python_5m"),
    Table("speculative_smollm2", "README.md", SMOLLM2, SPECULATIVE_HEADER, speculative_row),
    Table("speculative_smollm2", CLOVER, SMOLLM2, SPECULATIVE_HEADER, speculative_row),
    Table("accuracy_smollm2", CLOVER, SMOLLM2, ACCURACY_HEADER, accuracy_row, is_trained),
    Statements("statements_smollm2", CLOVER, SMOLLM2),
    Table("eagle", EAGLE_PAGE, EAGLE, COUNTED_HEADER, counted_row),
    Table("eagle-accuracy", EAGLE_PAGE, EAGLE, ACCURACY_HEADER, accuracy_row, is_trained),
    Statements("eagle-statements", EAGLE_PAGE, EAGLE, EAGLE_SAID),
    Table("recycling", RECYCLING_PAGE, "recycling_python_5m", RECYCLING_HEADER, recycling_row),
    Statements("statements", RECYCLING_PAGE, "recycling_python_5m"),
)

FIGURES = (Figure("experiments/results/speculative.svg", "speculative_python_5m", tokens_per_pass),)
