"""What the documents show of what is not lossless: superposed drafts, and RAPID."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number
from experiments.shown.long_context import percent

SUPERPOSED = {
    "greedy": "greedy",
    "nucleus": "one nucleus sample",
    "nucleus-k": "a nucleus sample per draft",
    "beam": "beam search",
    "ngrams": "n-grams alone",
    "superposed": "**superposed drafts**",
    "unsmoothed": "superposed, without n-grams",
}
SUPERPOSED_HEADER = (
    "method",
    "best of a prompt",
    "mean",
    "by rank",
    "distinct tokens",
    "distinct pairs",
    "passes per prompt",
    "seconds for all",
)


def superposed_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the comparison: perplexities, how much drafts differ, passes times rows, seconds."""
    return (
        SUPERPOSED[row["method"]],
        number(row["best"]),
        number(row["mean"]),
        ", ".join(f"{one['mean']:.1f}" for one in row["ranked"]),
        number(row["distinct1"]),
        number(row["distinct2"]),
        number(row["passes"], 0),
        number(row["seconds"]),
    )


LINEARITY_HEADER = ("alpha", "temperature", "tables", "linearity by token", "centred")


def has_linearity(row: dict[str, Any]) -> bool:
    """Only the smoothed drafts have the curve."""
    return "linearity" in row


def linearity_row(row: dict[str, Any]) -> tuple[str, ...]:
    """What the grid chose, and the cosines of LM(mix) and the mix of LM(each), token by token."""
    curves = [
        " ".join(f"{step[name]['mean']:.2f}" for step in row["linearity"])
        for name in ("raw", "centred")
    ]
    megabytes = f"{row['table_bytes'] / 1e6:.0f} MB"
    return (f"{row['alpha']:g}", f"{row['temperature']:g}", megabytes, *curves)


RAPID_HEADER = (
    "method",
    "right answers",
    "with irrelevant retrieval",
    "log-probability of the true answer",
    "accepted of drafted",
    "target passes per token",
    "MB of keys and values read per token",
)


def rapid_name(method: str) -> str:
    """A method of the comparison in words."""
    kind, _, eta = method.partition("-")
    words = {"long": "the target alone", "retrieved": "the retrieved context alone"}
    return f"RAPID, eta {eta}" if kind == "eta" else words.get(method, "the mean of both logits")


def rapid_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a method."""

    def cell(name: str, digits: int) -> str:
        return number(row[name], digits) if name in row else ""

    megabytes = (
        {k: row["kv_bytes"][k] / 1e6 for k in ("mean", "spread")} if "passes" in row else None
    )
    return (
        rapid_name(row["method"]),
        percent(row["accuracy"]),
        percent(row["accuracy_irrelevant"]) if "accuracy_irrelevant" in row else "",
        cell("likelihood", 3),
        cell("acceptance", 3),
        cell("passes", 3),
        number(megabytes, 2) if megabytes else "",
    )


def rapid_curve(result: dict[str, Any]) -> Canvas:
    """Right answers and acceptance against eta, with relevant and irrelevant retrieval."""
    rows = {row["method"]: row for row in result["rows"]}
    etas = [float(name[4:]) for name in rows if name.startswith("eta-")]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    lines = (
        (axes[0], "accuracy", "retrieved for the question"),
        (axes[0], "accuracy_irrelevant", "retrieved for another question"),
        (axes[1], "acceptance", "accepted of drafted"),
    )
    for axis, name, label in lines:
        found = [rows[f"eta-{eta:g}"][name] for eta in etas]
        means, spreads = ([v[k] for v in found] for k in ("mean", "spread"))
        axis.errorbar(etas, means, spreads, marker="o", ms=3, capsize=2, label=label)
    for name, style in (("long", "-"), ("retrieved", ":"), ("average", "--")):
        if name in rows:
            level = rows[name]["accuracy"]["mean"]
            axes[0].axhline(level, color="#80868b", ls=style, lw=1, label=rapid_name(name))
    for axis, label in zip(axes, ("right answers", "accepted of drafted"), strict=True):
        axis.set(xlabel="eta", ylabel=label, ylim=(0, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


SUPERPOSED_PAGE = "research/speculative/superposed/README.md"
SUPERPOSED_RESULT = "superposed_python_5m"
RAPID_PAGE = "research/speculative/rapid/README.md"
RAPID_RESULT = "rapid_records_11m_256"
RAPID_MORE = {
    "rapid-far": "rapid_records_11m_512",
    "rapid-upward": "rapid_python_5m_256_by_records_11m",
    "rapid-vectors": "rapid_records_11m_256_vectors",
}
"""Beyond the trained length, with a larger drafter, and with an encoder that retrieves."""

TABLES: tuple[Rendered, ...] = (
    Table("superposed", SUPERPOSED_PAGE, SUPERPOSED_RESULT, SUPERPOSED_HEADER, superposed_row),
    Table(
        "superposed-linearity", SUPERPOSED_PAGE, SUPERPOSED_RESULT, LINEARITY_HEADER,
        linearity_row, has_linearity,
    ),
    Statements("superposed-statements", SUPERPOSED_PAGE, SUPERPOSED_RESULT),
    Table("rapid", RAPID_PAGE, RAPID_RESULT, RAPID_HEADER, rapid_row),
    Statements("rapid-statements", RAPID_PAGE, RAPID_RESULT),
    *(
        Table(name, RAPID_PAGE, result, RAPID_HEADER, rapid_row)
        for name, result in RAPID_MORE.items()
    ),
    *(
        Statements(f"{name}-statements", RAPID_PAGE, result)
        for name, result in RAPID_MORE.items()
    ),
)  # fmt: skip
FIGURES = (Figure("experiments/results/rapid.svg", RAPID_RESULT, rapid_curve),)
