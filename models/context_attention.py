"""Attention whose slots are split over a mesh axis: every device reads only its own.

Two ways, the cheaper of which is taken from the shapes alone:

- Queries travel. Each device attends all queries over its own slots and the parts are merged by
  their log-sum-exp, in float32. Decoding does this with queries that every device has; long runs of
  queries are split, gathered before and scattered after.
- Keys travel (ring attention, arXiv 2310.01889). Queries stay split; keys and values go round the
  ring of devices, one shard per step, and each device merges what they add.

A device moves ``t h (d + 2 dv)`` numbers of two bytes in the first (its sums are float32) and
``s g (d + dv)`` in the second, so a prompt in one piece moves its keys and a chunk against a long
cache moves its queries. The same choice between passing keys and passing queries is that of
"Context Parallelism for Scalable Million-Token Inference" (arXiv 2411.01783).

Slots are split in contiguous runs, so that slots keep their order in memory. The price: rows that
fill a part of the cache keep a part of the devices busy, and devices with later queries of a causal
ring do more.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ops.attention import AttentionMask, merge

SPLIT_FROM = 128
"""Fewer queries than this are kept whole on every device, as in decoding and verification."""


def context_attention(
    call: Callable[..., Any],
    q: Float[Array, "b t h *width"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    mask: AttentionMask,
    over: Callable[..., Any],
    rows: Any,
    heads: Any,
    axis: str,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Attention with slots split over ``axis``, which must divide them.

    Args:
        call: attention of one device: ``call(q, k, v, mask) -> (out, lse)``. ``q`` may have any
            width that it takes. The mask it is given is in the indices of the slots it is given,
            its positions are those of the whole.
        over: ``jax.shard_map`` with the mesh given.
        rows, heads: the mesh axes of rows and of heads, None if they are whole.
    """
    t, s = q.shape[1], k.shape[1]
    count = jax.sharding.get_abstract_mesh().shape[axis]
    split = _splits(t, count)
    ring = split and _bytes_of_keys(k, v) < _bytes_of_queries(q, v)
    queries = axis if split else None
    mask = mask.with_positions(t, s)

    def on_device(q: Array, k: Array, v: Array, mask: AttentionMask) -> tuple[Array, Array]:
        if ring:
            return _keys_travel(call, q, k, v, mask, axis, count)
        size = k.shape[1]
        own = of_shard(mask, jax.lax.axis_index(axis) * size, size)
        return _queries_travel(lambda q: call(q, k, v, own), q, axis, split)

    return over(
        on_device,
        in_specs=(
            PartitionSpec(rows, queries, heads),
            PartitionSpec(rows, axis, heads),
            PartitionSpec(rows, axis, heads),
            _mask_specs(mask, q.shape[0], rows, axis if ring else None, axis),
        ),
        out_specs=(PartitionSpec(rows, queries, heads), PartitionSpec(rows, queries, heads)),
    )(q, k, v, mask)


def _splits(t: int, count: int) -> bool:
    """Whether ``t`` queries are split over ``count`` devices outside of the attention."""
    return t >= SPLIT_FROM and t % count == 0


def _bytes_of_keys(k: Array, v: Array) -> int:
    s, g, d = k.shape[1:]
    return s * g * (d * k.dtype.itemsize + v.shape[3] * v.dtype.itemsize)


def _bytes_of_queries(q: Array, v: Array) -> int:
    t, h, *width = q.shape[1:]
    return t * h * (math.prod(width) * q.dtype.itemsize + v.shape[3] * 4)


def _mask_specs(mask: AttentionMask, batch: int, rows: Any, queries: Any, slots: Any) -> Any:
    """How each field of a mask is split; a batch axis of 1 is the same everywhere."""
    axes = {
        "q_positions": (queries,), "k_positions": (slots,), "q_segments": (queries,),
        "k_segments": (slots,), "k_valid": (slots,), "lengths": (), "tree": (queries,),
        "tree_start": (), "window": None,
    }  # fmt: skip

    def spec(name: str, value: Any) -> PartitionSpec | None:
        if value is None:
            return None
        tail = axes[name]
        if tail is None:
            return PartitionSpec()
        return PartitionSpec(rows if value.shape[0] == batch else None, *tail)

    return dataclasses.replace(mask, **{name: spec(name, getattr(mask, name)) for name in axes})


def of_shard(mask: AttentionMask, first: Any, size: int) -> AttentionMask:
    """The mask of slots ``first .. first + size - 1`` in their own indices.

    Fields per slot must already be those of the shard. A tree of which a part lies in front of the
    shard loses its columns there.
    """
    changes: dict[str, Any] = {}
    if mask.lengths is not None:
        changes["lengths"] = jnp.clip(mask.lengths - first, 0, size)
    if mask.tree is not None:
        start: Int[Array, " b"] = mask.tree_start - first
        nodes = mask.tree.shape[2]
        tree = jnp.broadcast_to(mask.tree, (start.shape[0], *mask.tree.shape[1:]))
        tree = jnp.pad(tree, ((0, 0), (0, 0), (0, nodes)))
        changes["tree"] = jax.vmap(
            lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, min(nodes, size), axis=1)
        )(tree, jnp.clip(-start, 0, nodes))
        changes["tree_start"] = jnp.clip(start, 0, size)
    return dataclasses.replace(mask, **changes)


