"""What the protocols of the long-context methods say must hold, answered by one comparison.

In nats per token; ``loss`` is that of the last quarter of the trained length, ``excess`` what it is
above the same tokens read in range, both by the length of the text.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from experiments.statements import Row, Statement, value

Pair = Callable[[dict[str, Row], int], tuple[float, float]]
"""``pair(rows by method, seed number)``: two numbers; seed number -1 asks for the means."""
Rule = Callable[[float, float], bool]

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


def of(a: str, b: str, name: str) -> Pair:
    """What ``a`` and ``b`` have of ``name``."""
    return lambda rows, seed: (value(rows[a], name, seed), value(rows[b], name, seed))


def to(a: str, name: str, bound: float) -> Pair:
    """What ``a`` has of ``name``, and a number."""
    return lambda rows, seed: (value(rows[a], name, seed), bound)


def less(by: float = 0.0) -> Rule:
    """The first is below the second, by more than ``by``."""
    return lambda a, b: a < b - by


def at_most(more: float = 0.0) -> Rule:
    """The first is at most ``more`` above the second."""
    return lambda a, b: a <= b + more


def within(margin: float) -> Rule:
    """The two are at most ``margin`` apart."""
    return lambda a, b: abs(a - b) <= margin


def compared(text: str, methods: Sequence[str], rule: Rule, *pairs: Pair) -> Statement:
    """The statement that ``rule`` holds for every pair; it tells the pair that decides."""

    def test(rows: dict[str, Row], seed: int) -> bool:
        return all(rule(*pair(rows, seed)) for pair in pairs)

    def numbers(rows: dict[str, Row]) -> str:
        found = [pair(rows, -1) for pair in pairs]
        wrong = [pair for pair in found if not rule(*pair)]
        pick = max if wrong else min
        a, b = pick(wrong or found, key=lambda pair: abs(pair[0] - pair[1]))
        among = f"{'furthest off' if wrong else 'closest'} of {len(found)}: "
        return f"{among if len(found) > 1 else ''}{a:.2f} against {b:.2f}"

    return Statement(text, tuple(methods), test, numbers)


def orders_differ(text: str, names: Sequence[str], task: str) -> Statement:
    """The statement that loss and accuracy rank some pair differently at some measured length."""

    def count(rows: dict[str, Row], seed: int) -> dict[int, int]:
        """Pairs that are ranked one way by loss and the other way by accuracy, by length."""
        keys = {name: f"{task}@{name[5:]}" for name in rows[names[0]] if name.startswith("loss@")}
        found = {}
        for loss, accuracy in keys.items():
            by = [(value(rows[n], loss, seed), value(rows[n], accuracy, seed)) for n in names]
            found[int(loss[5:])] = sum(a[0] < b[0] and a[1] < b[1] for a in by for b in by)
        return found

    def numbers(rows: dict[str, Row]) -> str:
        pairs = math.comb(len(names), 2)
        counts = ", ".join(f"{k} at {n:,}" for n, k in count(rows, -1).items())
        return f"of {pairs} pairs {counts}"

    return Statement(
        text, tuple(names), lambda rows, seed: any(count(rows, seed).values()), numbers
    )


_TUNED = (
    "rope, tuned", "linear 4, tuned", "power 0.1, tuned", "power 0.5, tuned", "truncated, tuned",
    "randomised, tuned", "xPos, tuned", "YaRN 4, tuned",
)  # fmt: skip
_SCALED = ("linear 4, tuned", "NTK 4, tuned", "YaRN 4, tuned")
_UNTRAINED = ("NTK 4", "dynamic NTK", "YaRN 4")
_PLAIN, _RANDOM = "rope, tuned at 256", "random positions at 256"
_PLAIN_HERE = "rope, tuned at 256, rate for 256"
"""Plain tuning whose rate was chosen at the trained length, where alone it can be read."""
_LINES, _KEY = "lines-short", "passkey-short"
_HERE, _THERE, _FURTHER = f"loss@{L}", f"loss@{FAR}", f"loss@{2 * FAR}"

ROPE_SCALING = (
    compared(
        "beyond the trained length plain rotations lose more than a nat",
        ("dense",),
        lambda a, b: a > b,
        to("dense", f"excess@{FAR}", 1.0),
    ),
    compared(
        "linear scaling costs loss within the trained length",
        ("dense", "linear 4"),
        less(),
        of("dense", "linear 4", _HERE),
    ),
    compared(
        "NTK, dynamic NTK and YaRN are below linear scaling at 4 times the length, untrained",
        (*_UNTRAINED, "linear 4"),
        less(),
        *(of(a, "linear 4", _THERE) for a in _UNTRAINED),
    ),
    compared(
        "YaRN is at most linear scaling at 4 times the length, both tuned",
        ("YaRN 4, tuned", "linear 4, tuned"),
        at_most(),
        of("YaRN 4, tuned", "linear 4, tuned", _THERE),
    ),
    compared(
        "there the three are within 0.05 nat of each other, all tuned",
        _SCALED,
        within(0.05),
        *(of(a, b, _THERE) for a, b in itertools.combinations(_SCALED, 2)),
    ),
    compared(
        "and each is more than a nat below plain rotations untrained",
        (*_SCALED, "dense"),
        less(1.0),
        *(of(name, "dense", _THERE) for name in _SCALED),
    ),
)
GIRAFFE = (
    compared(
        "untrained, linear scaling beats none beyond the trained length",
        ("linear 4", "dense"),
        less(),
        of("linear 4", "dense", _THERE),
    ),
    compared(
        "of the tuned bases linear scaling finds most lines at 4 times the length",
        _TUNED,
        lambda a, b: a >= b,
        *(of("linear 4, tuned", b, f"{_LINES}@{FAR}") for b in _TUNED if b != "linear 4, tuned"),
    ),
    compared(
        "read at twice the scale of its training it finds more lines at 8 times the length",
        ("linear 4, tuned", "linear 4, tuned, read at 8"),
        lambda a, b: a > b,
        of("linear 4, tuned, read at 8", "linear 4, tuned", f"{_LINES}@{2 * FAR}"),
    ),
    compared(
        "and fewer at twice the length",
        ("linear 4, tuned", "linear 4, tuned, read at 8"),
        less(),
        of("linear 4, tuned, read at 8", "linear 4, tuned", f"{_LINES}@{2 * L}"),
    ),
    compared(
        "the truncated basis loses less than none beyond the length of its tuning",
        ("truncated, tuned", "rope, tuned"),
        less(),
        of("truncated, tuned", "rope, tuned", _THERE),
    ),
    orders_differ(
        "loss and lines rank some pair of tuned bases differently at some measured length",
        _TUNED,
        _LINES,
    ),
)
CLEX = (
    compared(
        "CLEX is within 0.03 nat of plain tuning at the trained length, above or below",
        ("CLEX", _PLAIN_HERE),
        within(0.03),
        of("CLEX", _PLAIN_HERE, _HERE),
    ),
    compared(
        "it is at most 0.03 nat above plain tuning there",
        ("CLEX", _PLAIN_HERE),
        at_most(0.03),
        of("CLEX", _PLAIN_HERE, _HERE),
    ),
    compared(
        "at 4 times the length CLEX is at most 0.05 nat above the same tokens in range",
        ("CLEX",),
        at_most(),
        to("CLEX", f"excess@{FAR}", 0.05),
    ),
    compared(
        "there it is more than 0.3 nat below plain tuning and below random positions alone",
        ("CLEX", _PLAIN, _RANDOM),
        less(0.3),
        *(of("CLEX", b, _THERE) for b in (_PLAIN, _RANDOM)),
    ),
    compared(
        "there it is below dynamic NTK untrained",
        ("CLEX", "dynamic NTK"),
        less(),
        of("CLEX", "dynamic NTK", _THERE),
    ),
    compared(
        "at 8 times the length CLEX is at most a nat above the same tokens in range",
        ("CLEX",),
        at_most(),
        to("CLEX", f"excess@{2 * FAR}", 1.0),
    ),
    compared(
        "there it is below plain tuning, random positions alone and dynamic NTK untrained",
        ("CLEX", _PLAIN, _RANDOM, "dynamic NTK"),
        less(),
        *(of("CLEX", b, _FURTHER) for b in (_PLAIN, _RANDOM, "dynamic NTK")),
    ),
    compared(
        "random positions alone lose more than 0.3 nat at 4 times the length",
        (_RANDOM,),
        lambda a, b: a > b,
        to(_RANDOM, f"excess@{FAR}", 0.3),
    ),
    compared(
        "at 4 times the length the learned field is below its analytic part alone",
        ("CLEX", "CLEX, analytic field only"),
        less(),
        of("CLEX", "CLEX, analytic field only", _THERE),
    ),
)
_RIVALS = ("dense", "linear 4", "NTK 4", "dynamic NTK")
QWEN = (
    compared(
        "at 4 and 8 times the length dual chunks are at most 0.1 nat above the loss in range",
        ("dual chunk",),
        at_most(),
        *(to("dual chunk", f"excess@{n}", 0.1) for n in (FAR, 2 * FAR)),
    ),
    compared(
        "there it beats plain rotations, linear scaling, NTK and dynamic NTK, all untrained",
        ("dual chunk", *_RIVALS),
        less(),
        *(of("dual chunk", b, name) for b in _RIVALS for name in (_THERE, _FURTHER)),
    ),
    compared(
        "it finds more numbers than a sliding window at 4 times the length",
        ("dual chunk", "window"),
        lambda a, b: a > b,
        of("dual chunk", "window", f"{_KEY}@{FAR}"),
    ),
    compared(
        "the four synthetic tasks make it find more numbers there than text alone, same tokens",
        ("dual chunk, tuned on text and tasks", "dual chunk, tuned on text"),
        lambda a, b: a > b,
        of("dual chunk, tuned on text and tasks", "dual chunk, tuned on text", f"{_KEY}@{FAR}"),
    ),
)
STATEMENTS = (*ROPE_SCALING, *GIRAFFE, *CLEX, *QWEN)
