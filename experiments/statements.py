"""What a protocol says must hold, answered by an experiment's rows.

Every statement is answered by the means and, beside that, by each seed alone.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from experiments.tables import is_exact

Row = dict[str, Any]
Test = Callable[[dict[str, Row], int], bool]
"""``test(rows by method, seed number)``; seed number -1 asks about the means."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """What is said, the methods it is about, and how it is tested."""

    text: str
    methods: tuple[str, ...]
    test: Test


def value(row: Row, name: str, seed: int) -> float:
    """A sample's value for one seed, or its mean for seed number -1."""
    return row[name]["mean"] if seed < 0 else row[name]["samples"][seed]


def at_least(a: str, b: str, name: str, factor: float = 1.0) -> Test:
    """Whether method ``a`` has at least ``factor`` times what ``b`` has of ``name``."""
    return lambda rows, seed: value(rows[a], name, seed) >= factor * value(rows[b], name, seed)


def answer(rows: Sequence[Row], statements: Sequence[Statement]) -> list[dict[str, Any]]:
    """Every statement with ``holds`` (None if a method is missing) and ``seeds``, one each.

    That every greedy text is exact is added to them.
    """
    by = {row["method"]: row for row in rows}
    count = len(rows[0]["exactness"])
    answers: list[dict[str, Any]] = []
    for statement in statements:
        known = set(statement.methods) <= by.keys()
        answers.append(
            {
                "statement": statement.text,
                "holds": statement.test(by, -1) if known else None,
                "seeds": [statement.test(by, seed) for seed in range(count)] if known else [],
            }
        )
    exact = all(map(is_exact, rows))
    return [*answers, {"statement": "every greedy text is exact", "holds": exact, "seeds": []}]


def show(answers: Sequence[dict[str, Any]]) -> str:
    """The answers as lines of text."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    lines = []
    for a in answers:
        seeds = f" ({sum(a['seeds'])} of {len(a['seeds'])} seeds)" if a["seeds"] else ""
        lines.append(f"{words[a['holds']]:14} {a['statement']}{seeds}")
    return "\n".join(lines)


def _gaps(rows: dict[str, Row], seed: int) -> list[float]:
    """Clover's top-1 accuracy above Medusa's, for the heads that both have."""
    clover, medusa = rows["clover"]["accuracy"], rows["medusa"]["accuracy"]
    names = [f"top1/head{i}" for i in range(1, 9)]
    return [
        value(clover, n, seed) - value(medusa, n, seed)
        for n in names
        if n in clover and n in medusa
    ]


def _grows(rows: dict[str, Row], seed: int) -> bool:
    return all(b > a for a, b in itertools.pairwise(_gaps(rows, seed)[1:]))


def _per_pass(a: str, b: str, factor: float = 1.0) -> Test:
    return at_least(a, b, "tokens_per_pass@0", factor)


def _cheaper(rows: dict[str, Row], seed: int) -> bool:
    # Both fill the same tree, so they draft the same levels.
    return value(rows["clover"], "draft_cost", seed) < value(rows["eagle-like"], "draft_cost", seed)


SPECULATIVE: tuple[Statement, ...] = (
    Statement(
        "Clover's head 1 is at most 2 points less accurate than Medusa's",
        ("clover", "medusa"),
        lambda rows, seed: _gaps(rows, seed)[0] >= -0.02,
    ),
    Statement(
        "from head 2 on Clover is more accurate than Medusa",
        ("clover", "medusa"),
        lambda rows, seed: min(_gaps(rows, seed)[1:]) > 0,
    ),
    Statement("that gap grows with depth", ("clover", "medusa"), _grows),
    Statement(
        "Clover's tokens per pass are at least 1.1 times Medusa's",
        ("clover", "medusa"),
        _per_pass("clover", "medusa", 1.1),
    ),
    Statement(
        "regression helps",
        ("clover", "clover-no-regression"),
        _per_pass("clover", "clover-no-regression"),
    ),
    Statement(
        "the augmenting block helps",
        ("clover", "clover-no-augment"),
        _per_pass("clover", "clover-no-augment"),
    ),
    Statement(
        "distillation does not hurt",
        ("clover", "clover-no-distill"),
        _per_pass("clover", "clover-no-distill"),
    ),
    Statement(
        "Clover drafts for fewer FLOPs than the one-layer EAGLE-like drafter",
        ("clover", "eagle-like"),
        _cheaper,
    ),
    Statement(
        "Clover takes more tokens per pass than prompt lookup",
        ("clover", "lookup"),
        _per_pass("clover", "lookup"),
    ),
    Statement(
        "Clover takes more tokens per pass than Token Recycling",
        ("clover", "recycling"),
        _per_pass("clover", "recycling"),
    ),
)
"""Of the drafter comparison: the small-scale protocol of Clover, and two simple rivals."""
