"""Attention by its definition, in float32, with the whole score matrix in memory."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.attention.hooks import LogitHook, apply_rules, pack_numbers
from ops.attention.mask import AttentionMask


def reference_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    hooks: tuple[LogitHook, ...] = (),
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """softmax(scale * q k^T) v over the visible slots, and its log-sum-exp (float32).

    Every other implementation is tested against this one. Keys and values of slots that a query
    does not see are replaced by zeros before they are used, so they may hold anything.
    """
    repeats = q.shape[2] // k.shape[2]
    visible = mask.dense(q.shape[1], k.shape[1])
    used = visible.any(axis=(1, 2))[:, :, None, None]
    k = jnp.repeat(jnp.where(used, k.astype(jnp.float32), 0.0), repeats, axis=2)
    v = jnp.repeat(jnp.where(used, v.astype(jnp.float32), 0.0), repeats, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k) * scale
    if hooks:
        numbers = pack_numbers(hooks, q.shape[2])[None, :, None, None]
        i, j = mask.positions(q.shape[1], k.shape[1])
        places = i[:, None, :, None], j[:, None, None, :]
        rules = tuple(hook.rule for hook in hooks)
        scores = apply_rules(rules, scores, *places, lambda n: numbers[..., n])
    scores = jnp.where(visible, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1)
    filled = total > 0
    share = jnp.where(filled, total, 1.0)
    out = jnp.einsum("bhts,bshd->bthd", weights / share[..., None], v)
    lse = jnp.where(filled, top[..., 0] + jnp.log(share), -jnp.inf)
    return out.astype(q.dtype), lse.transpose(0, 2, 1)
