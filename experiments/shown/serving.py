"""What the documents show of batched speculation and of SpecDec++."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number
from experiments.shown.long_context import percent

KINDS = {
    "plain": "plain decoding, static batches",
    "realigned": "speculation, padded batches, realigned (EQSPEC as published)",
    "static": "speculation, ragged batches (EQSPEC here)",
    "pool": "**speculation, a pool that is filled again**",
    "exspec": "speculation, groups of equal length (EXSPEC)",
}
BATCH_HEADER = (
    "decoding",
    "rows",
    "target passes per token",
    "tokens per second",
    "slots read per row and pass",
    "grouped steps",
    "exact, near-ties, wrong",
)
CHECKS = {
    "permuted": "prompts in another order",
    "poisoned": "garbage in every stale slot",
    "padded": "the paper's padded form",
    "padded-positions": "its positions not rolled back",
    "padded-cache": "its cache not cut",
    "padded-bonus": "its bonus from the draft model",
    "padded-growth": "its padding grown, its cache not moved",
}
CHECK_HEADER = ("check", "exact", "near-ties", "wrong")


def is_decoding(row: dict[str, Any]) -> bool:
    """Whether the row is a way to decode at one batch size."""
    return "tokens_per_second" in row


def batch_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one way to decode at one batch size."""
    kind, batch = row["method"].split("-")
    grouped = f"{100 * row['grouping_rate']['mean']:.0f}%" if kind == "exspec" else ""
    return (
        KINDS[kind],
        batch,
        number(row["passes_per_token"], 3),
        number(row["tokens_per_second"], 0),
        number(row["slots_read_per_pass"], 0),
        grouped,
        ", ".join(str(n) for n in row["outcome"].values()),
    )


def is_check(row: dict[str, Any]) -> bool:
    """Whether the row is a check of the harness."""
    return row["method"] in CHECKS


def check_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a check."""
    return (CHECKS[row["method"]], *(str(n) for n in row["outcome"].values()))


REALIGNING_HEADER = ("rows", "kB copied per token", "share of the time")


def is_realigned(row: dict[str, Any]) -> bool:
    """Whether the row is of padded batches, which are realigned."""
    return row["method"].startswith("realigned-")


def realigning_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of what realigning took at one batch size."""
    kilobytes = {k: row["copied_per_token"][k] / 1e3 for k in ("mean", "spread")}
    return (
        row["method"].split("-")[1],
        number(kilobytes, 0),
        percent(row["realigning_share"], 1),
    )


GROUPING = {"random": "lengths as asked", "narrow": "cut to nearly one length"}


def is_grouping(row: dict[str, Any]) -> bool:
    """Whether the row tells how often EXSPEC grouped some requests."""
    return row["method"] in GROUPING


def grouping_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of how often EXSPEC grouped."""
    return (GROUPING[row["method"]], percent(row["grouping_rate"]))


RATE_HEADER = (
    "rule",
    "passes per token",
    "discarded per token",
    "tokens per pass",
    *(f"cost of a token, ratio {r}" for r in (4, 8, 16)),
)


def is_rule(row: dict[str, Any]) -> bool:
    """Whether the row is a rule at one setting."""
    return "verified" in row


def rate_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a rule at one setting."""
    name = row["method"]
    return (
        f"**{name}**" if name.startswith("specdec") else name,
        number(row["verified"], 3),
        number(row["discarded"], 3),
        number(row["tokens_per_pass"]),
        *(number(row[f"cost@{r}"], 3) for r in (4, 8, 16)),
    )


HEAD_HEADER = ("head", "AUC", "calibration error", "KL", "mean label", "mean prediction")


def is_head(row: dict[str, Any]) -> bool:
    """Whether the row is the evaluation of a head."""
    return "auc" in row


def head_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a head's evaluation."""
    names = ("auc", "calibration_error", "kl", "label", "prediction")
    return (row["method"].removeprefix("head-"), *(number(row[n], 3) for n in names))


CURVES = {
    "fixed": ("fixed lengths", "#9aa0a6"),
    "confidence": ("confidence", "#1a73e8"),
    "entropy": ("entropy", "#12b5cb"),
    "target-text": ("SpecDec++, target's text only", "#f9c08c"),
    "specdec": ("SpecDec++", "#e8710a"),
}


def rates(result: dict[str, Any]) -> Canvas:
    """Discarded tokens against target passes, both per emitted token: lower left is better."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for name, (label, colour) in CURVES.items():
        rows = [r for r in result["rows"] if is_rule(r) and r["method"].rpartition("-")[0] == name]
        points = sorted((r["verified"]["mean"], r["discarded"]["mean"]) for r in rows)
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=label)
    for name, marker in (("heuristic", "s"), ("oracle", "*")):
        for r in result["rows"]:
            if r["method"] == name:
                point = r["verified"]["mean"], r["discarded"]["mean"]
                axis.plot(*point, marker, color="black", label=name)
    axis.set_xlabel("target passes per token")
    axis.set_ylabel("discarded drafted tokens per token")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


BATCH_PAGE = "research/speculative/batch_spec/README.md"
BATCH_RESULT = "batch_speculation_python_5m"
SPECDEC_PAGE = "research/speculative/specdec_pp/README.md"
SPECDEC_RESULT = "specdec_pp_python_5m"

TABLES: tuple[Rendered, ...] = (
    Table("batch", BATCH_PAGE, BATCH_RESULT, BATCH_HEADER, batch_row, is_decoding),
    Table(
        "batch-realigning", BATCH_PAGE, BATCH_RESULT, REALIGNING_HEADER, realigning_row,
        is_realigned,
    ),
    Table("batch-checks", BATCH_PAGE, BATCH_RESULT, CHECK_HEADER, check_row, is_check),
    Table(
        "batch-grouping",
        BATCH_PAGE,
        BATCH_RESULT,
        ("requests", "steps with rows of equal length"),
        grouping_row,
        is_grouping,
    ),
    Statements("batch-statements", BATCH_PAGE, BATCH_RESULT),
    Table("specdec-rates", SPECDEC_PAGE, SPECDEC_RESULT, RATE_HEADER, rate_row, is_rule),
    Table("specdec-heads", SPECDEC_PAGE, SPECDEC_RESULT, HEAD_HEADER, head_row, is_head),
    Statements("specdec-statements", SPECDEC_PAGE, SPECDEC_RESULT),
)  # fmt: skip
FIGURES = (Figure("experiments/results/specdec_pp.svg", SPECDEC_RESULT, rates),)
