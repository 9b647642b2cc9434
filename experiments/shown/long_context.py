"""What the documents show of long-context evaluation: short beside long, curves, heat maps."""

import dataclasses
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments import record
from experiments.figures import Figure
from experiments.report import Rendered, caption, markdown, number

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

ATTENTION_HEADER = ("policy", "task", "tokens", "share of tokens", "of all attention", "best head")


def of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind: loss, task or summary."""
    return [row for row in result["rows"] if row["kind"] == kind]


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
        rows = [loss_row(row) for row in of_kind(result, "summary")]
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
    """The table of attention on the evidence: every policy, task and length."""

    name: str
    result: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        rows = [
            (
                row["policy"], row["task"], f"{row['length']:,}",
                *(percent(row[name], 1) for name in ("share", "mass", "best")),
            )
            for row in of_kind(result, "attention")
        ]  # fmt: skip
        return f"{markdown(ATTENTION_HEADER, rows)}\n\n{caption(result)}"


def lengths_of(result: dict[str, Any]) -> str:
    """What short, long and effective mean in this result."""
    row, config = of_kind(result, "summary")[0], result["config"]
    return (
        f"Trained length {row['trained']:,}; in range: {row['short']:,} tokens, longest: "
        f"{row['long']:,}. Effective: up to {config['loss_threshold']} nats above the loss in "
        f"range, or at least {100 * config['accuracy_threshold']:.0f}% of the dense accuracy there."
    )


def curves(result: dict[str, Any]) -> Canvas:
    """Loss by position at the longest length, a line per policy; the trained length is marked."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    rows = of_kind(result, "loss")
    longest = max(row["length"] for row in rows)
    for row in rows:
        if row["length"] != longest:
            continue
        means = np.array([sample["mean"] for sample in row["nats"]])
        spread = np.array([sample["spread"] for sample in row["nats"]])
        (line,) = axis.plot(row["edges"], means, marker=".", lw=1, label=row["policy"])
        axis.fill_between(
            row["edges"], means - spread, means + spread, alpha=0.15, color=line.get_color()
        )
    _mark_trained(axis, result)
    axis.set(xscale="log", xlabel="position in the text", ylabel="nats per token")
    axis.set_xscale("log", base=2)
    best = min(sample["mean"] for row in rows for sample in row["nats"])
    # What breaks leaves the picture, so that the others can be told apart.
    axis.set_ylim(best - 0.2, best + 4)
    axis.legend(fontsize=7, ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _mark_trained(axis: Any, result: dict[str, Any]) -> None:
    trained = of_kind(result, "summary")[0]["trained"]
    axis.axvline(trained, color="black", lw=0.8, ls=":")
    axis.annotate(
        "trained length", (trained, 1), xycoords=("data", "axes fraction"), fontsize=7,
        xytext=(3, -8), textcoords="offset points",
    )  # fmt: skip


def heat_maps(result: dict[str, Any]) -> Canvas:
    """Accuracy by depth and length: a column of maps per policy, a row per task with a depth."""
    rows = [row for row in of_kind(result, "task") if row["depths"] != [None]]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    trained = of_kind(result, "summary")[0]["trained"]
    size = (1.2 + 1.5 * len(policies), 0.6 + 1.5 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(policies), figsize=size, squeeze=False)
    for i, task in enumerate(tasks):
        for j, policy in enumerate(policies):
            found = {
                row["length"]: [sample["mean"] for sample in row["by_depth"]]
                for row in rows
                if (row["task"], row["policy"]) == (task, policy)
            }
            axis = axes[i, j]
            grid = np.array([found[length] for length in lengths]).T
            shown = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            beyond = sum(length <= trained for length in lengths)
            axis.axvline(beyond - 0.5, color="black", lw=1, ls=":")
            axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6, rotation=60)
            axis.set_yticks(
                [0, len(grid) - 1], ["start", "end"] if j == 0 else ["", ""], fontsize=6
            )
            if i == 0:
                axis.set_title(policy, fontsize=7)
            if j == 0:
                axis.set_ylabel(task, fontsize=7)
    figure.tight_layout()
    figure.colorbar(shown, ax=axes, fraction=0.02, label="accuracy")
    return figure


def distances(result: dict[str, Any]) -> Canvas:
    """Accuracy by the distance of the evidence from the end of the prompt, a plot per task."""
    rows = [row for row in of_kind(result, "task") if row["depths"] != [None]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    longest = max(row["length"] for row in rows)
    size = (3.4 * len(tasks) + 0.6, 3)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in rows:
            if (row["task"], row["length"]) != (task, longest):
                continue
            found = [(i, s["mean"]) for i, s in enumerate(row["by_distance"]) if s is not None]
            middles = [(i + 0.5) * row["width"] for i, _ in found]
            axis.plot(middles, [mean for _, mean in found], marker=".", label=row["policy"])
        _mark_trained(axis, result)
        axis.set(title=task, xlabel="tokens from the evidence to the end", ylim=(-0.03, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def tables(
    name: str, result: str, tasks: bool = True, attention: bool = False
) -> tuple[Rendered, ...]:
    """The tables of one result, by the name of its markers."""
    found: list[Rendered] = [Losses(f"{name}-loss", result)]
    if tasks:
        found.append(Accuracies(f"{name}-tasks", result))
    if attention:
        found.append(Attention(f"{name}-attention", result))
    return tuple(found)


def figures(result: str, tasks: bool = True) -> tuple[Figure, ...]:
    """The figures of one result."""
    path = f"experiments/results/{result}"
    drawn = (Figure(f"{path}.svg", result, curves),)
    if not tasks:
        return drawn
    by_depth = Figure(f"{path}_depth.svg", result, heat_maps)
    return (*drawn, by_depth, Figure(f"{path}_distance.svg", result, distances))
