"""ALiBi: attention that falls off linearly with distance, as two more channels of queries and keys.

Source: Press et al., "Train Short, Test Long", arXiv 2108.12409. Logits get ``-m_h (i - j)``. What
is the same for all keys of a query does not change a softmax, so ``m_h j`` is enough, and that is a
product of a channel of the query and one of the key: every kernel and every cache serves it. Keys
hold their position as ``256 a + b``, both of which bfloat16 has exactly up to 65,535.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

CHANNELS = 2
"""How much wider queries and keys become."""

_STEP = 256


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The m of each head: powers of ``2**(-8/n)`` for n heads, n a power of two.

    Other numbers take those of the power of two below, and every other one of twice as many.
    """
    lower = 1 << (num_heads.bit_length() - 1)

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    return np.asarray(powers(lower) + powers(2 * lower)[::2][: num_heads - lower], np.float32)


@struct.dataclass
class Alibi:
    """The channels of one forward pass; stands where :class:`models.attention.Rope` does."""

    positions: Any  # (b, t)
    rotate_cached_keys: bool = struct.field(pytree_node=False, default=False)

    def rotate_q(self, q: Float[Array, "b t h d"]) -> Float[Array, "b t h wide"]:
        """Queries with their head's slope, which the scale of attention is taken out of."""
        b, t, h, d = q.shape
        slopes = jnp.asarray(alibi_slopes(h) * math.sqrt(d), q.dtype)
        pair = jnp.stack([_STEP * slopes, slopes], -1)
        return jnp.concatenate([q, jnp.broadcast_to(pair[None, None], (b, t, h, CHANNELS))], -1)

    def rotate_k(self, k: Float[Array, "b t g d"]) -> Float[Array, "b t g wide"]:
        """Keys with their position."""
        pair = jnp.stack([self.positions // _STEP, self.positions % _STEP], -1).astype(k.dtype)
        wide = jnp.broadcast_to(pair[:, :, None], (*k.shape[:3], CHANNELS))
        return jnp.concatenate([k, wide], -1)
