"""A ring of constant size holds what a full buffer shows through its window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import init_ring
from ops.attention import AttentionMask, attention
from tests.inference.models import config
from tests.ops.attention.cases import tensors

CFG = config()
WINDOW, MOST, LENGTH = 6, 3, 40


@jax.jit
def through_ring(q, k, v, counts, starts):
    """Outputs (b, rounds, MOST, h, d) of rounds that append up to MOST tokens and query them."""
    batch = q.shape[0]
    ring = init_ring(CFG, batch, WINDOW, MOST, q.dtype)

    def take(x, at):
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, MOST))(x, at)

    def round(ring, xs):
        at, count = xs
        ring = ring.append(take(k, at), take(v, at), at, count)
        positions = at[:, None] + jnp.arange(MOST, dtype=jnp.int32)[None]
        # Padding queries stand at positions that nobody wrote; they are not compared.
        return ring, attention(take(q, at), *ring.read(), mask=ring.seen_from(positions))

    return jax.lax.scan(round, ring, (starts, counts))


def test_every_new_token_sees_its_window_through_many_turns():
    q, k, v = tensors(1, 2, LENGTH + MOST, LENGTH + MOST, CFG.num_heads, CFG.num_kv_heads, 8)
    rng = np.random.default_rng(2)
    counts = rng.integers(0, MOST + 1, (14, 2)).astype(np.int32)
    starts = np.cumsum(counts, axis=0).astype(np.int32) - counts
    assert starts.max() > 2 * (WINDOW + MOST) and (counts == 0).any()
    ring, got = through_ring(q, k, v, jnp.asarray(counts), jnp.asarray(starts))
    # A window of 6 is 7 keys with the token itself.
    mask = AttentionMask(window=jnp.int32(WINDOW + 1), causal=True)
    wanted = attention(q, k, v, mask=mask, implementation="reference")
    for turn in range(len(counts)):
        for row in range(2):
            at, n = starts[turn, row], counts[turn, row]
            np.testing.assert_allclose(
                got[turn, row, :n], wanted[row, at : at + n], rtol=1e-5, atol=1e-5
            )
    assert ring.slots == WINDOW + MOST and ring.k.shape[2] == WINDOW + MOST


def test_a_prompt_begins_the_ring():
    _, k, v = tensors(3, 3, 1, WINDOW, 4, 2, 8)
    ends = jnp.asarray([20, 4, 0], jnp.int32)
    ring = jax.jit(lambda: init_ring(CFG, 3, WINDOW, MOST, jnp.float32).begin(k, v, ends))()
    held = [sorted(p for p in row if p >= 0) for row in np.asarray(ring.positions).tolist()]
    assert held == [list(range(14, 20)), list(range(4)), []]
    for row, end in enumerate((20, 4)):
        for position in held[row]:
            slot, source = position % ring.slots, position - (end - WINDOW)
            np.testing.assert_array_equal(ring.k[row, :, slot], k[row, source])
            np.testing.assert_array_equal(ring.v[row, :, slot], v[row, source])


def test_what_a_ring_cannot_hold_is_refused():
    ring = init_ring(CFG, 1, WINDOW, MOST, jnp.float32)
    _, k, v = tensors(4, 1, 1, 12, 4, 2, 8)
    zero = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="ring of 9 slots cannot take 4 new tokens that look back"):
        ring.append(k[:, :4], v[:, :4], zero, zero)
    with pytest.raises(ValueError, match="12 entries for a ring of 9 slots"):
        ring.begin(k, v, zero)
    with pytest.raises(ValueError, match="at least one to append, got 6 and 0"):
        init_ring(CFG, 1, WINDOW, 0, jnp.float32)
