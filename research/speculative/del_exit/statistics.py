"""What DEL knows of every exit, and the exit and draft length that it chooses by it.

Source: "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
arXiv 2504.05598. Exit l runs the first l layers, l = 1 .. L-1, and stands in row l - 1. Every
function is for one row of a batch.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class ExitStatistics:
    """Decayed sums per layer over matches (column 0) and mismatches (1) with the target.

    The last row is the target's own and stays 0.
    """

    counts: Any  # (layers, 2) float32
    confidences: Any  # (layers, 2) float32, sums of the shadow tokens' probabilities


def no_statistics(num_layers: int) -> ExitStatistics:
    """Nothing seen."""
    return ExitStatistics(*(jnp.zeros((num_layers, 2), jnp.float32) for _ in range(2)))


def update_statistics(
    statistics: ExitStatistics,
    tokens: Int[Array, "layers t"],
    confidence: Float[Array, "exits t"],
    valid: Bool[Array, " t"],
    num_context: Int[Array, ""] | int,
    exit_layer: Int[Array, ""],
    cut: Bool[Array, ""] | bool,
    omega: Any,
) -> ExitStatistics:
    """The sums after one round.

    Args:
        tokens: the likeliest token after every layer at every position; the last row is the target.
        confidence: their probabilities, for all layers but the last.
        valid: positions that were processed.
        num_context: so many first positions are prompt, which is never cut.
        exit_layer: the exit that drafted.
        cut: leave out what comes after the first position where that exit was wrong: it had a
            wrong context.
        omega: what earlier sums are multiplied with.
    """
    target = tokens[-1]
    at = jnp.arange(valid.shape[0])
    wrong = (jnp.take(tokens, exit_layer - 1, axis=0) != target) & valid & (at >= num_context)
    before = jnp.cumsum(wrong.astype(jnp.int32)) - wrong
    counted = valid & ((before == 0) | ~jnp.asarray(cut))
    hits = tokens[:-1] == target[None]
    kinds = jnp.stack([hits, ~hits], axis=-1) & counted[None, :, None]
    counts = jnp.sum(kinds.astype(jnp.float32), axis=1)
    confidences = jnp.sum(jnp.where(kinds, confidence[..., None], 0.0), axis=1)
    grown = [jnp.pad(x, ((0, 1), (0, 0))) for x in (counts, confidences)]
    return ExitStatistics(
        omega * statistics.counts + grown[0], omega * statistics.confidences + grown[1]
    )


def acceptance(statistics: ExitStatistics) -> Float[Array, " exits"]:
    """How often each exit was right; 0 where nothing was seen."""
    counts = statistics.counts[:-1]
    total = jnp.sum(counts, axis=-1)
    return jnp.where(total > 0, counts[:, 0] / jnp.where(total > 0, total, 1.0), 0.0)


def average_confidence(statistics: ExitStatistics) -> Float[Array, "layers 2"]:
    """Mean confidence over matches and over mismatches; NaN where there was none."""
    return statistics.confidences / statistics.counts


def draft_thresholds(statistics: ExitStatistics, missing: str) -> Float[Array, " exits"]:
    """Half way between the mean confidence of right and of wrong tokens, per exit.

    With ``missing`` ``official`` it is NaN where one of the two was never seen, and nothing is
    below NaN; with ``half`` a mean that is missing counts as 0.
    """
    means = average_confidence(statistics)[:-1]
    return 0.5 * jnp.sum(means if missing == "official" else jnp.nan_to_num(means), axis=-1)


def tpl_table(
    alpha: Float[Array, " exits"], num_layers: int | Int[Array, ""], gamma_max: int
) -> Float[Array, "exits gammas"]:
    """Tokens per layer: ``(1 + a + ... + a^g) / (g l + L)`` for g = 0 .. gamma_max - 1.

    g = 0 is plain decoding.
    """
    g = jnp.arange(gamma_max)
    powers = jnp.cumprod(jnp.where(g[None] == 0, 1.0, alpha[:, None]), axis=1)
    exits = jnp.arange(1, alpha.shape[0] + 1)
    return jnp.cumsum(powers, axis=1) / (g[None] * exits[:, None] + num_layers)


def choose_exit(
    alpha: Float[Array, " exits"], num_layers: int | Int[Array, ""], gamma_max: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Exit and draft length of the most tokens per layer; the lowest exit, then length, on ties."""
    best = jnp.argmax(tpl_table(alpha, num_layers, gamma_max).reshape(-1)).astype(jnp.int32)
    return best // gamma_max + 1, best % gamma_max
