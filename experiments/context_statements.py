"""What the protocols of the long-context methods say must hold, answered by one comparison.

In nats per token; ``loss`` is that of the last quarter of the trained length, ``excess`` what it is
above the same tokens read in range, both by the length of the text.
"""

from collections.abc import Sequence

from experiments.statements import Row, Statement, Test, value

L, FAR = 256, 1024
"""The trained length, and the one up to which a factor of 4 was asked for."""


def rows_by_method(rows: Sequence[Row]) -> list[Row]:
    """One flat row per policy: its losses, excesses and accuracies by name and length."""
    flat: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == "loss":
            mine = flat.setdefault(row["policy"], {"method": row["policy"]})
            mine[f"loss@{row['length']}"] = row["nats"][-1]
            mine[f"excess@{row['length']}"] = row["excess"][-1]
        elif row["kind"] == "task":
            mine = flat.setdefault(row["policy"], {"method": row["policy"]})
            mine[f"{row['task']}@{row['length']}"] = row["accuracy"]
    return list(flat.values())


def less(a: str, b: str, name: str, by: float = 0.0) -> Test:
    """Whether ``a`` has less of ``name`` than ``b``, by more than ``by``."""
    return lambda rows, seed: value(rows[a], name, seed) < value(rows[b], name, seed) - by


def at_most(a: str, name: str, most: float) -> Test:
    """Whether ``a`` has at most ``most`` of ``name``."""
    return lambda rows, seed: value(rows[a], name, seed) <= most


def every(*tests: Test) -> Test:
    """Whether all of them hold."""
    return lambda rows, seed: all(test(rows, seed) for test in tests)


def best_of(a: str, others: Sequence[str], name: str) -> Test:
    """Whether none of the others has more of ``name``."""
    return lambda rows, seed: all(
        value(rows[a], name, seed) >= value(rows[b], name, seed) for b in others
    )


def orders_differ(names: Sequence[str], loss: str, accuracy: str) -> Test:
    """Whether some pair is ranked one way by loss and the other way by accuracy."""

    def test(rows: dict[str, Row], seed: int) -> bool:
        def of(method: str, name: str) -> float:
            return value(rows[method], name, seed)

        return any(
            of(a, loss) < of(b, loss) and of(a, accuracy) < of(b, accuracy)
            for a in names
            for b in names
        )

    return test


_TUNED = (
    "rope, tuned", "linear 4, tuned", "power 0.1, tuned", "power 0.5, tuned", "truncated, tuned",
    "randomised, tuned", "xPos, tuned", "YaRN 4, tuned",
)  # fmt: skip
_SCALED = ("linear 4, tuned", "NTK 4, tuned", "YaRN 4, tuned")
_LINES, _KEY = "lines-short", "passkey-short"

