"""Dual chunk attention and its sparse prefill against other implementations' numbers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from models.positions import RopeScaling, apply_rope, rope_angles, rope_frequencies
from ops.dual_chunk import chunk_positions, dual_chunk_attention
from tests.goldens import golden

qwen_golden = functools.partial(golden, "qwen25_1m")


def _rotated(x: np.ndarray, positions: jnp.ndarray, base: float) -> jnp.ndarray:
    """x [heads, tokens, width] as (1, tokens, heads, width), rotated at ``positions``."""
    inv_freq, _ = rope_frequencies(RopeScaling(), x.shape[2], base)
    return apply_rope(jnp.asarray(x).swapaxes(0, 1)[None], *rope_angles(positions[None], inv_freq))


def _dca(g: dict[str, np.ndarray]) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray, int]:
    """Rotated queries (3, 1, t, h, d), keys and values, and the stride."""
    chunk, local, base = int(g["chunk_size"]), int(g["local_size"]), float(g["rope_base"])
    at = chunk_positions(jnp.arange(g["q"].shape[1]), chunk, local)
    q = jnp.stack([_rotated(g["q"], p, base) for p in (at.intra, at.successive, at.inter)])
    v = jnp.asarray(g["v"]).swapaxes(0, 1)[None]
    return q, _rotated(g["k"], at.key, base), v, chunk - local


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dense_prefill_and_decode(implementation: str) -> None:
    g = qwen_golden("dca")
    q, k, v, stride = _dca(g)
    n = g["prefill_out"].shape[1]
    attend = functools.partial(dual_chunk_attention, stride=stride, implementation=implementation)
    positions = jnp.arange(n + 1)[None]
    out, lse = attend(q[:, :, :n], k[:, :n], v[:, :n], positions[:, :n])
    np.testing.assert_allclose(out[0].swapaxes(0, 1), g["prefill_out"], atol=1e-5)
    np.testing.assert_allclose(lse[0].T, g["lse"][:, :n], atol=1e-5)
    out, lse = attend(q[:, :, n:], k, v, positions[:, n:])
    np.testing.assert_allclose(out[0].swapaxes(0, 1), g["decode_out"], atol=1e-5)
    np.testing.assert_allclose(lse[0].T, g["lse"][:, n:], atol=1e-5)


def test_relative_positions() -> None:
    g = qwen_golden("dca")
    n = g["rel_pos"].shape[0]
    at = chunk_positions(jnp.arange(n), int(g["chunk_size"]), int(g["local_size"]))
    apart = at.chunk[:, None] - at.chunk[None]
    q = jnp.where(
        apart == 0, at.intra[:, None], jnp.where(apart == 1, at.successive[:, None], at.inter[0])
    )
    ours = jnp.where(jnp.tri(n, dtype=bool), q - at.key[None], -1)
    np.testing.assert_array_equal(ours, g["rel_pos"])
