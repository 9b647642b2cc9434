"""The key-value cache: ragged, left-aligned rows with scratch slots behind the committed ones.

Slots of a row, from the left: ``length`` committed ones, then ``scratch`` appended but not yet
kept, then stale ones, which may hold anything and are never seen. A decoding round appends its
draft as scratch and then commits the accepted path; what was rejected becomes stale.

A drafter that looks back only so far keeps a :class:`Ring` of constant size instead.

Under a mesh with an axis ``context`` everything per slot is split over it (:mod:`inference.slots`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.slots import take_slots, write_run, write_slots
from models.decoder import Config, default_policy
from models.params import nbytes
from ops.attention import AttentionMask


@struct.dataclass
class DenseLayer:
    """Keys and values of one layer, head-major so that a head's keys are contiguous."""

    k: Any  # (b, g, s, d)
    v: Any  # (b, g, s, dv)

    def append(
        self, k: Float[Array, "b t g d"], v: Float[Array, "b t g dv"], start: Int[Array, " b"]
    ) -> "DenseLayer":
        """Write ``t`` new entries from each row's slot ``start`` on."""
        return DenseLayer(
            write_run(self.k, jnp.swapaxes(k, 1, 2), start),
            write_run(self.v, jnp.swapaxes(v, 1, 2), start),
        )

    def read(self, extent: int | None) -> tuple[Float[Array, "b s g d"], Float[Array, "b s g dv"]]:
        """The first ``extent`` slots (None: all)."""
        k, v = self.k[:, :, :extent], self.v[:, :, :extent]
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def entries(
        self, start: Int[Array, " b"], t: int
    ) -> tuple[Float[Array, "b t g d"], Float[Array, "b t g dv"]]:
        """The ``t`` entries from each row's slot ``start`` on, which an append would replace."""
        slots = start[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        k, v = take_slots(self.k, slots), take_slots(self.v, slots)
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def write(
        self,
        slots: Int[Array, "b t"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
    ) -> "DenseLayer":
        """Overwrite chosen slots in place, as block caches of diffusion models do."""
        return DenseLayer(
            write_slots(self.k, jnp.swapaxes(k, 1, 2), slots),
            write_slots(self.v, jnp.swapaxes(v, 1, 2), slots),
        )

    def gather(self, source: Int[Array, "b p"], start: Int[Array, " b"]) -> "DenseLayer":
        """Copy the entries of slots ``source`` to the run of slots from ``start`` on."""
        return DenseLayer(
            write_run(self.k, take_slots(self.k, source), start),
            write_run(self.v, take_slots(self.v, source), start),
        )


@struct.dataclass
class Cache:
    """All layers' caches and the bookkeeping they share.

    The rows of every leaf are on axis 0. Positions may have gaps (compressed tokens), so
    ``next_position`` is kept apart from ``length``.
    """

    layers: tuple[Any, ...]
    positions: Any  # (b, s) int32
    length: Any  # (b,) int32, committed slots
    scratch: Any  # (b,) int32, appended slots behind them
    next_position: Any  # (b,) int32

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.positions.shape[1]

    def append_scratch(self, positions: Int[Array, "b t"]) -> tuple["Cache", Int[Array, " b"]]:
        """Reserve scratch slots for ``t`` new tokens; returns also each row's first new slot.

        Keys and values are then written by the attention policy through ``layer.append``. The
        caller keeps ``length + scratch + t`` within the capacity (:func:`check_capacity`).
        """
        start = self.length + self.scratch
        marked = _write_positions(self.positions, positions, start)
        return dataclasses.replace(
            self, positions=marked, scratch=self.scratch + positions.shape[1]
        ), start

    def commit(self, path: Int[Array, "b p"] | None, n: Int[Array, " b"]) -> "Cache":
        """Keep ``n`` scratch entries per row and drop the rest.

        Args:
            path: scratch numbers (0 is the first scratch slot) of the kept entries in order,
                anything beyond ``n``; None keeps the first ``n`` as they lie, without copying.
            n: how many are kept, at most the number appended.
        """
        cache = self
        if path is not None:
            source = self.length[:, None] + jnp.maximum(path, 0)
            moved = jnp.take_along_axis(self.positions, source, axis=1)
            cache = dataclasses.replace(
                self,
                layers=tuple(layer.gather(source, self.length) for layer in self.layers),
                positions=_write_positions(self.positions, moved, self.length),
            )
        length = self.length + n
        last = jnp.take_along_axis(cache.positions, jnp.maximum(length - 1, 0)[:, None], axis=1)
        return dataclasses.replace(
            cache,
            length=length,
            scratch=jnp.zeros_like(self.scratch),
            next_position=jnp.where(n > 0, last[:, 0] + 1, self.next_position),
        )

    def rollback(self, scratch: Int[Array, " b"]) -> "Cache":
        """Forget scratch entries beyond the first ``scratch`` of each row."""
        return dataclasses.replace(self, scratch=jnp.minimum(self.scratch, scratch))

    def up_to(self, length: Int[Array, " b"]) -> "Cache":
        """The cache as it was when each row held ``length`` entries, at least one.

        Later entries count as stale. For passes that look back: what is written into this cache
        takes the place of entries that the original still has.
        """
        last = jnp.take_along_axis(self.positions, length[:, None] - 1, axis=1)[:, 0]
        none = jnp.zeros_like(self.scratch)
        return dataclasses.replace(self, length=length, scratch=none, next_position=last + 1)

    def end_prefill(self) -> "Cache":
        """Called once when the prompt is in: codecs compress here, a dense cache does nothing."""
        return self

    def take_rows(self, rows: Int[Array, " r"]) -> "Cache":
        """The cache of some rows, in the order given."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), self)

    def put_rows(self, rows: Int[Array, " r"], other: "Cache") -> "Cache":
        """This cache with some rows replaced by those of ``other``."""
        return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), self, other)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, bookkeeping included."""
        return nbytes(self)

    @property
    def slot_bytes(self) -> int:
        """Bytes of keys and values in one slot of a row, all layers together."""
        rows, slots = self.positions.shape
        return nbytes(self.layers) // (rows * slots)

    def used_bytes(self) -> Int[Array, ""]:
        """Bytes of keys and values in committed slots."""
        return self.slot_bytes * jnp.sum(self.length)


def init_cache(
    cfg: Config,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    key_width: int | None = None,
) -> Cache:
    """An empty dense cache for ``batch`` rows of ``capacity`` slots.

    Keys are ``key_width`` wide, as the attention policy says; default: as the model's own does.
    """
    values = (batch, cfg.num_kv_heads, capacity, cfg.head_dim)
    keys = (*values[:3], default_policy(cfg).key_width(cfg) if key_width is None else key_width)
    # Every leaf is a buffer of its own, so that all of them can be donated.
    return Cache(
        layers=tuple(
            DenseLayer(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))
            for _ in range(cfg.num_layers)
        ),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        scratch=jnp.zeros((batch,), jnp.int32),
        next_position=jnp.zeros((batch,), jnp.int32),
    )


def slot_bytes(cfg: Config, dtype: Any = jnp.float32, key_width: int | None = None) -> int:
    """Bytes of one token's keys and values in a cache that :func:`init_cache` makes of these."""
    make = functools.partial(init_cache, cfg, 1, 1, dtype, key_width)
    return jax.eval_shape(make).slot_bytes


@struct.dataclass
class Ring:
    """Keys and values of the newest tokens of one layer, at ``position % slots`` of each row.

    Keys lie there rotated. ``window`` is how far back queries look: a ring of ``window`` plus n
    slots holds all that n new tokens see, the oldest of them included.
    """

    k: Any  # (b, g, r, d)
    v: Any  # (b, g, r, dv)
    positions: Any  # (b, r) int32, -1 where nothing was written yet
    window: int = struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        """Entries that a row holds."""
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever the length of the text."""
        return nbytes(self)

    def append(
        self,
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        start: Int[Array, " b"],
        count: Int[Array, " b"],
    ) -> "Ring":
        """Write the first ``count`` of ``t`` entries, at positions from ``start`` on.

        Raises:
            ValueError: more entries than would leave the oldest one its window.
        """
        t = k.shape[1]
        if self.window + t > self.slots:
            raise ValueError(
                f"a ring of {self.slots} slots cannot take {t} new tokens that look back "
                f"{self.window}: give it at least {self.window + t} slots."
            )
        index = jnp.arange(t, dtype=jnp.int32)[None]
        return self._write(k, v, start[:, None] + index, index < count[:, None])

    def begin(
        self, k: Float[Array, "b t g d"], v: Float[Array, "b t g dv"], end: Int[Array, " b"]
    ) -> "Ring":
        """Write ``t`` entries up to position ``end - 1``: what the next tokens look back at.

        Those before position 0 are not there.

        Raises:
            ValueError: more entries than slots.
        """
        t = k.shape[1]
        if t > self.slots:
            raise ValueError(f"{t} entries for a ring of {self.slots} slots: give the last ones.")
        positions = (end - t)[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        return self._write(k, v, positions, positions >= 0)

    def read(self) -> tuple[Float[Array, "b r g d"], Float[Array, "b r g dv"]]:
        """All slots, in the order that they have by chance."""
        return jnp.swapaxes(self.k, 1, 2), jnp.swapaxes(self.v, 1, 2)

    def seen_from(self, positions: Int[Array, "b t"]) -> AttentionMask:
        """What queries at these positions see: themselves and ``window`` tokens before them."""
        return AttentionMask(
            q_positions=positions,
            k_positions=self.positions,
            window=jnp.asarray(self.window + 1, jnp.int32),
            k_valid=self.positions >= 0,
            causal=True,
        )

    def _write(self, k: Array, v: Array, positions: Array, valid: Array) -> "Ring":
        slots = jnp.where(valid, positions % self.slots, self.slots)  # beyond the end: dropped

        def put(buffer: Array, slots: Array, new: Array) -> Array:
            return buffer.at[:, slots].set(new.astype(buffer.dtype), mode="drop")

        return dataclasses.replace(
            self,
            k=jax.vmap(put)(self.k, slots, jnp.swapaxes(k, 1, 2)),
            v=jax.vmap(put)(self.v, slots, jnp.swapaxes(v, 1, 2)),
            positions=jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(
                self.positions, slots, positions
            ),
        )


def init_ring(cfg: Config, batch: int, window: int, appended: int, dtype: Any) -> Ring:
    """An empty ring for one layer like the config's, to which ``appended`` tokens come at once.

    Raises:
        ValueError: a negative window, or nothing to append.
    """
    if window < 0 or appended < 1:
        raise ValueError(
            f"a ring needs a window of 0 or more tokens and at least one to append, got {window} "
            f"and {appended}."
        )
    shape = (batch, cfg.num_kv_heads, window + appended, cfg.head_dim)
    return Ring(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, window + appended), -1, jnp.int32),
        window,
    )


def check_capacity(needed: int, capacity: int, what: str) -> None:
    """Raise ValueError if ``needed`` slots do not fit: writing past the end would corrupt rows."""
    if needed > capacity:
        raise ValueError(
            f"{what} needs {needed} cache slots but there are {capacity}: ask for fewer tokens, "
            f"shorten the prompt, or make the cache larger."
        )


def _write_positions(
    positions: Int[Array, "b s"], new: Int[Array, "b t"], start: Int[Array, " b"]
) -> Int[Array, "b s"]:
    """``positions[b, start[b] : start[b] + t] = new[b]``."""
    return write_run(positions[:, None, :, None], new[:, None, :, None], start)[:, 0, :, 0]
