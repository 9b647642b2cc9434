"""The form in which the TPU kernels read a mask: intervals of positions, and block ranges.

Every rule of `AttentionMask` except the tree becomes: query i sees slot j when
lo[i] <= position[j] <= hi[i] (and their segments agree). Slots that hold nothing get the position
`UNSEEN`, which no interval reaches. Two compares then decide a score, and the range of key blocks
that a block of queries can see follows from minima and maxima.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ops.attention.mask import AttentionMask

UNSEEN = np.int32(2**31 - 1)
LOWEST = np.int32(-(2**31))


@flax.struct.dataclass
class Intervals:
    """lo, hi: int32 [b, t]; position: int32 [b, s]; segments int32 or None, same shapes.

    q_place and k_place: where queries and slots stand, also those that see or show nothing; None
    unless asked for.
    """

    lo: Any
    hi: Any
    position: Any
    q_segment: Any
    k_segment: Any
    q_place: Any = None
    k_place: Any = None

    def pad(self, t: int, s: int) -> "Intervals":
        """The same with t queries and s slots; the added ones see and show nothing."""

        def grow(x, size, fill):
            if x is None or x.shape[1] == size:
                return x
            return jnp.pad(x, ((0, 0), (0, size - x.shape[1])), constant_values=fill)

        return Intervals(
            lo=grow(self.lo, t, UNSEEN),
            hi=grow(self.hi, t, LOWEST),
            position=grow(self.position, s, UNSEEN),
            q_segment=grow(self.q_segment, t, 0),
            k_segment=grow(self.k_segment, s, 0),
            q_place=grow(self.q_place, t, 0),
            k_place=grow(self.k_place, s, 0),
        )


def intervals(mask: AttentionMask, b: int, t: int, s: int, places: bool = False) -> Intervals:
    """Encodes all rules of `mask` but the tree, for b rows, t queries and s slots.

    `places` asks for the positions themselves too, whether or not a rule uses them.
    """

    def rows(x, n):
        return None if x is None else jnp.broadcast_to(jnp.asarray(x, jnp.int32), (b, n))

    if mask.ordered:
        q_positions, position = mask.positions(t, s)
        hi = jnp.minimum(q_positions, UNSEEN - 1)
        lo = jnp.full_like(hi, LOWEST) if mask.window is None else hi - mask.window + 1
    else:
        lo = hi = jnp.zeros((1, t), jnp.int32)
        position = jnp.zeros((1, s), jnp.int32)
    position = jnp.where(mask.slots_visible(s), position, UNSEEN)
    q_place, k_place = mask.positions(t, s) if places else (None, None)
    return Intervals(
        lo=rows(lo, t),
        hi=rows(hi, t),
        position=rows(position, s),
        q_segment=rows(mask.q_segments, t),
        k_segment=rows(mask.k_segments, s),
        q_place=rows(q_place, t),
        k_place=rows(k_place, s),
    )


def block_ranges(
    x: Intervals, block_q: int, block_kv: int
) -> tuple[Int[Array, "b nq"], Int[Array, "b nq"]]:
    """First and last key block that each block of queries may see; (0, -1) where there is none.

    `x` must be padded to whole blocks. The range is an upper bound: blocks in between may turn out
    to show nothing, which costs time and not correctness.
    """

    def fold(a, size, reduce):
        return reduce(a.reshape(a.shape[0], -1, size), axis=2)

    held = x.position != UNSEEN
    lowest, highest = fold(x.lo, block_q, jnp.min), fold(x.hi, block_q, jnp.max)
    nearest = fold(x.position, block_kv, jnp.min)
    farthest = fold(jnp.where(held, x.position, LOWEST), block_kv, jnp.max)
    need = lowest[:, :, None] <= farthest[:, None, :]
    need &= highest[:, :, None] >= nearest[:, None, :]
    if x.q_segment is not None and x.k_segment is not None:
        first, last = (fold(x.q_segment, block_q, f)[:, :, None] for f in (jnp.min, jnp.max))
        need &= first <= fold(x.k_segment, block_kv, jnp.max)[:, None, :]
        need &= last >= fold(x.k_segment, block_kv, jnp.min)[:, None, :]
    blocks = need.shape[2]
    first = jnp.argmax(need, axis=2).astype(jnp.int32)
    last = blocks - 1 - jnp.argmax(need[:, :, ::-1], axis=2).astype(jnp.int32)
    return first, jnp.where(need.any(axis=2), last, -1)
