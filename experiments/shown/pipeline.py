"""What the documents show of the simulated engine: chunks of prompts, and processes of decoding."""

import dataclasses
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments import record
from experiments.figures import Figure
from experiments.report import Rendered, Statements, markdown, number
from experiments.shown.fit import slots

PAGE = "research/context/qwen25_1m/ENGINE.md"
NAMES = {
    "whole": "one chunk per prompt",
    "pieces": "pieces of {piece}",
    "equal-cost-pieces": "as many, of equal cost",
    "misjudged-pieces": "as many, planned with half of the cost of attention",
    "equal-size": "as many as below, of equal size",
    "equal-size-best": "the best number, of equal size",
    "equal-cost": "**the best number, of equal cost**",
}
HEADER = ("stages", "chunks", "how many", "their tokens", "idle", "seconds", "over no idling")


def percent(value: dict[str, Any], digits: int = 1) -> str:
    """``mean ± spread`` of a share, in percent."""
    return f"{number({k: 100 * value[k] for k in ('mean', 'spread')}, digits)}%"


@dataclasses.dataclass(frozen=True)
class Pipelines:
    """The table of one prompt length, or of streams (``tokens`` None)."""

    name: str
    tokens: int | None
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown, with a caption that says what was simulated."""
        result = record.load("prefill_pipeline")
        config = result["config"]
        piece = slots(config["piece"])
        rows = [
            (
                str(r["stages"]),
                NAMES[r["method"]].format(piece=piece),
                number(r["chunks"], 0),
                f"{r['largest']['mean']:,.0f} to {r['smallest']['mean']:,.0f}",
                percent(r["bubble"]),
                number(r["makespan"], 1),
                number(r["over_ideal"], 3) + "x",
            )
            for r in result["rows"]
            if r["kind"] == "method" and r["tokens"] == self.tokens
        ]
        return f"{markdown(HEADER, rows)}\n\n{simulated(result)}"


ENGINES = {
    "in-turn": "one process after the other",
    "handed-over": "three processes, none ahead",
    "asynchronous": "**three processes, one step ahead**",
    "two-ahead": "three processes, two steps ahead",
}
ENGINE_HEADER = ("overhead", "engine", "tokens per step's time", "device idle", "wasted slots")


@dataclasses.dataclass(frozen=True)
class Engines:
    """The table of the simulated decoding engines."""

    name: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown, with a caption that says what was simulated."""
        result = record.load("async_generation")
        rows = [
            (
                f"{r['overhead']:g}",
                ENGINES[r["engine"]],
                number(r["rate"]),
                percent(r["idle"]),
                f"{number(r['wasted'], 0)} ({percent(r['wasted_share'])})",
            )
            for r in result["rows"]
        ]
        return f"{markdown(ENGINE_HEADER, rows)}\n\n{simulated(result)}"


def simulated(result: dict[str, Any]) -> str:
    """A caption: simulated, of what, by which command."""
    config = result["config"]
    chip = f"{config['model']} at the peaks of {config['chip']}, " if "chip" in config else ""
    return (
        f"Simulated, {chip}seeds {result['seeds']}, commit {(result['commit'] or 'unknown')[:10]}"
        f"{' (with changes)' if result['modified'] else ''}, {result['date']}: "
        f"`{result['command']}`"
    )


def bubbles(result: dict[str, Any]) -> Canvas:
    """Idle time and time over an ideal pipeline by the number of chunks, for the longest prompt."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    curves = [row for row in result["rows"] if row["kind"] == "curve"]
    for i, row in enumerate(curves):
        for name, line in (("equal-size", "--"), ("equal-cost", "-")):
            label = f"{row['stages']} stages, {name.replace('-', ' ')}"
            axes[0].plot(row["counts"], row[name]["bubble"], line, color=f"C{i}", label=label)
            axes[1].plot(row["counts"], row[name]["over_ideal"], line, color=f"C{i}")
    axes[0].set(xscale="log", xlabel="chunks", ylabel="share of the stages' time idle", ylim=(0, 1))
    axes[1].set(xscale="log", xlabel="chunks", ylabel="time over that without idling", ylim=(1, 2))
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"a prompt of {slots(curves[0]['tokens'])} tokens, simulated", fontsize=10)
    figure.tight_layout()
    return figure


TABLES: tuple[Rendered, ...] = (
    Pipelines("pipeline-128k", 131072),
    Pipelines("pipeline-1m", 1048576),
    Pipelines("pipeline-stream", None),
    Statements("pipeline-statements", PAGE, "prefill_pipeline"),
    Engines("engines"),
    Statements("engines-statements", PAGE, "async_generation"),
)

FIGURES = (Figure("experiments/results/prefill_pipeline.svg", "prefill_pipeline", bubbles),)
