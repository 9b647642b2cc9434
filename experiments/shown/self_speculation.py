"""What the documents show of models that draft for themselves: SWIFT's sets, DEL's exits."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number

SETS = {
    "found": "**searched while serving**",
    "found chain": "the same, a chain in place of the comb",
    "fixed length": "the same, chains of 8",
    "uniform": "every second layer",
    "first layers": "the first layers",
    "random search": "searched at random only",
    "offline": "searched offline",
    "other": "the set, in another domain",
    "other reset": "searched anew there",
}
SETS_HEADER = (
    "what is skipped",
    "matchness",
    "tokens per pass",
    "accepted of drafted",
    "drafted per pass",
    "cost of a step",
    "modelled speedup",
)


def set_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a set."""
    name = row["method"]
    return (
        SETS.get(name, f"searched, {name.removeprefix('ratio ')} of the sub-layers"),
        number(row["matchness"], 3) if "matchness" in row else "",
        number(row["tokens_per_pass"]),
        number(row["acceptance"], 3),
        number(row["steps"], 1),
        number(row["draft_cost"], 3),
        number(row["modelled_speedup"]) + "x",
    )


EXITS = {
    "plain": "plain decoding",
    "best static": "the best fixed exit and length",
    "del": "**DEL**",
    "del gamma": "DEL, drafts of the chosen length",
    "del min": "DEL, no longer than chosen",
    "del half": "DEL, missing confidence as a half",
    "fsm": "one longer after success, else shorter",
    "dv": "a threshold that adapts",
}
EXITS_HEADER = (
    "exit and length",
    "tokens per layer, times layers",
    "tokens per pass",
    "accepted of drafted",
    "mean exit",
    "rows of the head read per pass",
)


def exit_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a way to choose exits."""
    name = EXITS[row["method"]]
    if "setting" in row:
        name += ": " + ", ".join(f"{e} and {g}" for e, g in row["setting"])
    drafts = row["method"] != "plain"
    return (
        name,
        number(row["layer_speedup"], 3),
        number(row["tokens_per_pass"]),
        number(row["acceptance"], 3) if drafts else "",
        number(row["exit"]) if drafts else "",
        number(row["readouts"], 1),
    )


def exit_grid(result: dict[str, Any]) -> Canvas:
    """Tokens per layer of every fixed exit and draft length, mean over seeds; DEL's beside."""
    rows = {row["method"]: row for row in result["rows"]}
    grid = np.mean(np.array(rows["best static"]["grid"], float), axis=0)
    exits, lengths = (np.unique(grid[:, i]).astype(int) for i in range(2))
    values = grid[:, 2].reshape(len(exits), len(lengths))
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    span = max(float(np.abs(values - 1).max()), 0.05)
    shown = axis.imshow(values, cmap="RdYlGn", vmin=1 - span, vmax=1 + span, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axis.set_yticks(range(len(exits)), [str(n) for n in exits])
    axis.set(xlabel="drafted tokens", ylabel="exit after layer")
    axis.set_title(f"fixed settings; DEL: {rows['del']['layer_speedup']['mean']:.2f}", fontsize=9)
    figure.colorbar(shown, label="tokens per layer, times layers")
    figure.tight_layout()
    return figure


SWIFT_PAGE = "research/speculative/swift/README.md"
DEL_PAGE = "research/speculative/del_exit/README.md"
FOUND_SETS = "self_speculation_sets_layerskip_5m"
TRAINED_EXITS = "self_speculation_exits_layerskip_5m"
UNTRAINED_EXITS = "self_speculation_exits_python_5m"

TABLES: tuple[Rendered, ...] = (
    Table("sets", SWIFT_PAGE, FOUND_SETS, SETS_HEADER, set_row),
    Statements("sets-statements", SWIFT_PAGE, FOUND_SETS),
    Table("exits", DEL_PAGE, TRAINED_EXITS, EXITS_HEADER, exit_row),
    Statements("exits-statements", DEL_PAGE, TRAINED_EXITS),
    Table("untrained-exits", DEL_PAGE, UNTRAINED_EXITS, EXITS_HEADER, exit_row),
    Statements("untrained-exits-statements", DEL_PAGE, UNTRAINED_EXITS),
)
FIGURES = (Figure("experiments/results/self_speculation_exits.svg", TRAINED_EXITS, exit_grid),)
