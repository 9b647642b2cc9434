"""What must hold when speculation is batched: the protocol's statements, and throughput."""

from experiments.statements import Row, Statement, Test, at_least, value
from research.speculative.batch_spec.padded import FAULTS


def _same(rows: dict[str, Row], seed: int) -> bool:
    names = [n for n in rows if "outcome" in rows[n] and not n.startswith("padded-")]
    return all(rows[n]["outcome"]["wrong"] == 0 for n in names)


def _fewer(a: str, b: str) -> Test:
    def test(rows: dict[str, Row], seed: int) -> bool:
        sizes = [n.split("-")[1] for n in rows if n.startswith(f"{a}-") and n != f"{a}-1"]
        return all(
            value(rows[f"{a}-{n}"], "passes_per_token", seed)
            <= value(rows[f"{b}-{n}"], "passes_per_token", seed)
            for n in sizes
        )

    return test


def _faster(a: str, b: str) -> Test:
    return at_least(a, b, "tokens_per_second")


BATCHED: tuple[Statement, ...] = (
    Statement("every text is that of single decoding, but for near-ties", (), _same),
    Statement(
        "every mistake of the padded form is caught",
        tuple(f"padded-{fault}" for fault in FAULTS),
        lambda rows, seed: all(rows[f"padded-{f}"]["outcome"]["wrong"] > 0 for f in FAULTS),
    ),
    Statement(
        "at every batch size EXSPEC takes at most as many target passes as static batches",
        ("exspec-8", "static-8"),
        _fewer("exspec", "static"),
    ),
    Statement(
        "at every batch size so does a pool that is filled again",
        ("pool-8", "static-8"),
        _fewer("pool", "static"),
    ),
    Statement(
        "rows of nearly equal length are grouped more often than random ones",
        ("narrow", "random"),
        at_least("narrow", "random", "grouping_rate"),
    ),
    Statement(
        "at batch 8 speculation in a pool is faster than in static batches",
        ("pool-8", "static-8"),
        _faster("pool-8", "static-8"),
    ),
    Statement(
        "at batch 8 ragged static batches are faster than padded ones that are realigned",
        ("static-8", "realigned-8"),
        _faster("static-8", "realigned-8"),
    ),
    Statement(
        "at batch 8 speculation in a pool is faster than plain static batches",
        ("pool-8", "plain-8"),
        _faster("pool-8", "plain-8"),
    ),
    Statement(
        "at batch 8 EXSPEC is faster than a pool without grouping",
        ("exspec-8", "pool-8"),
        _faster("exspec-8", "pool-8"),
    ),
    Statement(
        "speculation in static batches gains from batch 8 over batch 1",
        ("static-8", "static-1"),
        _faster("static-8", "static-1"),
    ),
)