def _queries_travel(
    attend: Callable[[Array], Any], q: Array, axis: str, split: bool
) -> tuple[Array, Array]:
    """All queries over this device's slots, merged with those of the other devices.

    Args:
        attend: attention of queries to this device's slots.
        split: each device comes with its own queries and keeps theirs.
    """
    if split:
        q = jax.lax.all_gather(q, axis, axis=1, tiled=True)
    out, lse = attend(q)
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    # A shard that shows nothing has lse -inf and weight 0, also where all are such.
    top = jnp.where(top > -jnp.inf, top, 0.0)
    weight = jnp.exp(lse - top)
    parts = (weight[..., None] * out.astype(jnp.float32), weight)
    if split:
        summed, total = (
            jax.lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in parts
        )
        count = total.shape[1]
        top = jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(axis) * count, count, axis=1)
    else:
        summed, total = jax.lax.psum(parts, axis)
    filled = total > 0
    total = jnp.where(filled, total, 1.0)
    lse = jnp.where(filled, top + jnp.log(total), -jnp.inf)
    return (summed / total[..., None]).astype(q.dtype), lse


def shares_attention(
    call: Callable[..., Any],
    q: Float[Array, "b t h *width"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    by_row: Any,
    by_head: tuple[Array, ...],
    over: Callable[..., Any],
    rows: Any,
    heads: Any,
    axis: str,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Attention with slots split over ``axis`` of which ``call`` sees to what a device attends to.

    Queries travel, see the module.

    Args:
        call: attention of one device to its own run of slots, ``call(q, k, v, by_row, *by_head) ->
            (out, lse)``; it may exchange over ``axis`` what it needs to know of the others.
        by_row: arrays with a row's first axis, or with an axis of 1 or none for all rows alike.
        by_head: arrays (h, ...).
        over, rows, heads: see :func:`context_attention`.
    """
    count = jax.sharding.get_abstract_mesh().shape[axis]
    split = _splits(q.shape[1], count)
    queries = PartitionSpec(rows, axis if split else None, heads)
    slots = PartitionSpec(rows, axis, heads)

    def on_device(q: Array, k: Array, v: Array, by_row: Any, *by_head: Array) -> Any:
        return _queries_travel(lambda q: call(q, k, v, by_row, *by_head), q, axis, split)

    return over(
        on_device,
        in_specs=(
            queries, slots, slots, row_specs(by_row, q.shape[0], rows),
            *[PartitionSpec(heads)] * len(by_head),
        ),
        out_specs=(queries, queries),
    )(q, k, v, by_row, *by_head)  # fmt: skip


def row_specs(tree: Any, batch: int, rows: Any) -> Any:
    """How arrays by row are split: what has no rows of its own is the same everywhere."""
    return jax.tree.map(
        lambda x: PartitionSpec(rows) if x.ndim and x.shape[0] == batch else PartitionSpec(), tree
    )


def _keys_travel(
    call: Callable[..., Any],
    q: Array,
    k: Array,
    v: Array,
    mask: AttentionMask,
    axis: str,
    count: int,
) -> tuple[Array, Array]:
    """This device's queries over all slots, one shard after the other."""
    size, here = k.shape[1], jax.lax.axis_index(axis)
    sides = {
        name: getattr(mask, name)
        for name in ("k_positions", "k_segments", "k_valid")
        if getattr(mask, name) is not None
    }
    ring = [(i, (i + 1) % count) for i in range(count)]

    def attend(held: Any, step: Any) -> tuple[Array, Array]:
        k, v, sides = held
        first = (here - step) % count * size
        part = of_shard(dataclasses.replace(mask, **sides), first, size)
        out, lse = call(q, k, v, part)
        return out.astype(jnp.float32), lse

    def body(carry: Any, step: Any) -> tuple[Any, None]:
        held, out, lse = carry
        # Sent on while it is being read, so that the transfer can hide behind the products.
        following = jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), held)
        return (following, *merge(out, lse, *attend(held, step))), None

    shape = (*q.shape[:3], v.shape[3])
    empty = _varying((jnp.zeros(shape), jnp.full(shape[:3], -jnp.inf)), (q, k, v))
    steps = jnp.arange(count - 1, dtype=jnp.int32)
    (held, out, lse), _ = jax.lax.scan(body, ((k, v, _varying(sides, (q, k, v))), *empty), steps)
    out, lse = merge(out, lse, *attend(held, count - 1))
    return out.astype(q.dtype), lse


def _varying(tree: Any, like: tuple[Array, ...]) -> Any:
    """The same values, typed to vary over every mesh axis that one of ``like`` varies over."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))

    def widen(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, tree)
