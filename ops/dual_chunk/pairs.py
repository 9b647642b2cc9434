"""Dual chunk attention by its definition: every pair of tokens takes its own rotation.

Serves any positions, documents packed into one row, and training. All three products of queries
and keys are computed, so it does twice the work of the ordered path in `xla.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.attention.mask import AttentionMask


def attend_pairs(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_chunk: Int[Array, "b t"],
    k_chunk: Int[Array, "b s"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    rows: int,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Output and log-sum-exp, `rows` queries at a time, each part recomputed in the backward pass.

    Slots that no query sees may hold any key; their values must be finite.
    """
    t, s = q.shape[2], k.shape[1]
    if t <= rows:
        return _attend(q, k, v, q_chunk, k_chunk, mask, scale)
    mask = mask.with_positions(t, s)
    whole = t // rows

    @functools.partial(jax.checkpoint, static_argnums=1)
    def part(start, size):
        return _attend(
            jax.lax.dynamic_slice_in_dim(q, start, size, axis=2),
            k,
            v,
            jax.lax.dynamic_slice_in_dim(q_chunk, start, size, axis=1),
            k_chunk,
            mask.query_slice(start, size),
            scale,
        )

    parts = jax.lax.map(lambda i: part(i * rows, rows), jnp.arange(whole, dtype=jnp.int32))
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in parts)
    if whole * rows == t:
        return out, lse
    rest = part(whole * rows, t - whole * rows)
    return jnp.concatenate([out, rest[0]], axis=1), jnp.concatenate([lse, rest[1]], axis=1)


def _attend(q, k, v, q_chunk, k_chunk, mask, scale):
    """All scores of one run of queries in memory."""
    _, b, t, h, d = q.shape
    s, g = k.shape[1:3]
    q = q.reshape(3, b, t, g, h // g, d)
    scores = jnp.einsum("xbtgrd,bsgd->xbgrts", q, k, preferred_element_type=jnp.float32)
    apart = q_chunk[:, :, None] - k_chunk[:, None, :]
    apart = apart[:, None, None]
    scores = jnp.where(apart <= 0, scores[0], jnp.where(apart == 1, scores[1], scores[2])) * scale
    scores = jnp.where(mask.dense(t, s)[:, :, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1)
    filled = total > 0
    total = jnp.where(filled, total, 1.0)
    out = jnp.einsum(
        "bgrts,bsgd->bgrtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = out / total[..., None]
    lse = jnp.where(filled, top[..., 0] + jnp.log(total), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)
    return out.astype(v.dtype), lse.transpose(0, 3, 1, 2).reshape(b, t, h)
