"""Which tables stand where. Each is shown in full: losing rows are not left out."""

from typing import Any

from experiments.methods import MethodTable
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
}


def is_exact(row: dict[str, Any]) -> bool:
    """Whether no greedy token differs from plain decoding except by near-ties between widths."""
    return all(
        e["differing"] == e["near_ties"] and e["same_width_mismatches"] == 0
        for e in row["exactness"]
    )


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


def base_model_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the base models' bits per byte."""
    size = row["parameters"]
    return (
        row["predictor"],
        "" if size is None else f"{size / 1e6:.2f}M",
        number(row["validation"], 3),
        number(row["test"], 3),
    )


BASE_MODEL_HEADER = ("predictor", "parameters", "validation, bits per byte", "test")


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


DECODE_HEADER = (
    "model",
    "side",
    "tokens per second",
    "longreach over this",
    "share of memory bandwidth",
)


def train_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the training benchmark."""
    return (
        f"`{row['config']}`, {row['parameters'] / 1e6:.2f}M parameters",
        number(row["tokens_per_second"], 0),
        number(row["step_gflops"], 0),
        number(row["matmul_gflops"], 0),
        f"{100 * row['ratio_of_best']:.0f}%",
    )


TRAIN_HEADER = (
    "config",
    "tokens per second",
    "GFLOP/s of the step",
    "GFLOP/s of a plain product",
    "ratio of the best",
)

CLOVER = "research/speculative/clover/README.md"
RECYCLING_PAGE = "research/speculative/token_recycling/README.md"

TABLES: tuple[Rendered, ...] = (
    MethodTable("methods", "WORKSPACE.md"),
    Table("speculative", "README.md", "speculative_python_5m", SPECULATIVE_HEADER, speculative_row),
    Table("speculative", CLOVER, "speculative_python_5m", SPECULATIVE_HEADER, speculative_row),
    Table("accuracy", CLOVER, "speculative_python_5m", ACCURACY_HEADER, accuracy_row, is_trained),
    Statements("statements", CLOVER, "speculative_python_5m"),
    Table("recycling", RECYCLING_PAGE, "recycling_python_5m", RECYCLING_HEADER, recycling_row),
    Statements("statements", RECYCLING_PAGE, "recycling_python_5m"),
    Table("base_model", "README.md", "base_model", BASE_MODEL_HEADER, base_model_row),
    Table(
        "base_model", "assets/python-5m/README.md", "base_model", BASE_MODEL_HEADER, base_model_row
    ),
    Table(
        "base_model", "assets/python-1m/README.md", "base_model", BASE_MODEL_HEADER, base_model_row
    ),
    Table("bench_decode", "README.md", "bench_decode", DECODE_HEADER, decode_row),
    Table("bench_train", "README.md", "bench_train", TRAIN_HEADER, train_row),
)
"""Every committed table."""