ROPE_SCALING = (
    Statement(
        "beyond the trained length plain rotations lose more than a nat",
        ("dense",),
        lambda rows, seed: value(rows["dense"], f"excess@{FAR}", seed) > 1,
    ),
    Statement(
        "linear scaling costs loss within the trained length",
        ("dense", "linear 4"),
        less("dense", "linear 4", f"loss@{L}"),
    ),
    Statement(
        "NTK, dynamic NTK and YaRN are below linear scaling at 4 times the length, untrained",
        ("NTK 4", "dynamic NTK", "YaRN 4", "linear 4"),
        every(*(less(a, "linear 4", f"loss@{FAR}") for a in ("NTK 4", "dynamic NTK", "YaRN 4"))),
    ),
    Statement(
        "YaRN is at most linear scaling at 4 times the length, both tuned",
        ("YaRN 4, tuned", "linear 4, tuned"),
        less("YaRN 4, tuned", "linear 4, tuned", f"loss@{FAR}"),
    ),
    Statement(
        "there the three are within 0.05 nat of each other, all tuned",
        _SCALED,
        lambda rows, seed: (
            max(losses := [value(rows[name], f"loss@{FAR}", seed) for name in _SCALED])
            - min(losses)
            <= 0.05
        ),
    ),
    Statement(
        "and each is more than a nat below plain rotations untrained",
        (*_SCALED, "dense"),
        every(*(less(name, "dense", f"loss@{FAR}", 1.0) for name in _SCALED)),
    ),
)
GIRAFFE = (
    Statement(
        "untrained, linear scaling beats none beyond the trained length",
        ("linear 4", "dense"),
        less("linear 4", "dense", f"loss@{FAR}"),
    ),
    Statement(
        "of the tuned bases linear scaling finds most lines at 4 times the length",
        _TUNED,
        best_of("linear 4, tuned", _TUNED, f"{_LINES}@{FAR}"),
    ),
    Statement(
        "read at twice the scale of its training it finds more lines at 8 times the length",
        ("linear 4, tuned", "linear 4, tuned, read at 8"),
        less("linear 4, tuned", "linear 4, tuned, read at 8", f"{_LINES}@{2 * FAR}"),
    ),
    Statement(
        "and fewer at twice the length",
        ("linear 4, tuned", "linear 4, tuned, read at 8"),
        less("linear 4, tuned, read at 8", "linear 4, tuned", f"{_LINES}@{2 * L}"),
    ),
    Statement(
        "the truncated basis loses less than none beyond the length of its tuning",
        ("truncated, tuned", "rope, tuned"),
        less("truncated, tuned", "rope, tuned", f"loss@{FAR}"),
    ),
    Statement(
        "loss and lines rank some pair of bases differently at 4 times the length",
        _TUNED,
        orders_differ(_TUNED, f"loss@{FAR}", f"{_LINES}@{FAR}"),
    ),
)
CLEX = (
    Statement(
        "CLEX is within 0.03 nat of plain tuning at the trained length",
        ("CLEX", "rope, tuned at 256"),
        lambda rows, seed: (
            value(rows["CLEX"], f"loss@{L}", seed)
            <= value(rows["rope, tuned at 256"], f"loss@{L}", seed) + 0.03
        ),
    ),
    Statement(
        "at 4 times the length CLEX is at most 0.05 nat above the same tokens in range",
        ("CLEX",),
        at_most("CLEX", f"excess@{FAR}", 0.05),
    ),
    Statement(
        "there it is more than 0.3 nat below plain tuning and below random positions alone",
        ("CLEX", "rope, tuned at 256", "random positions at 256"),
        every(
            less("CLEX", "rope, tuned at 256", f"loss@{FAR}", 0.3),
            less("CLEX", "random positions at 256", f"loss@{FAR}", 0.3),
        ),
    ),
    Statement(
        "there it is below dynamic NTK untrained",
        ("CLEX", "dynamic NTK"),
        less("CLEX", "dynamic NTK", f"loss@{FAR}"),
    ),
    Statement(
        "random positions alone lose more than 0.3 nat at 4 times the length",
        ("random positions at 256",),
        lambda rows, seed: value(rows["random positions at 256"], f"excess@{FAR}", seed) > 0.3,
    ),
    Statement(
        "at 4 times the length the learned field is below its analytic part alone",
        ("CLEX", "CLEX, analytic field only"),
        less("CLEX", "CLEX, analytic field only", f"loss@{FAR}"),
    ),
)
QWEN = (
    Statement(
        "dual chunk attention is within 0.1 nat of the loss in range at 4 and 8 times the length",
        ("dual chunk",),
        every(*(at_most("dual chunk", f"excess@{n}", 0.1) for n in (FAR, 2 * FAR))),
    ),
    Statement(
        "there it beats plain rotations, linear scaling, NTK and dynamic NTK, all untrained",
        ("dual chunk", "dense", "linear 4", "NTK 4", "dynamic NTK"),
        every(
            *(
                less("dual chunk", b, f"loss@{n}")
                for b in ("dense", "linear 4", "NTK 4", "dynamic NTK")
                for n in (FAR, 2 * FAR)
            )
        ),
    ),
    Statement(
        "it finds more numbers than a sliding window at 4 times the length",
        ("dual chunk", "window"),
        less("window", "dual chunk", f"{_KEY}@{FAR}"),
    ),
    Statement(
        "the four synthetic tasks make it find more numbers there than text alone, same tokens",
        ("dual chunk, tuned on text and tasks", "dual chunk, tuned on text"),
        less("dual chunk, tuned on text", "dual chunk, tuned on text and tasks", f"{_KEY}@{FAR}"),
    ),
)
STATEMENTS = (*ROPE_SCALING, *GIRAFFE, *CLEX, *QWEN)
