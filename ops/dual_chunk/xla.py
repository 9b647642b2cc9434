"""Dual chunk attention over slots in order, in plain XLA operations.

Slot j holds position j, so a block of slots whose size divides the stride lies in one chunk, and
all its keys want the same of a query's three rotations. Choosing it costs as much as reading the
query: the products are those of one causal attention, in one pass of online softmax. Blocks are
shared by all rows of a batch, whatever position each row's queries start at.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.attention.rotations import pick, rotation_of

DIRECT_ROWS = 128
"""Up to this many query rows per key head (h / g * t) all scores are held at once."""

SMALLEST_BLOCK = 16
"""Smaller blocks cost more than computing all three products."""


def attend_ordered(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    stride: int,
    scale: float | Float[Array, ""],
    rows: int = 512,
    block: int = 512,
    first: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Output and log-sum-exp; a query sees slots up to its position and below its row's length.

    `rows` queries and at most `block` keys at a time; a tile of queries stops at its last one.
    Slot 0 holds position `first`, a multiple of s (None: 0). Values of slots that no query sees
    must be finite.
    """
    b, t, h, d = q.shape[1:]
    s, g = k.shape[1:3]
    r = h // g
    q = q.reshape(3, b, t, g, r, d).transpose(0, 1, 3, 4, 2, 5)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    lengths = jnp.minimum(lengths, s)
    if r * t <= DIRECT_ROWS:
        out, lse = _attend_at_once(q, k, v, q_positions, lengths, stride, scale, first)
    else:
        out, lse = _attend_tiles(q, k, v, q_positions, lengths, stride, scale, rows, block, first)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)
    return out.astype(v.dtype), lse.transpose(0, 3, 1, 2).reshape(b, t, h)


def largest_block(stride: int, most: int) -> int:
    """The largest divisor of the stride that is at most `most`."""
    return next(n for n in range(min(stride, most), 0, -1) if stride % n == 0)


