"""A little text, and tasks that fine-tune on it, for the tests of context extension."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny_lm
from configs.defaults import Config
from models.attention import Step
from models.sharding import make_mesh
from tests.train.text import write_corpus
from train.config import TrainConfig, build, build_task
from train.task import Context

LENGTH = 32


def settings(folder: pathlib.Path) -> Config:
    """The tiny config of two rows on a little text under ``folder``."""
    config = tiny_lm.get_config()
    config.task.corpus, config.task.tokenizer = write_corpus(folder)
    config.task.sequence_length, config.task.model.vocab_size = LENGTH, 280
    config.steps, config.batch_size, config.log_every = 3, 2, 1
    config.optimizer.warmup_steps, config.evaluate_every = 0, 0
    config.task.unroll = False  # compiles faster
    return config


def prepared(config: Config, name: str, **fields: Any) -> tuple[Any, Context]:
    """A task of that name with other fields, and its context."""
    config = config.copy_and_resolve_references()
    config.task.name = name
    for field, value in fields.items():
        config.task[field] = value
    built = build(TrainConfig, config.to_dict())
    return build_task(built), Context(built, make_mesh("", jax.devices()[:1]))


def amplified(task: Any, context: Context) -> Any:
    """Initial parameters whose decoder is large enough for positions to matter."""
    params = task.init(jax.random.key(0), None, context)
    return task.with_trunk(params, jax.tree.map(lambda x: 4 * x, task.trunk(params)))


def batch_of(documents: list[int], seed: int = 0) -> dict[str, jax.Array]:
    """One row of random documents of these lengths."""
    rng, total = np.random.default_rng(seed), sum(documents)
    row = {
        "tokens": rng.integers(0, 280, total),
        "targets": rng.integers(0, 280, total),
        "segments": np.repeat(np.arange(1, len(documents) + 1), documents),
        "positions": np.concatenate([np.arange(n) for n in documents]),
    }
    batch = {name: jnp.asarray(x[None], jnp.int32) for name, x in row.items()}
    return batch | {"mask": jnp.ones((1, total), jnp.float32)}


def step_of(batch: dict[str, jax.Array]) -> Step:
    """What a policy sees of a batch."""
    return Step(batch["positions"], segments=batch["segments"])


@functools.cache
def compiled(task: Any) -> Any:
    """Sum of nats of (params, batch, key or None) under the task's own policy."""
    return jax.jit(lambda params, batch, key: task.nats(params, batch, key)[0])


def nats(task: Any, params: Any, batch: dict[str, jax.Array], key: int | None = None) -> float:
    """Sum of nats of a batch, in training if a key is given."""
    return float(compiled(task)(params, batch, None if key is None else jax.random.key(key)))


def part(batch: dict[str, jax.Array], start: int, stop: int) -> dict[str, jax.Array]:
    """Some positions of a batch."""
    return {name: x[:, start:stop] for name, x in batch.items()}
