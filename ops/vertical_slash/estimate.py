"""How much the last queries of a run look at each column and along each diagonal."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.dual_chunk.xla import all_scores


def column_and_diagonal_mass(
    q: Float[Array, "3 b n h d"],
    k: Float[Array, "b s g d"],
    positions: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    *,
    stride: int,
    scale: float | Float[Array, ""],
) -> tuple[Float[Array, "b h s"], Float[Array, "b h s"]]:
    """Attention mass of n consecutive queries, summed down columns and along diagonals.

    Args:
      q: the queries in their critical rotations, which keep true distances across the border of
        their chunk; the last one is the run's last.
      k: keys as they are cached.
      positions: of the queries; a query sees the slots up to its own.
      valid: which of the queries count, for runs of fewer than n.
      scale: the factor on the scores that the attention itself uses.

    Returns:
      Sums over queries of their float32 softmax, per slot: of the slot's column, and of the
      diagonal on which the last query meets the slot. Slots after the last query get 0.
    """
    b, n, h, d = q.shape[1:]
    s, g = k.shape[1:3]
    q = q.reshape(3, b, n, g, h // g, d).transpose(0, 1, 3, 4, 2, 5)
    scores = all_scores(q, jnp.swapaxes(k, 1, 2), positions, stride).reshape(b, h, n, s) * scale
    seen = jnp.arange(s, dtype=jnp.int32)[None, None] <= positions[:, :, None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    weights = jnp.where(valid[:, None, :, None], weights, 0.0)
    return weights.sum(axis=2), _diagonal_sums(weights)


def _diagonal_sums(weights: Float[Array, "b h n s"]) -> Float[Array, "b h s"]:
    """Entry x is the sum over i of weights[i, x - (n - 1 - i)].

    Rows are turned over and laid out with a stride of one more than the width, which moves row i
    by i places.
    """
    b, h, n, s = weights.shape
    padded = jnp.pad(weights[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, n)))
    skewed = padded.reshape(b, h, -1)[..., : n * (s + n - 1)].reshape(b, h, n, s + n - 1)
    return skewed.sum(axis=2)[..., :s]
