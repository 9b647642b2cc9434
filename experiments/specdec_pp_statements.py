"""What must hold for SpecDec++: its small-scale protocol, and the simple rivals."""

import numpy as np

from experiments.exactness import is_exact
from experiments.statements import Row, Statement, Test, value

RATIO = "cost@8"
FIXED = tuple(f"fixed-{k}" for k in range(1, 17))
OURS = tuple(f"specdec-{h}" for h in (0.1, 0.3, 0.5, 0.7, 0.9))


def family(rows: dict[str, Row], name: str) -> list[Row]:
    """All rows of a rule, whatever its setting."""
    return [row for method, row in rows.items() if method.rpartition("-")[0] == name]


def best(rows: dict[str, Row], name: str, seed: int, what: str = RATIO) -> float:
    """The least cost of a rule over its settings."""
    return min(value(row, what, seed) for row in family(rows, name))


def below_fixed(rows: dict[str, Row], seed: int) -> int:
    """How many thresholds discard less than fixed lengths do at the same verification rate.

    Between two lengths the fixed rate is interpolated; beyond all of them a threshold does not
    count.
    """
    points = sorted(
        (value(rows[m], "verified", seed), value(rows[m], "discarded", seed)) for m in FIXED
    )
    verified, discarded = (np.array(x) for x in zip(*points, strict=True))
    count = 0
    for method in OURS:
        v, d = (value(rows[method], n, seed) for n in ("verified", "discarded"))
        inside = verified[0] <= v <= verified[-1]
        count += bool(inside and d < np.interp(v, verified, discarded))
    return count


def _beats(rival: str, factor: float = 1.0, what: str = RATIO) -> Test:
    def test(rows: dict[str, Row], seed: int) -> bool:
        return best(rows, "specdec", seed, what) <= factor * best(rows, rival, seed, what)

    return test


def _beats_heuristic(rows: dict[str, Row], seed: int) -> bool:
    return best(rows, "specdec", seed) < value(rows["heuristic"], RATIO, seed)


def _exact(rows: dict[str, Row], seed: int) -> bool:
    return is_exact(rows["greedy"])


SPECDEC: tuple[Statement, ...] = (
    Statement(
        "at the same verification rate at least 3 of 5 thresholds discard less than fixed lengths",
        (*FIXED, *OURS),
        lambda rows, seed: below_fixed(rows, seed) >= 3,
    ),
    Statement(
        "the head ranks accepted above rejected tokens with an AUC above 0.65",
        ("head-specdec",),
        lambda rows, seed: value(rows["head-specdec"], "auc", seed) > 0.65,
    ),
    Statement(
        "a head without weighting has a calibration error below 0.1",
        ("head-weight-1",),
        lambda rows, seed: value(rows["head-weight-1"], "calibration_error", seed) < 0.1,
    ),
    Statement(
        "mixed texts are no worse to train on than the target's alone",
        (OURS[0], "target-text-0.1"),
        _beats("target-text"),
    ),
    Statement(
        "at a cost ratio of 8 a token costs at least 3% less than with the best fixed length",
        (*FIXED, OURS[0]),
        _beats("fixed", 0.97),
    ),
    Statement(
        "at every cost ratio SpecDec++ costs less than the best fixed length",
        (*FIXED, OURS[0]),
        lambda rows, seed: all(
            best(rows, "specdec", seed, f"cost@{r}") < best(rows, "fixed", seed, f"cost@{r}")
            for r in (4, 8, 16)
        ),
    ),
    Statement(
        "SpecDec++ costs less than the best threshold on the draft model's confidence",
        (OURS[0], "confidence-0.6"),
        _beats("confidence"),
    ),
    Statement(
        "SpecDec++ costs less than the best threshold on its entropy",
        (OURS[0], "entropy-1.0"),
        _beats("entropy"),
    ),
    Statement(
        "SpecDec++ costs less than the heuristic of Hugging Face",
        (OURS[0], "heuristic"),
        _beats_heuristic,
    ),
    Statement("every greedy text is exact", ("greedy",), _exact),
)
"""Each rule is compared at its best setting for a target pass that costs 8 draft passes."""
