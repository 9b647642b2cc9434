"""A task that trains in milliseconds, for the tests of the loop: a two-layer network on noise.

It is a config as well, so that tests can launch it: ``--config=tests/train/regression.py``.
"""

import dataclasses
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct
from jaxtyping import Array

from configs import defaults
from models.params import Constant, Normal, ParamSpec
from train.config import TrainConfig, build
from train.task import BaseTask, Context


@struct.dataclass
class Network:
    """Weights: ``scale`` may be frozen."""

    first: Any
    second: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row i of an endless table; rows from ``poison`` on are not numbers."""

    width: int
    poison: int
    delay: float

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        x = np.random.default_rng(index).normal(size=self.width).astype(np.float32)
        y = np.sin(x.sum()) if index < self.poison else np.float32("nan")
        return {"x": x, "y": np.float32(y), "mask": np.float32(index % 3 > 0)}


@dataclasses.dataclass(frozen=True)
class Regression(BaseTask):
    """Masked mean square error, so that parts of a batch count differently."""

    width: int = 8
    hidden: int = 16
    on_device: bool = False
    kept_rows: int = 0  # on the device: choose among so many that stay there; 0: new ones
    freeze: bool = False
    poison: int = 2**31
    delay: float = 0.0

    def specs(self) -> Network:
        return Network(
            first=ParamSpec((self.width, self.hidden), ("embed", "mlp"), Normal(0.5)),
            second=ParamSpec((self.hidden,), ("mlp",), Normal(0.5)),
            scale=ParamSpec((self.hidden,), (None,), Constant(2.0)),
        )

    def data(self, context: Context) -> grain.IterDataset | None:
        if self.on_device:
            return None
        rows = context.config.batch_size // context.process_count
        part = Shard(
            Rows(self.width, self.poison, self.delay), rows, context.process_index,
            context.process_count,
        )  # fmt: skip
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return grain.MapDataset.source(part).batch(rows).to_iter_dataset(options)

    def resident(self, context: Context) -> Array | None:
        if not self.kept_rows:
            return None
        return jax.random.normal(jax.random.key(7), (self.kept_rows, self.width))

    def generate(self, key: jax.Array, rows: int, resident: Array | None) -> dict[str, Array]:
        if resident is None:
            x = jax.random.normal(key, (rows, self.width))
        else:
            x = jnp.take(resident, jax.random.randint(key, (rows,), 0, resident.shape[0]), axis=0)
        return {"x": x, "y": jnp.sin(x.sum(-1)), "mask": jnp.ones(rows)}

    def loss(self, params: Network, batch: Any, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        hidden = jnp.tanh(batch["x"] @ params.first) * params.scale[None]
        error = jnp.square(hidden @ params.second - batch["y"]) * batch["mask"]
        weight = jnp.sum(batch["mask"])
        return jnp.sum(error) / jnp.maximum(weight, 1.0), {
            "weight": weight,
            "size": jnp.mean(jnp.abs(hidden)),
        }

    def evaluate(self, params: Network, context: Context) -> dict[str, float]:
        return {"norm": float(jnp.linalg.norm(params.first))}

    def partition(self, params: Network) -> tuple[Any, Any]:
        if not self.freeze:
            return params, None
        return params.replace(scale=None), params.scale

    def combine(self, trained: Network, rest: Any) -> Network:
        return trained.replace(scale=rest) if self.freeze else trained

    def group(self, name: str) -> str:
        return "last" if name == ".second" else "main"


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows of one process: the ``index``-th run of ``rows`` of every global batch."""

    rows: Rows
    count: int
    index: int
    processes: int

    def __len__(self) -> int:
        return len(self.rows) // self.processes

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        batch, row = divmod(i, self.count)
        return self.rows[(batch * self.processes + self.index) * self.count + row]


def get_config() -> ml_collections.ConfigDict:
    """40 updates of 8 rows, a checkpoint every 10."""
    config = defaults.training()
    config.task.update({"name": "tests.train.regression:Regression"})
    for field in dataclasses.fields(Regression):
        config.task[field.name] = field.default
    config.steps, config.batch_size = 40, 8
    config.log_every, config.checkpoint_every = 4, 10
    config.optimizer.learning_rate = 1e-2
    return config


def make(task: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """The config with changes, built."""
    config = get_config()
    config.task.update(task or {})
    for name, value in changes.items():
        config[name] = value
    return build(TrainConfig, config.to_dict())