def all_scores(
    q: Float[Array, "3 b g r t d"],
    k: Float[Array, "b g s d"],
    q_positions: Int[Array, "b t"],
    stride: int,
    first: Int[Array, ""] | None = None,
) -> Float[Array, "b g r t s"]:
    """Products of all queries with all keys, each in the rotation that the pair wants."""
    _, b, g, r, t, d = q.shape
    s = k.shape[2]
    block = s if s <= stride and first is None else math.gcd(s, stride)
    origin = jnp.int32(0) if first is None else first
    if block < min(SMALLEST_BLOCK, stride):
        # Blocks of the stride's divisors do not tile the slots: score in all rotations.
        scores = jnp.einsum("xbgrtd,bgsd->xbgrts", q, k, preferred_element_type=jnp.float32)
        which = rotation_of(q_positions[:, :, None] // stride, (origin + _slots(s)) // stride)
        return pick(scores, which[:, None, None])
    begins = origin + jnp.arange(s // block, dtype=jnp.int32) * block
    which = rotation_of(q_positions[None] // stride, begins[:, None, None] // stride)
    rotated = pick(q[:, None], which[:, :, None, None, :, None])
    return jnp.einsum(
        "nbgrtd,bgnkd->bgrtnk",
        rotated,
        k.reshape(b, g, s // block, block, d),
        preferred_element_type=jnp.float32,
    ).reshape(b, g, r, t, s)


def _attend_at_once(q, k, v, q_positions, lengths, stride, scale, first):
    """Few queries: all scores, one product in blocks of slots."""
    s = k.shape[2]
    scores = all_scores(q, k, q_positions, stride, first)
    ends = q_positions if first is None else q_positions - first
    visible = (_slots(s) <= ends[:, :, None]) & (_slots(s) < lengths[:, None, None])
    scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    values = jnp.einsum(
        "bgrts,bgsd->bgrtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return finish(top[..., 0], weights.sum(axis=-1), values)


def _attend_tiles(q, k, v, q_positions, lengths, stride, scale, rows, block, first):
    """Tiles of queries one after the other, each over the blocks of slots before its end."""
    b, g, r, t = q.shape[1:5]
    s = k.shape[2]
    block = min(largest_block(stride, block if first is None else min(block, s)), s)
    first = jnp.int32(0) if first is None else first
    rows = min(rows, t)
    tiles = -(-t // rows)
    short = tiles * rows - t
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, 0), (0, short), (0, 0)))
    q_positions = jnp.pad(q_positions, ((0, 0), (0, short)), constant_values=-1)

    def tile(i):
        q_tile = jax.lax.dynamic_slice_in_dim(q, i * rows, rows, axis=4)
        at = jax.lax.dynamic_slice_in_dim(q_positions, i * rows, rows, axis=1)
        end = jnp.max(jnp.minimum(jnp.max(at, axis=1) + 1, first + lengths))

        def one(j, carry):
            # Blocks are those of positions. The outer ones are read from where they fit, without
            # the slots of their neighbours.
            begin = jnp.clip(j * block - first, 0, s - block)
            slots = begin + _slots(block)
            places = first + slots
            visible = (places <= at[:, :, None]) & (slots < lengths[:, None, None])
            visible &= places // block == j
            which = rotation_of(at // stride, j * block // stride)
            rotated = pick(q_tile, which[:, None, None, :, None])
            keys = jax.lax.dynamic_slice_in_dim(k, begin, block, axis=2)
            scores = jnp.einsum(
                "bgrtd,bgsd->bgrts", rotated, keys, preferred_element_type=jnp.float32
            )
            scores = jnp.where(visible[:, None, None], scores * scale, -jnp.inf)
            return accumulate(carry, scores, jax.lax.dynamic_slice_in_dim(v, begin, block, axis=2))

        # A sum of both, because inside shard_map a loop starts with the type that it ends with.
        empty = start_of(q_tile[0, ..., 0] + k[:, :, None, :1, 0], v.shape[3])
        stop = (end + block - 1) // block
        return finish(*jax.lax.fori_loop(first // block, stop, one, empty))

    out, lse = jax.lax.map(tile, jnp.arange(tiles, dtype=jnp.int32))
    out = jnp.moveaxis(out, 0, 3).reshape(b, g, r, tiles * rows, -1)
    lse = jnp.moveaxis(lse, 0, 3).reshape(b, g, r, tiles * rows)
    return out[:, :, :, :t], lse[..., :t]


def start_of(
    like: Float[Array, "*rows"], width: int
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"], Float[Array, "*rows {width}"]]:
    """Online softmax before its first block: maximum, total, weighted sum of values.

    `like` gives the shape of the queries, and its numbers do not matter.
    """
    return (
        jnp.full_like(like, -jnp.inf, jnp.float32),
        jnp.zeros_like(like, jnp.float32),
        jnp.zeros_like(like, jnp.float32, shape=(*like.shape, width)),
    )


def accumulate(carry, scores, values):
    """One block of online softmax: scores [..., m, s], values [..., s, dv] of fewer lead axes."""
    top, total, weighted = carry
    new_top = jnp.maximum(top, scores.max(axis=-1))
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - base[..., None])
    keep = jnp.exp(top - base)
    fresh = _weigh(weights.astype(values.dtype), values)
    return new_top, keep * total + weights.sum(axis=-1), keep[..., None] * weighted + fresh


def finish(top, total, weighted):
    """Output and log-sum-exp; rows that saw nothing give zeros and -inf."""
    filled = total > 0
    share = jnp.where(filled, total, 1.0)
    return weighted / share[..., None], jnp.where(filled, top + jnp.log(share), -jnp.inf)


def _weigh(weights, values):
    lead = weights.shape[: values.ndim - 2]
    flat = weights.reshape(*lead, -1, weights.shape[-1])
    out = jnp.matmul(flat, values, preferred_element_type=jnp.float32)
    return out.reshape(*weights.shape[:-1], values.shape[-1])


def _slots(s: int) -> Int[Array, "1 1 {s}"]:
    return jnp.arange(s, dtype=jnp.int32)[None, None]
