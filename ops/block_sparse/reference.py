"""What a plan means: a dense mask, and attention under it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.block_sparse.plan import BLOCK, SparsePlan
from ops.dual_chunk.xla import finish, rotation_of


def attended(
    plan: SparsePlan, q_positions: Int[Array, "b t"], s: int, first: Int[Array, ""] | None = None
) -> Bool[Array, "b h t s"]:
    """Which of s slots each query attends to; `first` is the position of slot 0, default 0."""
    b, h, n, most = plan.starts.shape
    origin = jnp.int32(0) if first is None else first
    t = q_positions.shape[1]
    lane = jnp.arange(b * h * n, dtype=jnp.int32)[:, None]
    meant = plan.meant_ranges
    edges = jnp.zeros((b * h * n, s + 1), jnp.int32)
    for slots, change in ((plan.starts, 1), (plan.stops, -1)):
        edges = edges.at[lane, (slots - origin).reshape(b * h * n, most)].add(
            change * meant.reshape(b * h * n, most), mode="drop"
        )
    listed = jnp.cumsum(edges, axis=1)[:, :s] > 0
    columns = jnp.where(plan.meant_columns, plan.columns - origin, s).reshape(b * h * n, -1)
    listed = listed.at[lane, columns].set(True, mode="drop").reshape(b, h, n, s)
    listed = jnp.repeat(listed, BLOCK, axis=2)[:, :, :t]
    return listed & (origin + jnp.arange(s)[None, None] <= q_positions[:, :, None])[:, None]


def reference_attention(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    plan: SparsePlan,
    stride: int,
    scale: float | Float[Array, ""],
    first: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Output and log-sum-exp with all scores in memory; slots nobody sees may hold anything."""
    _, b, t, h, d = q.shape
    s, g = k.shape[1:3]
    q = q.reshape(3, b, t, g, h // g, d)
    scores = jnp.einsum("xbtgrd,bsgd->xbgrts", q, k, preferred_element_type=jnp.float32)
    slots = jnp.arange(s, dtype=jnp.int32)[None, None] + (0 if first is None else first)
    which = rotation_of(q_positions[:, :, None] // stride, slots // stride)[None, :, None, None]
    scores = jnp.take_along_axis(scores, which, axis=0)[0].reshape(b, h, t, s) * scale
    mask = attended(plan, q_positions, s, first)
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top[..., None]).reshape(b, g, h // g, t, s)
    seen = mask.any(axis=(1, 2))[..., None, None]
    values = jnp.where(seen, v, 0.0).astype(jnp.float32)
    total = jnp.einsum("bgrts,bsgd->bgrtd", weights, values).reshape(b, h, t, -1)
    out, lse = finish(top, weights.reshape(b, h, t, s).sum(axis=-1), total)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype), jnp.swapaxes(lse, 1, 2)
