"""What the documents show of long-context evaluation: tables, short beside long."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments import context_statements, context_steps, record
from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, caption, markdown, number
from experiments.shown.long_context_figures import curves, distances, heat_maps, of_kind
from experiments.statements import Statement

PAGE = "research/context/README.md"
LOSS_HEADER = (
    "policy",
    "loss within the trained length",
    "against dense",
    "loss of the last tokens",
    "against dense",
    "above the same tokens in range",
    "effective length",
)
TASK_HEADER = (
    "policy",
    "task",
    "in range",
    "against dense",
    "longest",
    "chance",
    "effective length",
)


def signed(value: dict[str, Any], digits: int = 3) -> str:
    """``mean ± spread`` with the sign of the mean."""
    plus = "+" if value["mean"] > 0 else ""
    return f"{plus}{number(value, digits)}"


def loss_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a policy's summary of losses, in nats per token."""
    return (
        row["policy"],
        number(row["short_loss"], 3),
        signed(row["short_change"]),
        number(row["long_loss"], 3),
        signed(row["long_change"]),
        signed(row["long_excess"]),
        f"{row['effective']['mean']:,}",
    )


def task_rows(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a policy's accuracies, a row per task."""
    return [
        (
            row["policy"],
            name,
            percent(task["short"]),
            signed({k: 100 * task["short_change"][k] for k in ("mean", "spread")}, 0),
            percent(task["long"]),
            f"{100 * task['chance']:.1f}%",
            "cannot do it" if task["effective"] is None else f"{task['effective']['mean']:,}",
        )
        for name, task in row["tasks"].items()
    ]


def percent(value: dict[str, Any], digits: int = 0) -> str:
    """``mean ± spread`` of a share, in percent."""
    return f"{number({k: 100 * value[k] for k in ('mean', 'spread')}, digits)}%"


@dataclasses.dataclass(frozen=True)
class Losses:
    """The table of losses of one result: every policy, short beside long."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        rows = [loss_row(row) for row in of_kind(result, "summary") if "short_loss" in row]
        return f"{markdown(LOSS_HEADER, rows)}\n\n{lengths_of(result)} {caption(result)}"


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """The table of tasks of one result: every policy, short beside long."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        rows = [cells for row in of_kind(result, "summary") for cells in task_rows(row)]
        return f"{markdown(TASK_HEADER, rows)}\n\n{lengths_of(result)} {caption(result)}"


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention on the evidence by policy, task and length: the best head's, and all heads'."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        found: dict[tuple[str, str], list[str]] = {}
        shares: dict[int, dict[str, Any]] = {}
        for row in of_kind(result, "attention"):
            shares[row["length"]] = row["share"]
            cells = found.setdefault((row["policy"], row["task"]), [])
            cells.append(f"{percent(row['best'])} ({percent(row['mass'], 1)})")
        header = ("policy", "task", *(f"{length:,}" for length in shares))
        tokens = ("share of tokens", "", *(percent(share, 1) for share in shares.values()))
        rows = [tokens, *((*key, *cells) for key, cells in found.items())]
        return f"{markdown(header, rows)}\n\n{caption(result)}"


@dataclasses.dataclass(frozen=True)
class ByLength:
    """Some policies by the length of texts: loss of the last tokens, or accuracy of a task.

    Behind a loss stands what it is above the same tokens read in range.
    """

    name: str
    result: str
    document: str
    policies: tuple[str, ...]
    task: str = ""

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        kind = "task" if self.task else "loss"
        rows = [row for row in of_kind(result, kind) if row.get("task", "") == self.task]
        lengths = sorted({row["length"] for row in rows})
        found = {(row["policy"], row["length"]): self._cell(row) for row in rows}
        cells = [(name, *(found[name, n] for n in lengths)) for name in self.policies]
        header = ("policy", *(f"{n:,}" for n in lengths))
        return f"{markdown(header, cells)}\n\n{caption(result)}"

    def _cell(self, row: dict[str, Any]) -> str:
        if self.task:
            return percent(row["accuracy"])
        return f"{number(row['nats'][-1], 2)} ({signed(row['excess'][-1], 2)})"


def lengths_of(result: dict[str, Any]) -> str:
    """What short, long and effective mean in this result."""
    row, config = of_kind(result, "summary")[0], result["config"]
    return (
        f"Trained length {row['trained']:,}; in range: {row['short']:,} tokens, longest: "
        f"{row['long']:,}. Effective: up to {config['loss_threshold']} nats above the loss in "
        f"range, or at least {100 * config['accuracy_threshold']:.0f}% of the dense accuracy there."
    )


def tables(
    name: str, result: str, kinds: Sequence[str] = ("loss", "task"), document: str = PAGE
) -> tuple[Rendered, ...]:
    """The tables of one result, by the name of its markers: of loss, tasks and attention."""
    made: dict[str, Rendered] = {
        "loss": Losses(f"{name}-loss", result, document),
        "task": Accuracies(f"{name}-tasks", result, document),
        "attention": Attention(f"{name}-attention", result, document),
    }
    return tuple(made[kind] for kind in kinds)


def figures(result: str, kinds: Sequence[str] = ("loss", "task")) -> tuple[Figure, ...]:
    """The figures of one result: of loss and of tasks."""
    path = f"experiments/results/{result}"
    made = {
        "loss": (Figure(f"{path}.svg", result, curves),),
        "task": (
            Figure(f"{path}_depth.svg", result, heat_maps),
            Figure(f"{path}_distance.svg", result, distances),
        ),
    }
    return tuple(figure for kind in kinds for figure in made[kind])


METHODS = "context_methods"
ATTENTION = "long_context_records_11m_attention"
TASKS = "long_context_records_11m_tasks"
SPARSE = "long_context_records_11m_sparse"
SMOLLM2 = "long_context_smollm2_135m_smollm2_loss"
SMOLLM2_PASSKEY = "long_context_smollm2_135m_smollm2_passkey"
SMOLLM2_32K = "long_context_smollm2_135m_32k"
STEPS = "context_steps"
CLEX_PAGE = "research/context/clex/README.md"
BASELINES = ("dense", "window")
GIRAFFE = (
    *BASELINES, "linear 4", "power 0.1", "power 0.5", "truncated", "rope, tuned", "window, tuned",
    "NTK 4, tuned", "YaRN 4, tuned", "linear 4, tuned", "linear 4, tuned, read at 8",
    "power 0.1, tuned", "power 0.5, tuned", "truncated, tuned", "randomised, tuned", "xPos, tuned",
)  # fmt: skip
CLEX = (
    *BASELINES, "dynamic NTK", "rope, tuned at 256", "rope, tuned at 256, rate for 256",
    "linear 4, tuned at 256",
    "random positions at 256", "CLEX, analytic field only", "CLEX",
)  # fmt: skip
QWEN = (
    *BASELINES, "linear 4", "NTK 4", "dynamic NTK", "YaRN 4", "dual chunk",
    "dual chunk, temperature", "dual chunk, tuned on text", "dual chunk, tuned on text and tasks",
)  # fmt: skip


def pages(
    method: str, policies: tuple[str, ...], asked: Sequence[Statement], tasks: Sequence[str]
) -> tuple[Rendered, ...]:
    """What a method's own page shows of the comparison."""
    page, texts = f"research/context/{method}/README.md", tuple(s.text for s in asked)
    return (
        Statements(f"{method}-statements", page, METHODS, texts),
        ByLength(f"{method}-loss", METHODS, page, policies),
        *(ByLength(f"{method}-{task}", METHODS, page, policies, task) for task in tasks),
    )


TABLES = (
    *tables("methods", METHODS),
    *tables("records", ATTENTION, ("attention",)),
    *tables("records-all", TASKS, ("task",)),
    *tables("sparse-read", SPARSE, document="research/context/qwen25_1m/README.md"),
    *tables("smollm2", SMOLLM2, ("loss",)),
    *tables("smollm2-passkey", SMOLLM2_PASSKEY, ("task",)),
    *tables("smollm2-32k", SMOLLM2_32K, ("loss",)),
    Statements("context-statements", PAGE, METHODS),
    *pages("giraffe", GIRAFFE, context_statements.GIRAFFE, ("lines-short",)),
    *pages("clex", CLEX, context_statements.CLEX, ()),
    Table("clex-steps", CLEX_PAGE, STEPS, context_steps.HEADER, context_steps.step_row),
    Statements("clex-steps-statements", CLEX_PAGE, STEPS, unit="turns"),
    *pages("qwen25_1m", QWEN, context_statements.QWEN, ("lines-short", "passkey-short")),
)
FIGURES = (
    *figures(METHODS),
    *figures(SMOLLM2, ("loss",)),
    *figures(SMOLLM2_PASSKEY, ("task",)),
    *figures(SMOLLM2_32K, ("loss",)),
)
