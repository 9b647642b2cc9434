"""The compiled training step: gradients, accumulation, clipping, guard, update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from models.params import cast
from train.config import TrainConfig
from train.optimizer import clip_gradients
from train.state import TrainState
from train.task import Context, Task

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_step(
    task: Task, config: TrainConfig, optimizer: optax.GradientTransformation, context: Context
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """``step(state, rest, batches, resident) -> (state, metrics)`` for ``steps_per_call`` updates.

    ``batches`` are stacked along a first axis, or None if the task makes them on the device, from
    the arrays ``resident`` (None: from nothing).
    Metrics are stacked likewise. Random keys depend on the seed and the number of the update only.
    """
    root = jax.random.key(config.seed)

    def one(
        state: TrainState, batch: Any, rest: Any, resident: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(root, state.step)
        if batch is None:
            batch = task.generate(jax.random.fold_in(key, 0), config.batch_size, resident)
        grads, metrics = _gradients(task, config, context, state.trained, rest, batch, key)
        return _update(config, optimizer, state, grads, metrics)

    def step(
        state: TrainState, rest: Any, batches: Any, resident: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(
            lambda s, b: one(s, b, rest, resident),
            state,
            batches,
            length=config.steps_per_call,
            unroll=config.steps_per_call == 1,  # a loop of one only costs
        )

    return step


def _gradients(
    task: Task,
    config: TrainConfig,
    context: Context,
    trained: Any,
    rest: Any,
    batch: Any,
    key: Array,
) -> tuple[Any, dict[str, Array]]:
    """Weighted mean gradient and metrics over the microbatches of one batch."""
    dtype = DTYPES[config.compute_dtype]
    rest = cast(rest, dtype, task.full_precision)

    def loss(trained: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        params = task.combine(cast(trained, dtype, task.full_precision), rest)
        value, metrics = task.loss(params, batch, key)
        return value.astype(jnp.float32), {
            k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()
        }

    def one(batch: Any, index: Array) -> tuple[Array, Any, dict[str, Array]]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, batch, jax.random.fold_in(key, 1 + index)
        )
        weight = metrics.pop("weight", jnp.ones((), jnp.float32))
        return weight, grads, {"loss": value, **metrics}

    parts = config.microbatches
    if parts == 1:
        weight, grads, metrics = one(batch, jnp.zeros((), jnp.int32))
        return grads, {**metrics, "weight": weight}

    def split(x: Array) -> Array:
        # Every part takes rows from every device, so that nothing moves between them.
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        sharding = context.batch_sharding(x.shape[1], leading=1)
        return jax.lax.with_sharding_constraint(x, sharding)

    def add(total: Any, xs: tuple) -> tuple[Any, None]:
        weight, grads, metrics = one(*xs)
        scaled = jax.tree.map(lambda x: x * weight.astype(x.dtype), (grads, metrics))
        return jax.tree.map(jnp.add, total, (weight, *scaled)), None

    batches = jax.tree.map(split, batch)
    indices = jnp.arange(parts, dtype=jnp.int32)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], batches), indices[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (weight, grads, metrics), _ = jax.lax.scan(add, zeros, (batches, indices))
    safe = jnp.maximum(weight, 1e-12)
    grads, metrics = jax.tree.map(lambda x: x / safe.astype(x.dtype), (grads, metrics))
    return grads, {**metrics, "weight": weight}


def _update(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Any,
    metrics: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """One update, or none where the loss or a gradient is not finite."""
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    clipped = clip_gradients(grads, norm, config)
    updates, new_optimizer = optimizer.update(clipped, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    average = state.average
    if average is not None:
        average = jax.tree.map(lambda a, p: a + (1 - config.ema_decay) * (p - a), average, trained)
    new = TrainState(
        step=state.step + 1,
        trained=trained,
        optimizer=new_optimizer,
        average=average,
        bad_in_row=jnp.zeros_like(state.bad_in_row),
    )
    old = dataclasses.replace(  # type: ignore[type-var]
        state, step=state.step + 1, bad_in_row=state.bad_in_row + 1
    )
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    return kept, {**metrics, "grad_norm": norm, "bad_in_row": kept.bad_in_row}
