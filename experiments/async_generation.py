"""The asynchronous generator against one process after the other, simulated.

    python -m experiments.async_generation

Times are in steps of the device: what the engine does beside the device (scheduling, detokenising,
handing over) takes ``--overheads`` of such a step in all, half of it detokenising and a quarter
scheduling; the rest is handed over three times, in the one-after-the-other engine within one
process and so for nothing. Requests have lengths drawn anew for every seed; ``--stops`` of them end
with a stop token, the others by their limit. Nothing here is measured.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.settings import from_flags
from experiments.statements import Row, Statement, Test, value
from research.context.qwen25_1m.scheduler import Engine, Request, Span, simulate

METHODS = {"in-turn": 0, "handed-over": 0, "asynchronous": 1, "two-ahead": 2}
"""Steps scheduled ahead. ``handed-over``: three processes that still wait for each other."""


def _per(name: str, method: str, overhead: float) -> Any:
    return lambda rows, seed: value(rows[f"{method}@{overhead}"], name, seed)


def below(a: str, b: str, name: str, overheads: Sequence[float]) -> Test:
    """Whether ``a`` has less of ``name`` than ``b`` at each of some overheads."""
    return lambda rows, seed: all(
        _per(name, a, x)(rows, seed) < _per(name, b, x)(rows, seed) for x in overheads
    )


def _named(methods: Sequence[str], overheads: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{method}@{x}" for method in methods for x in overheads)


HIDDEN, SOME = (0.25, 0.5), (0.25, 0.5, 1.0, 2.0)
STATEMENTS = (
    Statement(
        "up to half a step of overhead the device of the asynchronous engine is idle below 1%",
        _named(("asynchronous",), HIDDEN),
        lambda rows, seed: all(
            value(rows[f"asynchronous@{x}"], "idle", seed) < 0.01 for x in HIDDEN
        ),
    ),
    Statement(
        "with any overhead it is done earlier than one process after the other",
        _named(("asynchronous", "in-turn"), SOME),
        below("asynchronous", "in-turn", "makespan", SOME),
    ),
    Statement(
        "three processes that wait for each other are slower than one",
        _named(("handed-over", "in-turn"), SOME),
        below("in-turn", "handed-over", "makespan", SOME),
    ),
    Statement(
        "without overhead it is not done earlier: its wasted slots are all that is left",
        _named(("asynchronous", "in-turn"), (0.0,)),
        lambda rows, seed: (
            value(rows["asynchronous@0.0"], "makespan", seed)
            >= value(rows["in-turn@0.0"], "makespan", seed)
        ),
    ),
    Statement(
        "every text that ends with a stop token wastes exactly one slot",
        _named(("asynchronous",), SOME),
        lambda rows, seed: all(
            value(rows[f"asynchronous@{x}"], "wasted_per_stop", seed) == 1 for x in SOME
        ),
    ),
    Statement(
        "scheduling two steps ahead is never faster up to an overhead of a step, and wastes more",
        _named(("asynchronous", "two-ahead"), (0.25, 0.5, 1.0)),
        lambda rows, seed: all(
            value(rows[f"two-ahead@{x}"], "makespan", seed)
            >= value(rows[f"asynchronous@{x}"], "makespan", seed)
            and value(rows[f"two-ahead@{x}"], "wasted", seed)
            > value(rows[f"asynchronous@{x}"], "wasted", seed)
            for x in (0.25, 0.5, 1.0)
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is simulated; see the flags."""

    methods: tuple[str, ...]
    overheads: tuple[float, ...]
    requests: int
    rows: int
    prompt: int
    limit: int
    stops: float
    slots: int
    seeds: tuple[int, ...]


def draw(settings: Settings, seed: int) -> list[Request]:
    """Requests of one seed: a stop token anywhere before the limit, for a share of them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(settings.requests):
        stop = int(rng.integers(1, settings.limit)) if rng.random() < settings.stops else None
        found.append(Request(settings.prompt, settings.limit, stop))
    return found


def engine_of(method: str, overhead: float, settings: Settings) -> Engine:
    """The engine of a method: a step of the device takes 1.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose of {', '.join(METHODS)}.")
    return Engine(
        schedule=Span(overhead / 4),
        device=Span(1.0),
        detokenise=Span(overhead / 2),
        handover=0.0 if method == "in-turn" else overhead / 12,
        ahead=METHODS[method],
        rows=settings.rows,
        slots=settings.slots,
    )


def measure(method: str, overhead: float, settings: Settings, seed: int) -> dict[str, float]:
    """One simulation."""
    requests = draw(settings, seed)
    found = simulate(engine_of(method, overhead, settings), requests)
    stopped = sum(r.stop_after is not None and r.stop_after < r.limit for r in requests)
    return {
        "makespan": found.makespan,
        "rate": found.tokens / found.makespan,
        "idle": found.idle,
        "wasted": float(found.wasted),
        "wasted_per_stop": found.wasted / max(1, stopped),
        "wasted_share": found.wasted / (found.wasted + found.tokens),
        "peak_slots": float(found.peak_slots),
    }


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row per method and overhead.

    Raises:
        ValueError: an unknown method.
    """
    rows = []
    for overhead in settings.overheads:
        for method in settings.methods:
            runs = [measure(method, overhead, settings, seed) for seed in settings.seeds]
            row: dict[str, Any] = {"engine": method, "overhead": overhead}
            row["method"] = f"{method}@{overhead}"
            rows.append(row | record.samples(runs))
    return rows


def show(rows: Sequence[Row]) -> str:
    """The result as a plain table."""
    lines = [f"{'engine':20} {'tokens/step':>11} {'idle':>6} {'wasted':>7}"]
    for r in rows:
        lines.append(
            f"{r['method']:20} {r['rate']['mean']:11.2f} {100 * r['idle']['mean']:5.1f}% "
            f"{r['wasted']['mean']:7.1f}"
        )
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, overheads=tuple(map(float, settings.overheads)))
    try:
        rows = run(settings)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    statements.conclude("async_generation", rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_list("methods", list(METHODS), "What to compare.")
    flags.DEFINE_list("overheads", ["0", "0.25", "0.5", "1", "2"], "Of a step of the device.")
    flags.DEFINE_integer("requests", 256, "Texts to write.", lower_bound=1)
    flags.DEFINE_integer("rows", 32, "Of a step, at most.", lower_bound=1)
    flags.DEFINE_integer("prompt", 1000, "Tokens of a prompt.", lower_bound=0)
    flags.DEFINE_integer("limit", 256, "Tokens of a text, at most.", lower_bound=2)
    flags.DEFINE_float("stops", 0.8, "Share of texts that end with a stop token.")
    flags.DEFINE_integer("slots", 2**20, "Of the cache.", lower_bound=1)
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of the lengths of texts.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
