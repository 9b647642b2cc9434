"""Chunked pipeline parallelism of long prompts, simulated: what chunks of equal cost are worth.

    python -m experiments.prefill_pipeline

Nothing here is measured. A chunk costs the floating-point operations that ``models.flops`` counts
for the model's shape, at the chip's published peak, and one reading of the layers' weights at the
bandwidth of its memory; hand-over between stages is not counted. Chunks are planned with these
costs, and simulated with costs that deviate from them at random, seed by seed, for every chunk on
every stage. Single prompts of ``--lengths``, and streams of prompts whose lengths are drawn anew
for every seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.fit import MODELS, config_of
from experiments.settings import from_flags
from experiments.statements import Row, Statement, Test, value
from experiments.tpu_slices import CHIPS
from models.decoder import Config, specs
from models.flops import layer_flops
from models.params import count
from research.context.qwen25_1m.pipeline import (
    ChunkCost,
    best_equal,
    equal_chunks,
    even_stages,
    plan_chunks,
    plan_stream,
    simulate,
)

METHODS = (
    "whole", "pieces", "equal-cost-pieces", "misjudged-pieces", "equal-size", "equal-size-best",
    "equal-cost",
)  # fmt: skip
"""``pieces``: of ``--piece`` tokens. ``equal-cost-pieces``: as many chunks, of equal cost;
``misjudged-pieces``: the same, planned with half of the cost of attention. ``equal-cost``: the best
number of chunks of equal cost; ``equal-size``: as many of equal size; ``equal-size-best``: the best
number of those."""


def _each(row: Row, name: str, seed: int) -> list[float]:
    """A list of samples, one of each scenario, at one seed or in the mean."""
    return [value({name: one}, name, seed) for one in row[name]]


def below(a: str, b: str, name: str, factor: float = 1.0) -> Test:
    """Whether ``a`` has less of ``name`` than ``factor`` times ``b``, in every scenario."""
    return lambda rows, seed: all(
        x < factor * y
        for x, y in zip(_each(rows[a], name, seed), _each(rows[b], name, seed), strict=True)
    )


STATEMENTS = (
    Statement(
        "the bubble is lower for chunks of equal cost than for as many pieces of one size",
        ("equal-cost-pieces", "pieces"),
        below("equal-cost-pieces", "pieces", "bubble"),
    ),
    Statement(
        "so it is when they are planned with half of the cost of attention",
        ("misjudged-pieces", "pieces"),
        below("misjudged-pieces", "pieces", "bubble"),
    ),
    Statement(
        "it is lower, too, where there are many chunks: the best number for equal cost",
        ("equal-cost", "equal-size"),
        below("equal-cost", "equal-size", "bubble"),
    ),
    Statement(
        "prompts are done earlier than with the best number of chunks of equal size",
        ("equal-cost", "equal-size-best"),
        below("equal-cost", "equal-size-best", "makespan"),
    ),
    Statement(
        "by more than 2%",
        ("equal-cost", "equal-size-best"),
        below("equal-cost", "equal-size-best", "makespan", 0.98),
    ),
    Statement(
        "with fewer chunks",
        ("equal-cost", "equal-size-best"),
        below("equal-cost", "equal-size-best", "chunks"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is simulated; see the flags."""

    model: str
    chip: str
    lengths: tuple[int, ...]
    stages: tuple[int, ...]
    stream: int
    piece: int
    multiple: int
    deviation: float
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


def cost_of(cfg: Config, chip: str) -> ChunkCost:
    """Seconds of a chunk on one chip: operations at its peak, the layers' weights read once.

    Raises:
        ValueError: an unknown chip.
    """
    if chip not in CHIPS:
        raise ValueError(f"unknown chip {chip!r}: use one of {', '.join(CHIPS)}.")
    one = cfg.num_layers * layer_flops(cfg, 0)
    pair = cfg.num_layers * layer_flops(cfg, 1) - one
    tables = (1 if cfg.tied else 2) * cfg.vocab_size * cfg.hidden_size
    weights = 2 * (count(specs(cfg)) - tables)  # bfloat16
    peak = CHIPS[chip]
    return ChunkCost(one / peak.flops, pair / peak.flops, weights / peak.bandwidth)


