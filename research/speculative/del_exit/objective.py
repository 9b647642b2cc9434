"""LayerSkip's recipe: layer dropout that grows with depth, and a loss at every exit.

Source: Elhoushi et al., "LayerSkip", arXiv 2404.16710, recalled. Layers count from 0 here; the exit
after layer l has run l + 1 layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def dropout_rates(num_layers: int, rate: float) -> np.ndarray:
    """How likely each layer is skipped: 0 at the first, ``rate`` at the last, exponential between.

    ``rate * (exp(l ln 2 / (L - 1)) - 1)``.
    """
    depth = np.arange(num_layers) / max(num_layers - 1, 1)
    return rate * np.expm1(depth * math.log(2))


def growth(step: Array, steps: int) -> Float[Array, ""]:
    """What dropout rates are multiplied with at a step of pre-training: 0 at first, 1 at last."""
    done = jnp.clip(step / max(steps - 1, 1), 0.0, 1.0)
    return jnp.expm1(done * math.log(2))


def draw_layers(
    key: Array, rates: Float[Array, " layers"], rows: int
) -> Bool[Array, "layers rows"]:
    """Which layers count for which rows of a batch: each is skipped by its own draw."""
    return jax.random.uniform(key, (rates.shape[0], rows)) >= rates[:, None]


def exit_weights(num_layers: int, scale: float) -> np.ndarray:
    """How much the loss at each exit counts before the active ones are normalised.

    ``scale * sum_{i <= l} i``, and for the last layer ``L - 1 + scale * sum_{i <= L - 2} i``. The
    first exit's weight is 0.
    """
    depth = np.arange(num_layers, dtype=np.float64)
    weights = scale * np.cumsum(depth)
    weights[-1] = num_layers - 1 + scale * np.sum(depth[:-1])
    return weights


def active_exits(
    num_layers: int, every: int, scale: float, step: Array
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """The exits whose losses count at a step, and their weights, which sum to 1.

    Rotational curriculum: every ``every``-th layer from an offset that moves on with each step, and
    always the last. Where an offset gives fewer layers than another, the rest has weight 0.
    """
    weights = jnp.asarray(exit_weights(num_layers, scale), jnp.float32)
    count = -(-(num_layers - 1) // every)
    early = step % every + every * jnp.arange(count)
    exits = jnp.append(jnp.minimum(early, num_layers - 1), num_layers - 1)
    there = jnp.append(early < num_layers - 1, True)
    chosen = jnp.where(there, weights[exits], 0.0)
    # A model of one layer has one exit, whose weight by the formula is 0.
    total = jnp.sum(chosen)
    return exits, jnp.where(
        total > 0, chosen / jnp.where(total > 0, total, 1.0), there / there.sum()
    )
