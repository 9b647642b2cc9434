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
    axis: str | None = None,
) -> tuple[Float[Array, "b h S"], Float[Array, "b h S"]]:
    """Attention mass of n consecutive queries, summed down columns and along diagonals.

    Args:
      q: the queries in their critical rotations, which keep true distances across the border of
        their chunk; the last one is the run's last.
      k: keys as they are cached.
      positions: of the queries; a query sees the slots up to its own.
      valid: which of the queries count, for runs of fewer than n.
      scale: the factor on the scores that the attention itself uses.
      axis: a mesh axis that splits a row's slots; `k` is then this device's run of them.

    Returns:
      Sums over queries of their float32 softmax, per slot of the whole row: of the slot's column,
      and of the diagonal on which the last query meets the slot. Slots after the last query get 0.
    """
    b, n, h, d = q.shape[1:]
    s, g = k.shape[1:3]
    grouped = q.reshape(3, b, n, g, h // g, d).transpose(3, 4, 0, 1, 2, 5)  # (g, r, 3, b, n, d)
    origin = jnp.int32(0) if axis is None else jax.lax.axis_index(axis) * s
    first = None if axis is None else origin  # without one, blocks need not divide the slots
    seen = (origin + jnp.arange(s, dtype=jnp.int32))[None, None] <= positions[:, :, None]

    def scores_of(queries, keys):
        scores = all_scores(queries[:, :, None, None], keys[:, None], positions, stride, first)
        return jnp.where(seen, scores[:, 0, 0] * scale, -jnp.inf)

    def softmax_sums(queries, keys):
        scores = scores_of(queries, keys)
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        return top, jnp.exp(scores - top).sum(axis=-1, keepdims=True)

    def masses(queries, keys, top, total):
        weights = jnp.exp(scores_of(queries, keys) - top) / jnp.maximum(total, 1e-30)
        weights = jnp.where(valid[:, :, None], weights, 0.0)
        return weights.sum(axis=1), _diagonal_sums(weights)

    def by_head(function, *given):
        """One head after the other: the weights of 64 queries at a million keys are 256 MiB."""

        def of_group(group):
            index, *rest = group
            keys = jax.lax.dynamic_index_in_dim(k, index, axis=2, keepdims=False)
            return jax.lax.map(lambda one: function(one[0], keys, *one[1:]), tuple(rest))

        return jax.lax.map(of_group, (jnp.arange(g, dtype=jnp.int32), *given))

    def in_rows(x):
        return jnp.moveaxis(x.reshape(h, b, -1), 0, 1)

    if axis is None:
        alone = by_head(lambda q, k: masses(q, k, *softmax_sums(q, k)), grouped)
        columns, diagonals = map(in_rows, alone)
        return columns, diagonals[..., :s]
    # Scores are computed twice, so that the devices agree once and not once per head.
    own, total = by_head(softmax_sums, grouped)
    top = jax.lax.pmax(own, axis)
    total = jax.lax.psum(total * jnp.exp(own - top), axis)
    columns, diagonals = map(in_rows, by_head(masses, grouped, top, total))
    whole = s * jax.lax.axis_size(axis)
    placed = jnp.zeros((b, h, whole + n - 1), diagonals.dtype)
    placed = jax.lax.dynamic_update_slice_in_dim(placed, diagonals, origin, axis=2)
    return (
        jax.lax.all_gather(columns, axis, axis=2, tiled=True),
        jax.lax.psum(placed, axis)[..., :whole],
    )


def _diagonal_sums(weights: Float[Array, "b n s"]) -> Float[Array, "b S"]:
    """Entry x of s + n - 1 is the sum over i of weights[i, x - (n - 1 - i)]."""
    b, n, s = weights.shape

    def add(shift, total):
        row = jax.lax.dynamic_index_in_dim(weights, n - 1 - shift, axis=1, keepdims=False)
        moved = jax.lax.dynamic_slice_in_dim(total, shift, s, axis=1) + row
        return jax.lax.dynamic_update_slice_in_dim(total, moved, shift, axis=1)

    empty = jnp.zeros((b, s + n - 1), weights.dtype)
    return jax.lax.fori_loop(0, n, add, empty)
