"""How much the last queries of a run look at each column and along each diagonal."""

import jax
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
    grouped = q.reshape(3, b, n, g, h // g, d).transpose(3, 4, 0, 1, 2, 5)  # (g, r, 3, b, n, d)
    seen = jnp.arange(s, dtype=jnp.int32)[None, None] <= positions[:, :, None]

    def of_head(queries, keys):
        scores = all_scores(queries[:, :, None, None], keys[:, None], positions, stride)
        scores = jnp.where(seen, scores[:, 0, 0] * scale, -jnp.inf)
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - top)
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
        weights = jnp.where(valid[:, :, None], weights, 0.0)
        return weights.sum(axis=1), _diagonal_sums(weights)

    def of_group(given):
        index, queries = given
        keys = jax.lax.dynamic_index_in_dim(k, index, axis=2, keepdims=False)
        return jax.lax.map(lambda one: of_head(one, keys), queries)

    # One head after the other: the weights of 64 queries at a million keys are 256 MiB a head.
    both = jax.lax.map(of_group, (jnp.arange(g, dtype=jnp.int32), grouped))
    columns, diagonals = (jnp.moveaxis(x.reshape(h, b, s), 0, 1) for x in both)
    return columns, diagonals


def _diagonal_sums(weights: Float[Array, "b n s"]) -> Float[Array, "b s"]:
    """Entry x is the sum over i of weights[i, x - (n - 1 - i)]."""
    b, n, s = weights.shape

    def add(shift, total):
        row = jax.lax.dynamic_index_in_dim(weights, n - 1 - shift, axis=1, keepdims=False)
        moved = jax.lax.dynamic_slice_in_dim(total, shift, s, axis=1) + row
        return jax.lax.dynamic_update_slice_in_dim(total, moved, shift, axis=1)

    empty = jnp.zeros((b, s + n - 1), weights.dtype)
    return jax.lax.fori_loop(0, n, add, empty)[:, :s]
