"""Sparse prefill on a real model: what patterns retain, and which budgets heads need.

    python -m experiments.sparse_prefill --text=BOOK.txt

Recall and error of outputs in every head of every layer, over budgets and patterns; then budgets
are searched and refined. What it costs is in :mod:`experiments.bench_sparse_prefill`. Every seed is
another excerpt of the text.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import record, statements
from experiments.settings import from_flags
from experiments.statements import Statement, value
from inference.policies.dual_chunk import DualChunkPolicy
from models import decoder
from models.load import Model, load
from research.context.qwen25_1m import budgets
from research.context.qwen25_1m.patterns import (
    AShape,
    BlockSparse,
    Pattern,
    RandomColumns,
    VerticalSlash,
)
from research.context.qwen25_1m.retention import MeasuringPolicy, Retention, measure

POINTS = {
    "vertical_slash": ((50, 100), (150, 250), (400, 500), (900, 1000)),
    "naive": ((50, 100), (150, 250), (400, 500), (900, 1000)),
    "a_shape": ((30, 100), (30, 400), (30, 1000), (30, 2000)),
    "random": (50, 300, 900, 1800),
    "block_sparse": (3, 8, 16, 32),
}
"""Budgets of each pattern: columns and diagonals, sink and local window, columns, blocks."""


def curve(row: dict[str, Any], name: str, seed: int) -> np.ndarray:
    """A pattern's values over its budgets, for one seed or (-1) in the mean."""
    return np.array([value({"x": sample}, "x", seed) for sample in row[name]])


def monotone(rows: dict[str, dict[str, Any]], seed: int) -> bool:
    """Whether a larger budget retains more and errs less."""
    row = rows["vertical_slash"]
    recall, error = curve(row, "recall", seed), curve(row, "error", seed)
    return bool(np.all(np.diff(recall) >= 0) and np.all(np.diff(error) <= 0))


def beats(rival: str) -> Callable[[dict[str, dict[str, Any]], int], bool]:
    """Whether vertical-slash retains more than the rival at each density that both reach."""

    def test(rows: dict[str, dict[str, Any]], seed: int) -> bool:
        density, recall = (curve(rows["vertical_slash"], x, seed) for x in ("density", "recall"))
        theirs, their_recall = (curve(rows[rival], x, seed) for x in ("density", "recall"))
        shared = (density >= theirs.min()) & (density <= theirs.max())
        return bool(
            shared.any()
            and np.all(recall[shared] > np.interp(density[shared], theirs, their_recall))
        )

    return test


