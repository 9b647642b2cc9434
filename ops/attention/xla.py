"""Attention in plain XLA operations: the fast path on CPU and GPU, and the one that trains.

Heads of one group are folded into the rows of one matrix product, so keys and values are never
repeated. Long query runs are cut into chunks whose scores fit in cache; each chunk is
rematerialised in the backward pass, so memory is O(chunk * s) in both directions. Where the
causal structure is known without data (t == s, no positions), queries are cut into at most
`MAX_PIECES` pieces, unrolled, and piece i reads only the keys up to its own end: little more than
half of the work. Within a piece, chunks follow one another in a scan.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.attention.hooks import LogitHook, apply_rules, pack_numbers
from ops.attention.mask import AttentionMask
from ops.platform import target_platform

MAX_PIECES = 8
"""Most causal pieces: programs grow with them, and XLA may hold the scores of pieces of a single
chunk all at once."""


def xla_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    scale: float | Float[Array, ""],
    hooks: tuple[LogitHook, ...] = (),
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """softmax(scale * q k^T) v and its log-sum-exp, `chunk` queries at a time.

    Scores and sums are float32; softmax weights enter the second product in v's dtype. Keys of
    slots that no query sees may hold anything; their values must be finite.
    """
    t, s = q.shape[1], k.shape[1]
    chunk = chunk or (128 if target_platform() == "cpu" else 512)
    if t <= chunk:
        return _attend(q, k, v, mask, scale, hooks)
    if mask.prefix_causal(t, s):
        return _attend_prefixes(q, k, v, mask, scale, hooks, chunk)
    mask = mask.with_positions(t, s, always=bool(hooks))
    return _attend_scanned(q, k, v, mask, scale, hooks, chunk)


def _attend(q, k, v, mask, scale, hooks):
    """One chunk of queries with all scores in memory."""
    b, t, h, d = q.shape
    s, g, dv = k.shape[1], k.shape[2], v.shape[3]
    r = h // g
    rows = q.reshape(b, t, g, r, d).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, d)
    scores = jnp.einsum("bgmd,bsgd->bgms", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, g, r, t, s) * scale
    if hooks:
        numbers = pack_numbers(hooks, h).reshape(1, g, r, 1, 1, -1)
        i, j = mask.positions(t, s)
        places = i[:, None, None, :, None], j[:, None, None, None, :]
        rules = tuple(hook.rule for hook in hooks)
        scores = apply_rules(rules, scores, *places, lambda n: numbers[..., n])
    visible = mask.dense(t, s)[:, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1)
    filled = total > 0
    total = jnp.where(filled, total, 1.0)
    weights = weights.reshape(b, g, r * t, s).astype(v.dtype)
    out = jnp.einsum("bgms,bsgd->bgmd", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(b, g, r, t, dv) / total[..., None]
    lse = jnp.where(filled, top[..., 0] + jnp.log(total), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, dv)
    return out.astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(b, t, h)


def _attend_prefixes(q, k, v, mask, scale, hooks, chunk):
    """Causal pieces of whole chunks, unrolled: piece i reads keys 0 .. its own end."""
    t = q.shape[1]
    piece = chunk * -(-t // (chunk * MAX_PIECES))
    parts = []
    for start in range(0, t, piece):
        end = min(start + piece, t)
        part = mask.with_positions(t, t).query_slice(start, end - start)
        part = dataclasses.replace(
            part,
            **{
                name: x[:, :end]
                for name in ("k_positions", "k_segments", "k_valid")
                if (x := getattr(part, name)) is not None
            },
        )
        rows = q[:, start:end], k[:, :end], v[:, :end]
        parts.append(_attend_scanned(*rows, part, scale, hooks, chunk))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)


def _attend_scanned(q, k, v, mask, scale, hooks, chunk):
    """Chunks of queries one after the other in a scan, the remainder after it.

    Each is rematerialised in the backward pass.
    """
    b, t, h, _ = q.shape
    if t <= chunk:  # no loop around a single chunk
        return jax.checkpoint(_attend)(q, k, v, mask, scale, hooks)
    whole = t // chunk

    @functools.partial(jax.checkpoint, static_argnums=1)
    def attend(start, size):
        rows = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
        return _attend(rows, k, v, mask.query_slice(start, size), scale, hooks)

    starts = jnp.arange(whole, dtype=jnp.int32) * chunk
    out, lse = jax.lax.map(lambda start: attend(start, chunk), starts)
    out = jnp.moveaxis(out, 0, 1).reshape(b, whole * chunk, h, v.shape[3])
    lse = jnp.moveaxis(lse, 0, 1).reshape(b, whole * chunk, h)
    if whole * chunk == t:
        return out, lse
    rest = attend(whole * chunk, t - whole * chunk)
    return jnp.concatenate([out, rest[0]], axis=1), jnp.concatenate([lse, rest[1]], axis=1)
