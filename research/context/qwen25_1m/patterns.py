"""Patterns of sparse attention, each as what a run of queries attends to.

A pattern is a pytree with a method ``plan``; its numbers are data. All of them go through the same
ranges and columns, so that they are compared by what they keep and not by how they are run.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ops.block_sparse import BLOCK, SparsePlan
from ops.dual_chunk.xla import rotation_of
from ops.vertical_slash import by_segment, geometry, select, to_plan
from ops.vertical_slash.select import LOCAL, SINK, keep_columns, keep_diagonals


@struct.dataclass
class Run:
    """A run of queries within one chunk, and the keys before its end."""

    queries: Any  # (3, b, t, h, d), rotated as they will attend
    critical: Any  # (3, b, t, h, d), rotated to true distances
    k: Any  # (b, s, g, d)
    first: Any  # (b,)
    counts: Any  # (b,)
    stride: int = struct.field(pytree_node=False)

    @property
    def positions(self) -> Int[Array, "b t"]:
        """Of the queries."""
        return self.first[:, None] + jnp.arange(self.queries.shape[2], dtype=jnp.int32)[None]


@runtime_checkable
class Pattern(Protocol):
    """Which keys the blocks of a run attend to."""

    def plan(self, run: Run) -> SparsePlan:
        """The plan of a run."""
        ...


@struct.dataclass
class VerticalSlash:
    """The best columns and diagonals; with ``naive``, found by the rotations that attend."""

    vertical: Any  # (h,) int32
    slash: Any
    most: tuple[int, int] = struct.field(pytree_node=False)
    naive: bool = struct.field(pytree_node=False, default=False)

    def plan(self, run: Run) -> SparsePlan:
        """See :class:`Pattern`."""
        where = geometry(run.first, run.counts, run.stride)
        selection = select(
            run.queries if self.naive else run.critical, run.k, where, self.vertical[None],
            self.slash[None], stride=run.stride, most=self.most,
        )  # fmt: skip
        return to_plan(selection, where, run.queries.shape[2])


@struct.dataclass
class AShape:
    """The first ``sink`` columns and the nearest ``local`` diagonals, whatever the text."""

    sink: Any
    local: Any
    most: tuple[int, int] = struct.field(pytree_node=False)

    def plan(self, run: Run) -> SparsePlan:
        """See :class:`Pattern`."""
        where = geometry(run.first, run.counts, run.stride)
        b, s, h = run.k.shape[0], run.k.shape[1], run.queries.shape[3]
        slots = jnp.arange(s, dtype=jnp.int32)[None, None]
        heads = jnp.zeros((b, h, 1), jnp.float32)
        selection = by_segment(
            keep_columns(heads + s - slots, _all(self.sink, b, h), where.end, self.most[0]),
            keep_diagonals(heads + slots, _all(self.local, b, h), where.end, self.most[1]),
            where,
        )
        return to_plan(selection, where, run.queries.shape[2])


@struct.dataclass
class RandomColumns:
    """Columns at random, beside the sink and the nearest 100 diagonals."""

    columns: Any
    seed: Any
    most: int = struct.field(pytree_node=False)

    def plan(self, run: Run) -> SparsePlan:
        """See :class:`Pattern`."""
        where = geometry(run.first, run.counts, run.stride)
        b, s, h = run.k.shape[0], run.k.shape[1], run.queries.shape[3]
        key = jax.random.fold_in(jax.random.key(self.seed), run.first[0])
        mass = jax.random.uniform(key, (b, h, s))
        selection = by_segment(
            keep_columns(mass, _all(self.columns, b, h) + SINK, where.end, self.most + SINK),
            keep_diagonals(mass, _all(LOCAL, b, h), where.end, LOCAL),
            where,
        )
        return to_plan(selection, where, run.queries.shape[2])


@struct.dataclass
class BlockSparse:
    """For every block of 64 queries the best blocks of 64 keys, by the products of their means.

    The block of the queries themselves and the first one are always kept. Blocks of keys must not
    lie across the border of a chunk.
    """

    blocks: Any
    most: int = struct.field(pytree_node=False)

    def plan(self, run: Run) -> SparsePlan:
        """See :class:`Pattern`.

        Raises:
            ValueError: a stride that 64 does not divide.
        """
        if run.stride % BLOCK and run.stride < run.k.shape[1]:
            raise ValueError(
                f"block-sparse attention needs chunks of whole blocks, and the stride is "
                f"{run.stride}: take a multiple of {BLOCK}."
            )
        scores, last = _block_scores(run)
        number = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None, None]
        own = (last // BLOCK)[:, None, :, None]
        scores = jnp.where((number == own) | (number == 0), jnp.inf, scores)
        scores = jnp.where(number <= own, scores, -jnp.inf)
        best, chosen = jax.lax.top_k(scores, min(self.most, scores.shape[-1]))
        rank = jnp.arange(chosen.shape[-1], dtype=jnp.int32)[None, None, None]
        real = jnp.arange(last.shape[1])[None] * BLOCK < run.counts[:, None]
        kept = (best > -jnp.inf) & (rank < self.blocks) & real[:, None, :, None]
        none = jnp.iinfo(jnp.int32).max
        starts = jnp.sort(jnp.where(kept, chosen * BLOCK, none), axis=-1)
        end = (run.first + run.counts)[:, None, None, None]
        stops = jnp.where(starts < none, jnp.minimum(starts + BLOCK, end), 0)
        nothing = jnp.zeros((*kept.shape[:3], 1), jnp.int32)
        return SparsePlan(
            starts=jnp.where(starts < none, starts, 0),
            stops=stops,
            range_counts=kept.sum(axis=-1, dtype=jnp.int32),
            columns=nothing,
            column_counts=nothing[..., 0],
        )


def _block_scores(run: Run) -> tuple[Float[Array, "b h n m"], Int[Array, "b n"]]:
    """Products of mean queries and mean keys of blocks, and each query block's last position."""
    _, b, t, h, d = run.critical.shape
    s, g = run.k.shape[1:3]
    n, m = -(-t // BLOCK), -(-s // BLOCK)
    rows = jnp.arange(n * BLOCK, dtype=jnp.int32)[None]
    live = rows < run.counts[:, None]
    q = jnp.pad(run.critical, ((0, 0), (0, 0), (0, n * BLOCK - t), (0, 0), (0, 0)))
    q = jnp.where(live[None, :, :, None, None], q, 0).reshape(3, b, n, BLOCK, h, d).sum(axis=3)
    size = live.reshape(b, n, BLOCK).sum(axis=2)
    q = (q / jnp.maximum(size, 1)[None, :, :, None, None]).reshape(3, b, n, g, h // g, d)
    slots = jnp.arange(m * BLOCK, dtype=jnp.int32)[None]
    held = slots < (run.first + run.counts)[:, None]
    k = jnp.pad(run.k, ((0, 0), (0, m * BLOCK - s), (0, 0), (0, 0)))
    k = jnp.where(held[..., None, None], k, 0).reshape(b, m, BLOCK, g, d).mean(axis=2)
    scores = jnp.einsum("xbngrd,bmgd->xbgrnm", q, k).reshape(3, b, h, n, m)
    chunk = (run.first // run.stride)[:, None]
    which = rotation_of(chunk, slots[:, ::BLOCK] // run.stride)
    scores = jnp.take_along_axis(scores, which[None, :, None, None], axis=0)[0]
    last = (
        run.first[:, None] + jnp.minimum(rows[:, BLOCK - 1 :: BLOCK] + 1, run.counts[:, None]) - 1
    )
    return scores, last


def _all(budget: Any, b: int, h: int) -> Int[Array, "b h"]:
    return jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (b, h))