STATEMENTS = (
    Statement(
        "a larger budget retains more attention and errs less", ("vertical_slash",), monotone
    ),
    *(
        Statement(
            f"vertical-slash retains more than {words} at equal density",
            ("vertical_slash", rival),
            beats(rival),
        )
        for rival, words in (
            ("a_shape", "a sink and a local window"),
            ("random", "random columns"),
            ("block_sparse", "blocks chosen by mean products"),
        )
    ),
    Statement(
        "critical rotations select at least as well as those of dual chunk attention",
        ("vertical_slash", "naive"),
        lambda rows, seed: bool(
            np.all(
                curve(rows["vertical_slash"], "recall", seed)
                >= curve(rows["naive"], "recall", seed)
            )
        ),
    ),
    Statement(
        "refinement brings every head to the threshold or the cap",
        ("refined",),
        lambda rows, seed: value(rows["refined"], "short", seed) == 0,
    ),
    Statement(
        "refinement needs a smaller total budget than raising all heads alike",
        ("refined", "uniform"),
        lambda rows, seed: (
            value(rows["refined"], "budget", seed) < value(rows["uniform"], "budget", seed)
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and on what; see the flags."""

    model: str
    text: str
    seeds: tuple[int, ...]
    tokens: int
    chunk: int
    local: int
    threshold: float
    step: int
    cap: int
    scale: float


def excerpt(model: Model, text: str, tokens: int, seed: int) -> jax.Array:
    """(1, tokens) of the text, another part for every seed."""
    read = pathlib.Path(text).read_text(encoding="utf-8")
    start = (seed + 1) * len(read) // 8
    ids = model.tokenizer.encode(read[start : start + 8 * tokens])
    if len(ids) < tokens:
        raise ValueError(f"{text} is too short for {tokens} tokens: give a longer text.")
    return jnp.asarray([ids[:tokens]], jnp.int32)


def patterns_of(kind: str, cfg: decoder.Config, seed: int) -> dict[str, Pattern]:
    """A kind of pattern under each of its budgets, by number."""
    made = {}
    points: Any = POINTS[kind]
    ones = jnp.ones((cfg.num_heads,), jnp.int32)
    for i, point in enumerate(points):
        if kind in ("vertical_slash", "naive"):
            most = (points[-1][0], points[-1][1])
            made[str(i)] = VerticalSlash(point[0] * ones, point[1] * ones, most, kind == "naive")
        elif kind == "a_shape":
            made[str(i)] = AShape(point[0], point[1], points[-1])
        elif kind == "random":
            made[str(i)] = RandomColumns(point, seed, points[-1])
        else:
            made[str(i)] = BlockSparse(point, points[-1])
    return made


measure_once = jax.jit(measure, static_argnames=("cfg", "layers"))


def run_curves(settings: Settings, model: Model) -> list[dict[str, Any]]:
    """A row per pattern: recall, error and density over its budgets."""
    dense = DualChunkPolicy(settings.chunk, settings.local)
    rows = []
    for kind, points in POINTS.items():
        per_seed = []
        for seed in settings.seeds:
            print(kind, "seed", seed, flush=True)
            policy = MeasuringPolicy(dense, patterns_of(kind, model.cfg, seed))
            tokens = excerpt(model, settings.text, settings.tokens, seed)
            got = measure_once(model.params, model.cfg, policy, tokens)
            per_seed.append(
                {
                    field: [float(jnp.mean(getattr(r, field))) for r in got.values()]
                    for field in ("recall", "error", "density")
                }
            )
        rows.append(
            {"method": kind, "points": [list(np.atleast_1d(p).tolist()) for p in points]}
            | {
                field: [record.sample(x) for x in zip(*(s[field] for s in per_seed), strict=True)]
                for field in ("recall", "error", "density")
            }
        )
    return rows


def search(
    settings: Settings, model: Model, tokens: jax.Array
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Base budgets (layers, h) from the candidates, and how many heads each pattern fits best."""
    ones = jnp.ones((model.cfg.num_heads,), jnp.int32)
    tables = [budgets.scaled(c, settings.scale) for c in budgets.CANDIDATES]
    most = (max(v for v, _ in tables) + 100, max(s for _, s in tables))
    made: dict[str, Pattern] = {
        f"{v} columns, {s} diagonals": VerticalSlash(v * ones, s * ones, most) for v, s in tables
    }
    names = list(made)
    sink, local = budgets.scaled(budgets.A_SHAPE, settings.scale)
    blocks = budgets.scaled((budgets.BLOCKS, 1), settings.scale)[0]
    made[f"A-shape, {sink} and {local}"] = AShape(sink, local, (sink, local))
    made[f"{blocks} blocks"] = BlockSparse(blocks, blocks)
    policy = MeasuringPolicy(DualChunkPolicy(settings.chunk, settings.local), made)
    got = measure_once(model.params, model.cfg, policy, tokens)
    scores = {name: np.asarray(got[name].recall) for name in made}
    best = budgets.best_candidates({name: scores[name] for name in names})
    winners = budgets.best_candidates(scores)
    counts = {name: int(np.sum(winners == i)) for i, name in enumerate(made)}
    return np.array(tables)[best][..., 0], np.array(tables)[best][..., 1], counts


def run_refinement(settings: Settings, model: Model) -> list[dict[str, Any]]:
    """Rows of the search, the refinement, and the uniform raise."""
    cap = (settings.cap, settings.cap)
    dense = DualChunkPolicy(settings.chunk, settings.local)
    found: dict[str, list[Any]] = {"refined": [], "uniform": [], "searched": []}
    for seed in settings.seeds:
        print("refinement, seed", seed, flush=True)
        tokens = excerpt(model, settings.text, settings.tokens, seed)
        vertical, slash, winners = search(settings, model, tokens)
        found["searched"].append(winners)

        def recall(vertical: np.ndarray, slash: np.ndarray, tokens: jax.Array = tokens):
            pattern = VerticalSlash(jnp.asarray(vertical), jnp.asarray(slash), cap)
            policy = MeasuringPolicy(dense, {}, {"heads": pattern})
            got: Retention = measure_once(model.params, model.cfg, policy, tokens)["heads"]
            print("lowest recall", float(jnp.min(got.recall)), flush=True)
            return np.asarray(got.recall)

        limits = {"threshold": settings.threshold, "step": settings.step, "cap": cap}
        for name, raise_budgets in (
            ("refined", budgets.refine),
            ("uniform", budgets.refine_uniformly),
        ):
            found[name].append(raise_budgets(recall, vertical, slash, **limits))
    rows: list[dict[str, Any]] = [
        {
            "method": "searched",
            "heads": {
                name: record.sample([float(w[name]) for w in found["searched"]])
                for name in found["searched"][0]
            },
        }
    ]
    for name in ("refined", "uniform"):
        rows.append({"method": name} | refinement_row(settings, found[name]))
    return rows


def refinement_row(settings: Settings, found: Sequence[budgets.Refined]) -> dict[str, Any]:
    """What raising budgets came to, by seed; ``short`` counts heads that could have had more."""

    def sample(of: Callable[[budgets.Refined], Any]) -> dict[str, Any]:
        return record.sample([float(of(one)) for one in found])

    return {
        "budget": sample(lambda r: r.total),
        "passes": sample(lambda r: r.passes),
        "lowest": sample(lambda r: r.recall.min()),
        "mean": sample(lambda r: r.recall.mean()),
        "short": sample(
            lambda r: np.sum((r.recall < settings.threshold) & (r.vertical < settings.cap))
        ),
        "at_cap": sample(lambda r: np.sum(r.vertical >= settings.cap)),
    }


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row per pattern, one of the search, and one for each way to raise budgets."""
    model = load(settings.model)
    return [*run_curves(settings, model), *run_refinement(settings, model)]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The patterns' recall at each of their densities."""
    lines = []
    for row in rows:
        if "recall" in row:
            pairs = zip(row["density"], row["recall"], strict=True)
            cells = [f"{d['mean']:.2f}: {r['mean']:.3f}" for d, r in pairs]
            lines.append(f"{row['method']:15} {'  '.join(cells)}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    rows = run(settings)
    print(show(rows))
    name = record.name_of("sparse_prefill", settings.model, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS, settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "smollm2-135m", "The model.")
    flags.DEFINE_string("text", None, "A text file that excerpts are taken from.", required=True)
    flags.DEFINE_list("seeds", ["0", "1"], "Excerpts.")
    flags.DEFINE_integer("tokens", 4096, "Length of an excerpt.", lower_bound=1)
    flags.DEFINE_integer("chunk", 2048, "Chunk size C of dual chunk attention.")
    flags.DEFINE_integer("local", 256, "Local size w; the stride C - w is a multiple of 64.")
    flags.DEFINE_float("threshold", 0.9, "Recall that refinement wants of every head.")
    flags.DEFINE_integer("step", 256, "What a refinement adds to both budgets.")
    flags.DEFINE_integer("cap", 3000, "The largest budgets of refinement.")
    flags.DEFINE_float("scale", 0.125, "Factor on the published candidates, for shorter texts.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
