"""What sparse prefill costs: seconds against dense attention, and memory of prefill in pieces.

    python -m experiments.bench_sparse_prefill --text=BOOK.txt

Times the first layers of a real model over whole texts, under dual chunk attention dense and sparse
and under the model's own. Memory is the compiler's count for one layer of the shape of Qwen2.5-7B
over a cache, in pieces and at once; nothing of that size is run.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from experiments import record
from experiments.settings import from_flags
from experiments.sparse_prefill import POINTS, excerpt, measure_once
from inference.cache import init_cache
from inference.loop import prefill_chunk
from inference.policies.dual_chunk import DualChunkPolicy
from inference.policies.vertical_slash import with_budgets
from inference.tuning import in_turn
from models import decoder
from models.attention import Step
from models.load import Model, load
from models.params import shape_dtype
from research.context.qwen25_1m.patterns import Pattern, VerticalSlash
from research.context.qwen25_1m.retention import MeasuringPolicy

SHAPE = {
    "vocab_size": 256, "hidden_size": 3584, "num_layers": 1, "num_heads": 28, "num_kv_heads": 4,
    "head_dim": 128, "intermediate_size": 18944, "max_length": 1_010_000, "qkv_bias": True,
    "rope_base": 1e7,
}  # fmt: skip
"""One layer of Qwen2.5-7B-1M; its embeddings, which do not depend on pieces, are left small."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and on what; see the flags."""

    model: str
    text: str
    seeds: tuple[int, ...]
    lengths: tuple[str, ...]
    chunk: int
    local: int
    layers: int
    repeats: int
    prompt: int
    pieces: tuple[str, ...]


@functools.partial(jax.jit, static_argnames=("cfg", "layers"))
def prefill(
    params: decoder.Params,
    cfg: decoder.Config,
    tokens: jax.Array,
    policy: Any,
    layers: decoder.LayerChoice,
) -> jax.Array:
    """The hidden states after some layers."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    step = Step(positions, mode="prefill")
    return decoder.forward(params, cfg, tokens, step=step, policy=policy, layers=layers).pre_norm


def prefill_seconds(
    name: str, model: Model, tokens: jax.Array, policy: Any, layers: decoder.LayerChoice
) -> float:
    """Seconds through some layers; says what is running."""
    print(tokens.shape[1], name, flush=True)
    start = time.perf_counter()
    prefill(model.params, model.cfg, tokens, policy, layers).block_until_ready()
    return time.perf_counter() - start


def run_speed(settings: Settings, model: Model) -> list[dict[str, Any]]:
    """Rows of seconds and tokens per second through the first layers, sides in turn."""
    rows = []
    for length in map(int, settings.lengths):
        tokens = excerpt(model, settings.text, length, settings.seeds[0])
        policies, kept = sides(settings, model, tokens)
        layers = decoder.LayerChoice(0, settings.layers)
        seconds: dict[str, list[float]] = {name: [] for name in policies}
        load_before = os.getloadavg()
        ways = {
            name: functools.partial(prefill_seconds, name, model, tokens, policy, layers)
            for name, policy in policies.items()
        }
        for repeat, name, taken in in_turn(ways, settings.repeats):
            seconds[name] += [taken] if repeat else []
        fastest = min(np.median(seconds[name]) for name in ("dense", "dual chunk"))
        for name in policies:
            one = kept.get(name)
            rows.append(
                {
                    "kind": "speed",
                    "policy": name,
                    "length": length,
                    "seconds": record.sample(seconds[name]),
                    "tokens_per_second": record.sample([length / s for s in seconds[name]]),
                    "speedup": record.sample([fastest / s for s in seconds[name]]),
                    "density": None if one is None else float(jnp.mean(one.density)),
                    "recall": None if one is None else float(jnp.mean(one.recall)),
                    "load_average": list(load_before),
                }
            )
    return rows


def sides(settings: Settings, model: Model, tokens: jax.Array) -> tuple[dict[str, Any], Any]:
    """Policies by name, and what the sparse ones retain in the timed layers."""
    cfg, chunked = model.cfg, DualChunkPolicy(settings.chunk, settings.local)
    points: Any = POINTS["vertical_slash"]
    ones = jnp.ones((cfg.num_heads,), jnp.int32)
    patterns: dict[str, Pattern] = {
        f"{v}:{s}": VerticalSlash(v * ones, s * ones, points[-1]) for v, s in points
    }
    layers = decoder.LayerChoice(0, settings.layers)
    kept = measure_once(model.params, cfg, MeasuringPolicy(chunked, patterns), tokens, layers)
    every = np.ones((cfg.num_layers, cfg.num_heads), np.int32)
    policies: dict[str, Any] = {"dense": decoder.default_policy(cfg), "dual chunk": chunked}
    for v, s in points:
        sparse = with_budgets(chunked, v * every, s * every, threshold=0)
        policies[f"{v}:{s}"] = dataclasses.replace(sparse, most=points[-1])
    return policies, kept


def run_memory(settings: Settings) -> list[dict[str, Any]]:
    """Rows of the compiler's temporary memory for prefill by pieces of several sizes."""
    cfg = decoder.Config(**SHAPE)
    policy = DualChunkPolicy(settings.prompt // 4, settings.prompt // 32)
    params = shape_dtype(jax.eval_shape(decoder.unstack, shape_dtype(decoder.specs(cfg))))
    n = settings.prompt
    whole = None
    rows = []
    for piece in (n, *map(int, settings.pieces)):
        cache = jax.eval_shape(lambda: init_cache(cfg, 1, n, jnp.float32))
        row = jax.ShapeDtypeStruct((1,), jnp.int32)
        lowered = prefill_chunk.lower(
            params, cfg, policy, cache, jax.ShapeDtypeStruct((1, piece), jnp.int32), row, row,
            extent=n, outputs=frozenset(), prompt_lengths=row,
        )  # fmt: skip
        memory: Any = lowered.compile().memory_analysis()
        used = memory.temp_size_in_bytes
        whole = used if whole is None else whole
        rows.append(
            {"kind": "memory", "piece": piece, "prompt": n, "bytes": used, "share": used / whole}
        )
    return rows


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    model = load(settings.model)
    rows = [*run_speed(settings, model), *run_memory(settings)]
    for row in rows:
        if row["kind"] == "speed":
            print(
                f"{row['length']:6} {row['policy']:12} {row['seconds']['mean']:7.2f} s "
                f"{row['tokens_per_second']['mean']:8.0f} tokens/s {row['speedup']['mean']:5.2f}x"
            )
        else:
            print(f"{row['piece']:6} {row['bytes'] / 1e9:7.2f} GB {row['share']:.3f}")
    name = record.name_of("bench_sparse_prefill", settings.model)
    print("saved", record.save(name, rows, config=settings, seeds=settings.seeds))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("model", "smollm2-135m", "The model that is timed.")
    flags.DEFINE_string("text", None, "A text file that the prompt is taken from.", required=True)
    flags.DEFINE_list("seeds", ["0"], "Which excerpt.")
    flags.DEFINE_list("lengths", ["8192", "16384"], "Prompt lengths.")
    flags.DEFINE_integer("chunk", 2048, "Chunk size C of dual chunk attention.")
    flags.DEFINE_integer("local", 256, "Local size w.")
    flags.DEFINE_integer("layers", 2, "How many first layers are timed.")
    flags.DEFINE_integer("repeats", 2, "Times each is run after the first.")
    flags.DEFINE_integer("prompt", 131072, "Prompt length for memory.")
    flags.DEFINE_list("pieces", ["32768", "4096"], "Piece sizes for memory.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
