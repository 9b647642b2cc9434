"""SWIFT's tree: a chain of first choices with leaves beside it, as many as the draft was unsure.

Source: arXiv 2410.06916. Level i hangs below the chain's node of depth i. Nodes are numbered by
level, then by rank, so that the chain's node is the first of its level.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Comb:
    """A padded tree and where its parts come from; node 0 is the root."""

    tokens: Any  # (b, n) int32, -1 at padding; the root's entry is for the caller
    parent: Any  # (b, n) int32, -1 for the root and padding
    chain: Any  # (b, s) int32, the node whose children level i are, n beyond the draft


def level_widths(
    confidence: Float[Array, "*b s"], thresholds: Any, widths: tuple[int, ...]
) -> Int[Array, "*b s"]:
    """Children of each level: ``widths[j]`` above the j-th threshold (strictly), else the last."""
    found = jnp.full(confidence.shape, widths[-1], jnp.int32)
    for threshold, width in reversed(list(zip(thresholds, widths[:-1], strict=True))):
        found = jnp.where(confidence > threshold, width, found)
    return found


def build_comb(
    candidates: Int[Array, "b s k"],
    there: Bool[Array, "b s k"],
    widths: Int[Array, "b s"],
    steps: Int[Array, " b"],
    size: int,
) -> Comb:
    """The tree of ``steps`` levels of at most ``widths`` nodes, in ``size`` nodes with the root.

    Args:
        candidates: each level's tokens by rank, the chain's first.
        there: which of them exist (a prefix of each level).
        size: static, at least the number of levels and the root. Where the tree does not fit, it
            loses leaves from the deepest level upwards, never nodes of the chain.
    """
    batch, levels, k = candidates.shape
    depth = jnp.arange(levels, dtype=jnp.int32)[None]
    inside = depth < steps[:, None]
    width = jnp.minimum(jnp.minimum(widths, k), jnp.sum(there, axis=-1, dtype=jnp.int32))
    leaves = jnp.where(inside, jnp.maximum(width - 1, 0), 0)
    room = size - 1 - steps[:, None] - (jnp.cumsum(leaves, axis=1) - leaves)
    leaves = jnp.clip(room, 0, leaves)
    total = jnp.where(inside, 1 + leaves, 0)
    first = 1 + jnp.cumsum(total, axis=1) - total  # each level's node of the chain
    above = jnp.concatenate([jnp.zeros_like(first[:, :1]), first[:, :-1]], axis=1)
    rank = jnp.arange(k, dtype=jnp.int32)[None, None]
    node = jnp.where(rank < total[..., None], first[..., None] + rank, size).reshape(batch, -1)

    def place(values: Array) -> Array:
        values = jnp.broadcast_to(values, candidates.shape).reshape(batch, -1)
        empty = jnp.full((batch, size), -1, jnp.int32)
        return jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(empty, node, values)

    return Comb(
        tokens=place(candidates.astype(jnp.int32)),
        parent=place(above[..., None]),
        chain=jnp.where(inside, above, size),
    )
