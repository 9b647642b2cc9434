"""Attention to what a plan lists and nothing else, in plain XLA operations.

A list is cut into pieces of at most 64 slots, a range or a run of columns, all of one segment. A
tile is a few pieces of each of a few blocks; their keys and values are gathered and enter one
batched product and one step of online softmax. Blocks are taken in the order of how much they
have to do, so that those of a tile have about the same. Scores stand slots before queries, because
then the pieces of a tile are one contraction with the values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.block_sparse.plan import BLOCK, SparsePlan
from ops.dual_chunk.xla import finish, rotation_of

LANES = 16
"""Blocks of queries in a tile."""

PIECES = 4
"""Pieces of each of them."""


def sparse_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    plan: SparsePlan,
    stride: int,
    scale: float | Float[Array, ""],
    first: Int[Array, ""] | None = None,
    lanes: int = LANES,
    pieces: int = PIECES,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Output and log-sum-exp; values of listed slots must be finite."""
    _, b, t, h, d = q.shape
    s, g = k.shape[1:3]
    n = plan.range_counts.shape[2]
    short = n * BLOCK - t
    q = jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0), (0, 0)))
    q = q.reshape(3, b, n, BLOCK, h, d).transpose(1, 4, 2, 0, 3, 5).reshape(-1, 3, BLOCK, d)
    at = jnp.pad(q_positions, ((0, 0), (0, short)), constant_values=-1).reshape(b, n, BLOCK)
    k, v = (jnp.swapaxes(x, 1, 2).reshape(b * g * s, -1) for x in (k, v))
    lists = _Lists(plan, at[:, None, :, 0] // stride, stride)
    order = jnp.argsort(-lists.total)
    groups = -(-b * h * n // lanes)
    origin = jnp.int32(0) if first is None else first
    order = jnp.pad(order, (0, groups * lanes - b * h * n), constant_values=b * h * n)

    def group(members):
        lane = jnp.minimum(members, b * h * n - 1)
        row, head = lane // (h * n), lane // n % h
        begin = ((row * g + head // (h // g)) * s)[:, None, None]
        rotations, here = q[lane], at[row, lane % n]

        def tile(i, carry):
            slots, meant = lists.pieces(lane, i * pieces, pieces)
            source = begin + jnp.clip(slots - origin, 0, s - 1)
            which = rotation_of(here[:, :1] // stride, slots[:, :, 0] // stride)
            rotated = jnp.take_along_axis(rotations, which[:, :, None, None], axis=1)
            scores = jnp.einsum(
                "lpsd,lpmd->lpsm", k[source], rotated, preferred_element_type=jnp.float32
            )
            seen = meant[..., None] & (slots[..., None] <= here[:, None, None])
            scores = jnp.where(seen, scores * scale, -jnp.inf).reshape(lanes, -1, BLOCK)
            return _accumulate(carry, scores, v[source].reshape(lanes, -1, v.shape[1]))

        empty = (
            jnp.full((lanes, BLOCK), -jnp.inf, jnp.float32),
            jnp.zeros((lanes, BLOCK), jnp.float32),
            jnp.zeros((lanes, BLOCK, v.shape[1]), jnp.float32),
        )
        tiles = (jnp.max(lists.total[lane]) + pieces - 1) // pieces
        return finish(*jax.lax.fori_loop(0, tiles, tile, empty))

    out, lse = jax.lax.map(group, order.reshape(groups, lanes))
    place = jnp.argsort(order)[: b * h * n]
    out = out.reshape(groups * lanes, BLOCK, -1)[place].reshape(b, h, n * BLOCK, -1)
    lse = lse.reshape(groups * lanes, BLOCK)[place].reshape(b, h, n * BLOCK)
    out, lse = jnp.moveaxis(out, 1, 2)[:, :t], jnp.swapaxes(lse, 1, 2)[:, :t]
    return out.astype(v.dtype), lse


class _Lists:
    """The lists of a plan's blocks, cut into pieces."""

    def __init__(self, plan: SparsePlan, chunk: Int[Array, "b 1 n"], stride: int):
        self.starts, self.stops, self.columns = (
            x.reshape(-1, x.shape[-1]) for x in (plan.starts, plan.stops, plan.columns)
        )
        self.ranges = plan.range_counts.reshape(-1)
        which = rotation_of(chunk[..., None], plan.columns // stride)
        # Columns ascend, so those of a segment follow each other: inter, successive, intra.
        sizes = jnp.stack(
            [jnp.sum(plan.meant_columns & (which == x), axis=-1) for x in (2, 1, 0)], axis=-1
        )
        sizes = sizes.reshape(-1, 3)
        self.column_ends = jnp.cumsum(sizes, axis=1)
        self.column_pieces = jnp.cumsum((sizes + BLOCK - 1) // BLOCK, axis=1)
        self.total = self.ranges + self.column_pieces[:, -1]

    def pieces(self, lane: Int[Array, " l"], start: Int[Array, ""], number: int):
        """Slots (l, number, 64) of the pieces from `start` on, and which are meant."""
        index = start + jnp.arange(number, dtype=jnp.int32)[None]
        within = jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
        a_range = index < self.ranges[lane][:, None]
        at = jnp.minimum(index, self.starts.shape[1] - 1)
        begin, stop = self.starts[lane[:, None], at], self.stops[lane[:, None], at]
        ranges = begin[..., None] + within
        # Columns: piece number, its segment, and where it begins in the list.
        piece = jnp.maximum(index - self.ranges[lane][:, None], 0)
        segment = jnp.sum(piece[..., None] >= self.column_pieces[lane][:, None], axis=-1)
        safe = jnp.minimum(segment, 2)
        ends, pieces = self.column_ends[lane], self.column_pieces[lane]
        before = jnp.maximum(safe - 1, 0)
        end = jnp.take_along_axis(ends, safe, axis=1)
        offset = jnp.where(safe > 0, jnp.take_along_axis(ends, before, axis=1), 0)
        skipped = jnp.where(safe > 0, jnp.take_along_axis(pieces, before, axis=1), 0)
        place = (offset + (piece - skipped) * BLOCK)[..., None] + within
        listed = self.columns[lane[:, None, None], jnp.minimum(place, self.columns.shape[1] - 1)]
        column_meant = (segment < 3)[..., None] & (place < end[..., None])
        slots = jnp.where(a_range[..., None], ranges, listed)
        meant = jnp.where(a_range[..., None], ranges < stop[..., None], column_meant)
        return slots, meant


def _accumulate(carry, scores: Float[Array, "l s m"], values: Float[Array, "l s dv"]):
    """One tile of online softmax."""
    top, total, weighted = carry
    new_top = jnp.maximum(top, scores.max(axis=1))
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - base[:, None])
    keep = jnp.exp(top - base)
    fresh = jnp.einsum(
        "lsm,lsd->lmd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return new_top, keep * total + weights.sum(axis=1), keep[..., None] * weighted + fresh
