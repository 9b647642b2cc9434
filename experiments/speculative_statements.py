"""What must hold in the drafter comparison: Clover's protocol and EAGLE's, and simple rivals."""

import itertools

from experiments.exactness import EXACT
from experiments.statements import Row, Statement, Test, at_least, value


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


def _more_accurate(a: str, b: str) -> Test:
    def test(rows: dict[str, Row], seed: int) -> bool:
        return value(rows[a]["accuracy"], "top1/head1", seed) > value(
            rows[b]["accuracy"], "top1/head1", seed
        )

    return test


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
    Statement(
        "EAGLE's layer is right more often than one that sees no tokens",
        ("eagle-like", "eagle-features"),
        _more_accurate("eagle-like", "eagle-features"),
    ),
    Statement(
        "EAGLE's layer is right more often than one that sees no features",
        ("eagle-like", "eagle-tokens"),
        _more_accurate("eagle-like", "eagle-tokens"),
    ),
    Statement(
        "EAGLE's static tree takes more tokens per pass than a chain as deep",
        ("eagle-like", "eagle-chain"),
        _per_pass("eagle-like", "eagle-chain"),
    ),
    Statement(
        "EAGLE-2's tree takes at least as many as the static one of equal size",
        ("eagle-2", "eagle-like"),
        _per_pass("eagle-2", "eagle-like"),
    ),
    EXACT,
)
"""Of the drafter comparison: the small-scale protocols of Clover and EAGLE, and simple rivals."""