def cut(
    method: str, lengths: Sequence[int], cost: ChunkCost, stages: int, settings: Settings
) -> list[np.ndarray]:
    """Chunks of each prompt by a method's name.

    Raises:
        ValueError: an unknown method.
    """
    multiple = settings.multiple
    match method:
        case "whole":
            return [np.array([tokens]) for tokens in lengths]
        case "pieces":
            return [equal_chunks(n, -(-n // settings.piece), multiple) for n in lengths]
        case "equal-cost":
            return plan_stream(lengths, cost, stages, multiple)
    like = "pieces" if method.endswith("-pieces") else "equal-cost"
    counts = [len(plan) for plan in cut(like, lengths, cost, stages, settings)]
    pairs = list(zip(lengths, counts, strict=True))
    wrong = dataclasses.replace(cost, per_pair=cost.per_pair / 2)
    match method:
        case "equal-cost-pieces":
            return [plan_chunks(n, cost, stages, k, multiple) for n, k in pairs]
        case "misjudged-pieces":
            return [plan_chunks(n, wrong, stages, k, multiple) for n, k in pairs]
        case "equal-size":
            return [equal_chunks(n, k, multiple) for n, k in pairs]
        case "equal-size-best":
            longest = max(lengths)
            # Every number of chunks for the longest prompt, down to chunks of one block.
            sizes = {-(-longest // k) for k in range(1, longest // multiple + 1)}
            return best_equal(lengths, cost, stages, sorted(sizes), multiple)
    raise ValueError(f"unknown method {method!r}: choose of {', '.join(METHODS)}.")


def measure(
    plans: Sequence[np.ndarray],
    cost: ChunkCost,
    stages: int,
    deviation: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    """One simulation, with costs that deviate."""
    times = even_stages(np.concatenate([cost.times(plan) for plan in plans]), stages)
    found = simulate(times * np.exp(deviation * rng.standard_normal(times.shape)))
    ideal = sum(float(cost.work(int(plan.sum()))) for plan in plans) / stages
    return {
        "chunks": float(sum(map(len, plans))),
        "largest": float(max(plan.max() for plan in plans)),
        "smallest": float(min(plan.min() for plan in plans)),
        "bubble": found.bubble,
        "makespan": found.makespan,
        "over_ideal": found.makespan / ideal,
    }


def draw(settings: Settings, tokens: int | None, seed: int) -> list[int]:
    """The prompts of a scenario: one of ``tokens``, or a stream of lengths up to the longest."""
    if tokens is not None:
        return [tokens]
    low, high = min(settings.lengths) / 4, max(settings.lengths)
    rng = np.random.default_rng([seed, 1])
    return np.exp(rng.uniform(np.log(low), np.log(high), settings.stream)).astype(int).tolist()


def curve(tokens: int, stages: int, cost: ChunkCost, multiple: int) -> dict[str, Any]:
    """Bubble and makespan by the number of chunks, without deviation."""
    counts = np.unique(np.geomspace(1, tokens // multiple, 40).astype(int)).tolist()
    row: dict[str, Any] = {"kind": "curve", "tokens": tokens, "stages": stages, "counts": counts}
    for name in ("equal-size", "equal-cost"):
        found = []
        for k in counts:
            sizes = (
                equal_chunks(tokens, k, multiple)
                if name == "equal-size"
                else plan_chunks(tokens, cost, stages, k, multiple)
            )
            found.append(measure([sizes], cost, stages, 0.0, np.random.default_rng(0)))
        row[name] = {key: [f[key] for f in found] for key in ("bubble", "over_ideal")}
    return row


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row per scenario and method, and the curves of the longest prompt.

    Raises:
        ValueError: an unknown model, chip or method.
    """
    cost = cost_of(config_of(settings.model), settings.chip)
    rows: list[dict[str, Any]] = []
    for stages in settings.stages:
        for tokens in (*settings.lengths, None):
            for method in settings.methods:
                runs = []
                for seed in settings.seeds:
                    lengths = draw(settings, tokens, seed)
                    plans = cut(method, lengths, cost, stages, settings)
                    rng = np.random.default_rng([seed, 2])
                    runs.append(measure(plans, cost, stages, settings.deviation, rng))
                row = {"kind": "method", "method": method, "tokens": tokens, "stages": stages}
                rows.append(row | record.samples(runs))
                print(f"{method}: {sentence(rows[-1])}", flush=True)
    longest = max(settings.lengths)
    return rows + [curve(longest, stages, cost, settings.multiple) for stages in settings.stages]


def sentence(row: Row) -> str:
    """A row in words."""
    what = "a stream" if row["tokens"] is None else f"{row['tokens']} tokens"
    return (
        f"{what} on {row['stages']} stages: {row['chunks']['mean']:.0f} chunks, "
        f"{row['makespan']['mean']:.1f} s, {100 * row['bubble']['mean']:.1f}% idle"
    )


def answers(rows: Sequence[Row], seeds: int) -> list[dict[str, Any]]:
    """The statements, each about all scenarios."""
    merged: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == "method":
            mine = merged.setdefault(row["method"], {"method": row["method"]})
            for name in ("bubble", "makespan", "chunks"):
                mine.setdefault(name, []).append(row[name])
    return statements.answer(list(merged.values()), STATEMENTS, seeds)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    try:
        sizes = {name: tuple(map(int, getattr(settings, name))) for name in ("lengths", "stages")}
        settings = dataclasses.replace(settings, **sizes)
        rows = run(settings)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    found = answers(rows, len(settings.seeds))
    print(statements.show(found))
    path = record.save(
        "prefill_pipeline", rows, config=settings, seeds=settings.seeds, statements=found
    )
    print("saved", path)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "qwen2.5-7b", f"{', '.join(MODELS)}, or a folder's config.json.")
    flags.DEFINE_string("chip", "v5e", f"Whose peaks: {', '.join(CHIPS)}.")
    flags.DEFINE_list("lengths", ["131072", "1048576"], "Tokens of single prompts.")
    flags.DEFINE_list("stages", ["2", "4", "8"], "Of the pipeline, each with as many layers.")
    flags.DEFINE_integer("stream", 8, "Prompts of a stream.", lower_bound=1)
    flags.DEFINE_integer("piece", 32768, "Tokens of a piece of fixed size.", lower_bound=1)
    flags.DEFINE_integer("multiple", 512, "Chunks are multiples of it.", lower_bound=1)
    flags.DEFINE_float("deviation", 0.05, "Of costs: of their logarithm, one sigma.")
    flags.DEFINE_list("methods", list(METHODS), "What to compare.")
    flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Of deviations and streams.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
