"""Optimisers, learning-rate schedules and gradient clipping."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from models.params import path_name
from train.config import OptimizerConfig, TrainConfig, build

MAIN = "main"
"""The group of every parameter that a task does not put elsewhere."""


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate by update number: linear warm-up from 0, then cosine, linear or constant.

    The first update has rate ``learning_rate / warmup_steps``, the last of cosine and linear ends
    the decay at ``final_fraction * learning_rate``.

    Raises:
        ValueError: unknown schedule, or a warm-up as long as the training.
    """
    if config.schedule not in ("cosine", "linear", "constant"):
        raise ValueError(
            f"unknown schedule {config.schedule!r}: choose cosine, linear or constant."
        )
    if config.warmup_steps >= steps and config.warmup_steps > 0:
        raise ValueError(
            f"warmup_steps {config.warmup_steps} leaves nothing of {steps} steps: lower it."
        )
    peak, low = config.learning_rate, config.final_fraction
    span = max(steps - 1 - config.warmup_steps, 1)

    def rate(step: Any) -> Any:
        warm = (step + 1) / max(config.warmup_steps, 1)
        done = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
        if config.schedule == "cosine":
            decay = low + (1 - low) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        else:
            decay = 1 - (1 - low) * done if config.schedule == "linear" else 1.0
        return peak * jnp.minimum(1.0, jnp.where(step < config.warmup_steps, warm, decay))

    return rate


def decayed(specs: Any) -> frozenset[str]:
    """Names of the matrices: parameters with two or more axes besides that of stacked layers."""
    return frozenset(
        path_name(path)
        for path, spec in jax.tree_util.tree_leaves_with_path(specs)
        if sum(axis != "layers" for axis in spec.axes) >= 2
    )


def make_optimizer(
    config: TrainConfig, specs: Any, group: Callable[[str], str]
) -> optax.GradientTransformation:
    """The optimiser of the trained parameters, one per group if the task names several.

    Raises:
        ValueError: unknown optimiser, or groups of config and task that do not match.
    """
    labels = jax.tree_util.tree_map_with_path(lambda path, _: group(path_name(path)), specs)
    used = sorted(set(jax.tree.leaves(labels)))
    if unknown := sorted(set(config.groups) - set(used)):
        raise ValueError(
            f"config.groups.{unknown[0]} matches no parameter: this task has {', '.join(used)}."
        )
    base = dataclasses.asdict(config.optimizer)
    rules = {
        name: _rule(
            build(
                OptimizerConfig,
                {**base, **config.groups.get(name, {})},
                f"config.groups.{name}",
            ),
            config.steps,
            decayed(specs),
            config.clip_threshold if config.clip == "group_norm" else None,
        )
        for name in used
    }
    if len(used) == 1:
        return rules[used[0]]
    return optax.multi_transform(rules, labels)


def _rule(
    config: OptimizerConfig, steps: int, matrices: frozenset[str], limit: float | None
) -> optax.GradientTransformation:
    schedule = make_schedule(config, steps)
    if config.name == "sgd":
        inner = optax.trace(config.beta1) if config.beta1 else optax.identity()
    elif config.name == "adamw":
        inner = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    else:
        raise ValueError(f"unknown optimizer {config.name!r}: choose adamw or sgd.")

    # By name, because parameters of other groups are absent from the tree that a group sees.
    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda p, _: path_name(p) in matrices, params)

    decay = optax.add_decayed_weights(config.weight_decay, mask) if config.weight_decay else None
    clip = None if limit is None else optax.clip_by_global_norm(limit)
    parts = [clip, inner, decay, optax.scale_by_learning_rate(schedule)]
    return optax.chain(*[part for part in parts if part is not None])


def clip_gradients(grads: Any, norm: Float[Array, ""], config: TrainConfig) -> Any:
    """Gradients clipped as the config says: their global norm (``norm``), or each value.

    ``group_norm``, the norm of each group by itself, is the optimiser's part.
    """
    limit = config.clip_threshold
    if config.clip == "norm":
        scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    if config.clip == "value":
        return jax.tree.map(lambda g: jnp.clip(g, -limit, limit), grads)
    return grads
