"""Reading and writing runs of cache slots, also where the slots are split over a mesh.

XLA would gather an axis that is split to update or to index it at places that are data. Here each
device of the mesh axis blends in what falls into its own slots, inside ``shard_map``; only the few
entries that :func:`take_slots` returns are exchanged. Buffers are (b, g, s, d), of any type.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from models.sharding import dividing, mesh_in_force


def write_run(
    buffer: Shaped[Array, "b g s d"], new: Shaped[Array, "b g t d"], start: Int[Array, " b"]
) -> Shaped[Array, "b g s d"]:
    """``buffer[b, :, start[b] : start[b] + t] = new[b]``."""
    new = new.astype(buffer.dtype)
    return _on_shards(_blend_run, _write_whole_run, buffer, new, start)


def write_slots(
    buffer: Shaped[Array, "b g s d"], new: Shaped[Array, "b g t d"], slots: Int[Array, "b t"]
) -> Shaped[Array, "b g s d"]:
    """``buffer[b, :, slots[b]] = new[b]``; slots of one row are distinct."""
    new = new.astype(buffer.dtype)

    def whole(buffer: Array, new: Array, slots: Array) -> Array:
        row = jnp.arange(slots.shape[0])[:, None]
        return buffer.at[row, :, slots].set(jnp.swapaxes(new, 1, 2))

    def shard(buffer: Array, new: Array, slots: Array, first: Any, axis: str) -> Array:
        size = buffer.shape[2]
        local = slots - first
        local = jnp.where((local >= 0) & (local < size), local, size)
        row = jnp.arange(slots.shape[0])[:, None]
        return buffer.at[row, :, local].set(jnp.swapaxes(new, 1, 2), mode="drop")

    return _on_shards(shard, whole, buffer, new, slots)


def take_slots(
    buffer: Shaped[Array, "b g s d"], slots: Int[Array, "b p"]
) -> Shaped[Array, "b g p d"]:
    """``buffer[b, :, slots[b]]``."""

    def whole(buffer: Array, slots: Array) -> Array:
        return jnp.take_along_axis(buffer, slots[:, None, :, None], axis=2)

    def shard(buffer: Array, slots: Array, first: Any, axis: str) -> Array:
        size = buffer.shape[2]
        local = (slots - first)[:, None, :, None]
        found = jnp.take_along_axis(buffer, jnp.clip(local, 0, size - 1), axis=2)
        # One device has each entry and the others add zero.
        mine = (local >= 0) & (local < size)
        return jax.lax.psum(jnp.where(mine, found, jnp.zeros((), buffer.dtype)), axis)

    return _on_shards(shard, whole, buffer, slots, split_result=False)


def _write_whole_run(buffer: Array, new: Array, start: Int[Array, " b"]) -> Array:
    """:func:`write_run` for a buffer whose slots every device has."""
    if buffer.shape[0] == 1:
        # One contiguous write; the batched form below becomes a scatter.
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start[0], axis=2)
    return jax.vmap(lambda row, x, at: jax.lax.dynamic_update_slice_in_dim(row, x, at, axis=1))(
        buffer, new, start
    )


def _blend_run(buffer: Array, new: Array, start: Array, first: Any, axis: str) -> Array:
    """The part of a run that falls into the slots from ``first`` on, over one window of them."""
    t, size = new.shape[2], buffer.shape[2]
    window = min(t, size)
    local = start - first
    at = jnp.clip(local, 0, size - window)
    skipped = jnp.clip(at - local, -window, t)  # entries of the run before the window's first slot
    padded = jnp.pad(new, ((0, 0), (0, 0), (window, window), (0, 0)))

    def cut(rows: Array, at: Array) -> Array:
        if rows.shape[0] == 1:
            return jax.lax.dynamic_slice_in_dim(rows, at[0], window, axis=2)
        return jax.vmap(lambda x, a: jax.lax.dynamic_slice_in_dim(x, a, window, axis=1))(rows, at)

    entry = skipped[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
    fresh = ((entry >= 0) & (entry < t))[:, None, :, None]
    blended = jnp.where(fresh, cut(padded, skipped + window), cut(buffer, at))
    return _write_whole_run(buffer, blended, at)


def _on_shards(
    shard: Callable[..., Array],
    whole: Callable[..., Array],
    buffer: Array,
    *others: Array,
    split_result: bool = True,
) -> Array:
    """``whole(buffer, *others)``, or ``shard`` on each device where a mesh splits the slots.

    ``shard`` also takes the device's first slot and the mesh axis.
    """
    mesh = mesh_in_force()
    slots = None if mesh is None else dividing(mesh, "length", buffer.shape[2])
    if mesh is None or slots is None:
        return whole(buffer, *others)
    rows = dividing(mesh, "batch", buffer.shape[0])
    heads = dividing(mesh, "kv_heads", buffer.shape[1])
    axis, size = slots[0], buffer.shape[2] // mesh.shape[slots[0]]
    # Other arguments are values per head (b, g, t, d) or slot numbers per row.
    specs = tuple(PartitionSpec(rows, *((heads,) if x.ndim == 4 else ())) for x in others)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(rows, heads, axis), *specs),
        out_specs=PartitionSpec(rows, heads, axis if split_result else None),
    )
    def on_device(buffer: Array, *others: Array) -> Array:
        return shard(buffer, *others, jax.lax.axis_index(axis) * size, axis)

    return on_device(buffer, *others)
