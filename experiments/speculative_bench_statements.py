"""What must hold in :mod:`experiments.speculative_bench`."""

from collections.abc import Callable
from typing import Any

from experiments.statements import Statement, value

AVERAGED = ("chat", "code", "math")
"""Categories of which the mean speedup is asked for."""


def _best(rows: dict[str, dict[str, Any]], name: str, seed: int) -> float:
    return max(value(row, name, seed) for row in rows.values())


def _best_of(name: str) -> Callable[[dict[str, dict[str, Any]]], str]:
    def told(rows: dict[str, dict[str, Any]]) -> str:
        best = max(rows, key=lambda method: rows[method][name]["mean"])
        return f"{rows[best][name]['mean']:.2f}x by {best}"

    return told


def _is_fast_in_the_mean(rows: dict[str, dict[str, Any]], seed: int) -> bool:
    if set(AVERAGED) - set(rows["none"]["mean_of"]):
        raise KeyError("a category of the mean was not measured")
    return _best(rows, "mean_speedup", seed) > 1.2


STATEMENTS = (
    Statement(
        "the best drafter is at least 1.5 times as fast as plain decoding in its best category",
        ("none",),
        lambda rows, seed: _best(rows, "best_speedup", seed) >= 1.5,
        _best_of("best_speedup"),
    ),
    Statement(
        "and more than 1.2 times as fast in the mean over chat, code and math",
        ("none",),
        _is_fast_in_the_mean,
        _best_of("mean_speedup"),
    ),
    Statement(
        "the loop without a drafter takes less than 5% more than the model alone",
        ("none",),
        lambda rows, seed: rows["none"]["overhead"] < 0.05,
        lambda rows: f"{100 * rows['none']['overhead']:.1f}%, the median",
    ),
    Statement(
        "no greedy token of any drafter differs from plain decoding but by a near-tie",
        ("none",),
        lambda rows, seed: all(
            row["exactness"]["differing"] == row["exactness"]["near_ties"] for row in rows.values()
        ),
    ),
)
