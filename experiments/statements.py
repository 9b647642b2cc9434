"""What the protocol says must hold, answered by the drafter comparison's rows.

Every statement is answered by the means and, beside that, by each seed alone.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.tables import is_exact

Row = dict[str, Any]
Value = Callable[[Row, int], float]
Test = Callable[[dict[str, Row], int], bool]
"""``test(rows by method, seed number)``; seed number -1 asks about the means."""


def _of(sample: dict[str, Any], seed: int) -> float:
    return sample["mean"] if seed < 0 else sample["samples"][seed]


def _value(name: str) -> Value:
    return lambda row, seed: _of(row[name], seed)


def _gaps(rows: dict[str, Row], seed: int) -> list[float]:
    """Clover's top-1 accuracy above Medusa's, for the heads that both have."""
    clover, medusa = rows["clover"]["accuracy"], rows["medusa"]["accuracy"]
    names = [f"top1/head{i}" for i in range(1, 9)]
    return [
        _of(clover[n], seed) - _of(medusa[n], seed) for n in names if n in clover.keys() & medusa
    ]


def _at_least(a: str, b: str, factor: float = 1.0) -> Test:
    per_pass = _value("tokens_per_pass@0")
    return lambda rows, seed: per_pass(rows[a], seed) >= factor * per_pass(rows[b], seed)


def _cheaper(rows: dict[str, Row], seed: int) -> bool:
    # Both fill the same tree, so they draft the same levels.
    cost = _value("draft_cost")
    return cost(rows["clover"], seed) < cost(rows["eagle-like"], seed)


def _grows(rows: dict[str, Row], seed: int) -> bool:
    gaps = _gaps(rows, seed)[1:]
    return all(b > a for a, b in itertools.pairwise(gaps))


STATEMENTS: tuple[tuple[str, tuple[str, ...], Test], ...] = (
    (
        "Clover's head 1 is at most 2 points less accurate than Medusa's",
        ("clover", "medusa"),
        lambda rows, seed: _gaps(rows, seed)[0] >= -0.02,
    ),
    (
        "from head 2 on Clover is more accurate than Medusa",
        ("clover", "medusa"),
        lambda rows, seed: min(_gaps(rows, seed)[1:]) > 0,
    ),
    ("that gap grows with depth", ("clover", "medusa"), _grows),
    (
        "Clover's tokens per pass are at least 1.1 times Medusa's",
        ("clover", "medusa"),
        _at_least("clover", "medusa", 1.1),
    ),
    (
        "regression helps",
        ("clover", "clover-no-regression"),
        _at_least("clover", "clover-no-regression"),
    ),
    (
        "the augmenting block helps",
        ("clover", "clover-no-augment"),
        _at_least("clover", "clover-no-augment"),
    ),
    (
        "distillation does not hurt",
        ("clover", "clover-no-distill"),
        _at_least("clover", "clover-no-distill"),
    ),
    (
        "Clover drafts for fewer FLOPs than the one-layer EAGLE-like drafter",
        ("clover", "eagle-like"),
        _cheaper,
    ),
    (
        "Clover takes more tokens per pass than prompt lookup",
        ("clover", "lookup"),
        _at_least("clover", "lookup"),
    ),
    (
        "Clover takes more tokens per pass than Token Recycling",
        ("clover", "recycling"),
        _at_least("clover", "recycling"),
    ),
)
"""Statement, the methods it is about, and how it is tested."""


def answer(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every statement with ``holds`` (None if a method is missing) and ``seeds``, one each."""
    by = {row["method"]: row for row in rows}
    count = len(rows[0]["tokens_per_pass@0"]["samples"])
    answers: list[dict[str, Any]] = []
    for statement, methods, test in STATEMENTS:
        known = set(methods) <= by.keys()
        answers.append(
            {
                "statement": statement,
                "holds": test(by, -1) if known else None,
                "seeds": [test(by, seed) for seed in range(count)] if known else [],
            }
        )
    exact = all(map(is_exact, rows))
    return [*answers, {"statement": "every greedy text is exact", "holds": exact, "seeds": []}]
