"""The training step's rate against that of a plain large matrix product, in one run.

    python -m experiments.bench_train --config=base_lm

Work is 6 FLOPs per parameter and token (a tied embedding counts once) plus the products of causal
attention; what is computed twice, and all that is not a product, counts as nothing. Products and
steps alternate, so that a machine that changes its pace changes both.
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import record
from models import decoder
from models import params as model_params
from models.sharding import make_mesh
from train.config import TrainConfig, build, build_task
from train.state import create_state
from train.step import make_step
from train.task import Context

SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (3072, 3072, 3072))
"""Shapes (m, k, n) of the plain products; the best of them is the machine's rate."""


def step_flops(cfg: decoder.Config, tokens: int, length: int) -> float:
    """Floating-point operations of one update on ``tokens`` tokens in rows of ``length``."""
    products = 6.0 * model_params.count(decoder.specs(cfg))
    # Scores and mixing, 2 FLOPs each per multiply-add, over (length + 1) / 2 keys on average;
    # the backward pass takes twice the forward.
    attention = 3.0 * cfg.num_layers * 4.0 * cfg.num_heads * cfg.head_dim * (length + 1) / 2
    return tokens * (products + attention)


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def products() -> list[tuple[float, Callable[[], Any]]]:
    """(FLOPs, call) of each plain float32 product, compiled and run once."""
    made = []
    for m, k, n in SIZES:
        a, b = jnp.ones((m, k), jnp.float32), jnp.ones((k, n), jnp.float32)
        compiled = jax.jit(jnp.matmul).lower(a, b).compile()
        jax.block_until_ready(compiled(a, b))
        made.append((2.0 * m * k * n, lambda f=compiled, a=a, b=b: f(a, b)))
    return made


class Training:
    """A config's compiled step with a state and one batch of random tokens."""

    def __init__(self, config: TrainConfig):
        self.task = build_task(config)
        context = Context(config, make_mesh("", jax.devices()[:1]))
        optimizer = self.task.optimizer(config, self.task.specs())
        params = self.task.init(jax.random.key(config.seed), None, context)
        self.state = create_state(params, optimizer, config.ema_decay > 0)
        draw = np.random.default_rng(0)
        shape = (config.steps_per_call, config.batch_size, self.task.sequence_length)
        tokens = draw.integers(0, self.task.model.vocab_size, shape).astype(np.int32)
        self.batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=-1),
            "segments": (1 + np.cumsum(draw.random(shape) < 0.001, axis=-1)).astype(np.int32),
            "positions": np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape).copy(),
            "mask": np.ones(shape, np.float32),
        }
        self.tokens = tokens.size
        step = jax.jit(make_step(self.task, config, optimizer, context), donate_argnums=0)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, None, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> Any:
        """One call of the step."""
        self.state, metrics = self.compiled(self.state, None, self.batch)
        return metrics


def measure(config: TrainConfig, repeats: int) -> dict[str, Any]:
    """Rates of product and step, sample by sample, and the ratio of their best."""
    plain, training = products(), Training(config)
    jax.block_until_ready(training.run())
    work = step_flops(training.task.model, training.tokens, training.task.sequence_length)
    rates: list[float] = []
    times: list[float] = []
    for _ in range(repeats):
        rates.append(max(flops / min(seconds(f) for _ in range(3)) for flops, f in plain) / 1e9)
        times.append(seconds(training.run))
    steps = [work / t / 1e9 for t in times]
    return {
        "parameters": model_params.count(training.task.specs()),
        "tokens_per_call": training.tokens,
        "gflop_per_call": work / 1e9,
        "matmul_gflops": record.sample(rates),
        "step_gflops": record.sample(steps),
        "tokens_per_second": record.sample([training.tokens / t for t in times]),
        "ratio_of_best": max(steps) / max(rates),
        "ratio_of_medians": statistics.median(steps) / statistics.median(rates),
        "compile_seconds": training.compile_seconds,
    }


def main() -> None:
    """Measure one config and write ``experiments/results/bench_train.json``."""
    name = flags.DEFINE_string("config", "base_lm", "A language model of configs/.")
    repeats = flags.DEFINE_integer("repeats", 10, "Alternations of products and steps.")
    write = flags.DEFINE_bool("write", True, "Write the result file.")

    def run(_: list[str]) -> None:
        values = importlib.import_module(f"configs.{name.value}").get_config().to_dict()
        before = os.getloadavg()[0]
        row = {"config": name.value, **measure(build(TrainConfig, values), repeats.value)}
        print(
            f"{name.value}: step {row['step_gflops']['max']:.1f} GFLOP/s, plain product "
            f"{row['matmul_gflops']['max']:.1f}, ratio {row['ratio_of_best']:.3f} "
            f"(medians {row['ratio_of_medians']:.3f}), "
            f"{row['tokens_per_second']['max']:.0f} tokens/s, load average {before:.2f}"
        )
        if write.value:
            timing = {
                "bandwidth_gb_s": record.memory_bandwidth(),
                "load_average_before": before,
                "compile_seconds": row["compile_seconds"],
            }
            record.save("bench_train", [row], config=values, seeds=[values["seed"]], timing=timing)

    app.run(run)


if __name__ == "__main__":
    main()
