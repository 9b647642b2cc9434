"""What must hold for LongSpec by its small-scale protocol, and what we add (the last three)."""

from collections.abc import Callable

from experiments.statements import Row, Statement, Test, at_least, value

METHODS = ("full", "no-offset", "no-noise", "window-only", "full-window")
"""The whole method and its ablations, as drafts are called."""

SLOTS = (4096, 16384)


def top1(row: Row, seed: int, step: int, edge: int | None = None) -> float:
    """Agreement with the target's best token up to an edge; None: mean over all edges."""
    edges = row["edges"] if edge is None else [edge]
    return sum(value(row, f"top1@{e}/step{step}", seed) for e in edges) / len(edges)


def kept(row: Row, seed: int) -> float:
    """Agreement at the farthest positions as a share of that at the nearest."""
    near, far = row["edges"][0], row["edges"][-1]
    return top1(row, seed, 1, far) / max(top1(row, seed, 1, near), 1e-9)


def later(row: Row, seed: int) -> float:
    """Mean agreement of the steps after the first."""
    return sum(top1(row, seed, step) for step in (2, 3, 4)) / 3


def _more(a: str, b: str, what: Callable[[Row, int], float]) -> Test:
    return lambda rows, seed: what(rows[a], seed) > what(rows[b], seed)


def _constant(rows: dict[str, Row], seed: int) -> bool:
    sizes = rows["full"]["bytes"]
    if len(sizes) < 2:
        raise KeyError("bytes")  # not measured
    return len(set(sizes.values())) == 1


def _exact(rows: dict[str, Row], seed: int) -> bool:
    names = ("mismatches/chain", "mismatches/tree")
    return all(value(rows["full"], name, seed) == 0 for name in names)


def _beats_lookup(rows: dict[str, Row], seed: int) -> bool:
    ours = value(rows["full"], "tokens_per_pass/tree", seed)
    return ours > value(rows["lookup"], "tokens_per_pass", seed)


def _exact_attention(rows: dict[str, Row], seed: int) -> bool:
    return all(value(rows[f"attention-{n}"], "error", seed) <= 1e-5 for n in SLOTS)


STATEMENTS: tuple[Statement, ...] = (
    Statement(
        "with offsets the farthest positions keep 90% of the agreement of the nearest",
        ("full",),
        lambda rows, seed: kept(rows["full"], seed) >= 0.9,
    ),
    Statement(
        "without offsets they keep less than 90%, and less than with them",
        ("full", "no-offset"),
        lambda rows, seed: kept(rows["no-offset"], seed) < min(0.9, kept(rows["full"], seed)),
    ),
    Statement(
        "the target's keys make a better draft than the window alone",
        ("full", "window-only"),
        _more("full", "window-only", lambda row, seed: top1(row, seed, 1)),
    ),
    Statement(
        "hiding entries in training improves the steps after the first",
        ("full", "no-noise"),
        _more("full", "no-noise", later),
    ),
    Statement(
        "the draft's own bytes do not depend on the length of the text",
        ("full",),
        _constant,
    ),
    Statement(
        "attention in two parts is dense attention up to 1e-5",
        tuple(f"attention-{n}" for n in SLOTS),
        _exact_attention,
    ),
    Statement("every greedy text is that of plain decoding at the same width", ("full",), _exact),
    Statement(
        "attention in two parts is no slower than dense attention at 16,384 slots",
        ("attention-16384",),
        lambda rows, seed: (
            value(rows["attention-16384"], "hybrid_ms", seed)
            <= value(rows["attention-16384"], "dense_ms", seed)
        ),
    ),
    Statement(
        "all of the text in place of the window gains less than 5% of tokens per pass",
        ("full", "full-window"),
        at_least("full", "full-window", "tokens_per_pass/tree", 0.95),
    ),
    Statement("the tree beats prompt lookup on long prompts", ("full", "lookup"), _beats_lookup),
)
