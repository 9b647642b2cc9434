"""What a protocol says must hold, answered by an experiment's rows.

Every statement is answered by the means and, beside that, by each seed alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from experiments import record

Row = dict[str, Any]
Test = Callable[[dict[str, Row], int], bool]
"""``test(rows by method, seed number)``; seed number -1 asks about the means."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """What is said, the methods it is about, how it is tested, and which means that compares."""

    text: str
    methods: tuple[str, ...]
    test: Test
    numbers: Callable[[dict[str, Row]], str] | None = None


def value(row: Row, name: str, seed: int) -> float:
    """A sample's value for one seed, or its mean for seed number -1."""
    return row[name]["mean"] if seed < 0 else row[name]["samples"][seed]


def at_least(a: str, b: str, name: str, factor: float = 1.0) -> Test:
    """Whether method ``a`` has at least ``factor`` times what ``b`` has of ``name``."""
    return lambda rows, seed: value(rows[a], name, seed) >= factor * value(rows[b], name, seed)


def answer(
    rows: Sequence[Row], statements: Sequence[Statement], seeds: int
) -> list[dict[str, Any]]:
    """Every statement with ``holds`` and ``seeds``, one each; None if what it needs is missing.

    Statements that tell the ``numbers`` they compare have them, too.

    Args:
        rows: with ``method`` as their name.
        statements: what is to be answered.
        seeds: how many every sample of the rows has.
    """
    by = {row["method"]: row for row in rows}
    answers: list[dict[str, Any]] = []
    for statement in statements:
        told: dict[str, Any] = {}
        try:
            if not set(statement.methods) <= by.keys():
                raise KeyError(statement.methods)
            held, each = statement.test(by, -1), [statement.test(by, s) for s in range(seeds)]
            if statement.numbers is not None:
                told = {"numbers": statement.numbers(by)}
        except KeyError:  # a method, or a number of one, was not measured
            held, each = None, []
        answers.append({"statement": statement.text, "holds": held, "seeds": each, **told})
    return answers


def show(answers: Sequence[dict[str, Any]]) -> str:
    """The answers as lines of text."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    lines = []
    for a in answers:
        seeds = f" ({sum(a['seeds'])} of {len(a['seeds'])} seeds)" if a["seeds"] else ""
        told = f" ({a['numbers']})" if "numbers" in a else ""
        lines.append(f"{words[a['holds']]:14} {a['statement']}{seeds}{told}")
    return "\n".join(lines)


def conclude(
    name: str,
    rows: Sequence[Row],
    asked: Sequence[Statement],
    settings: Any,
    timing: dict[str, Any] | None = None,
    earlier: dict[str, Any] | None = None,
) -> None:
    """How a measurement ends: its statements are answered and printed, its result is saved.

    Args:
        name: of the result.
        settings: a dataclass with the ``seeds`` of every sample of the rows; the result's config.
        timing, earlier: see :func:`experiments.record.save`.
    """
    answers = answer(rows, asked, len(settings.seeds))
    print(show(answers))
    path = record.save(
        name, rows, config=settings, seeds=settings.seeds, timing=timing, statements=answers,
        earlier=earlier,
    )  # fmt: skip
    print("saved", path)
