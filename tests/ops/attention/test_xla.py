"""The XLA path: all shared cases, and its ways to cut up the queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, attention, xla
from tests.ops.attention.cases import AttentionCases, tensors


class TestXla(AttentionCases):
    implementation = "xla"


@pytest.mark.parametrize(("chunk", "pieces"), [(10, 3), (10, 8), (25, 8), (32, 1), (32, 8)])
def test_chunks_give_the_whole(chunk, pieces, monkeypatch):
    """Pieces of one chunk and of several, with and without a remainder, equal one block."""
    q, k, v = tensors(8, 2, 64, 64, 4, 2, 16)
    mask = AttentionMask(causal=True, window=40, k_valid=jnp.arange(64)[None] != 5)
    whole = xla.xla_attention(q, k, v, mask, 0.25, chunk=64)
    monkeypatch.setattr(xla, "MAX_PIECES", pieces)
    parts = xla.xla_attention(q, k, v, mask, 0.25, chunk=chunk)
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_long_queries_keep_memory_small(monkeypatch):
    """Backward memory of 1024 x 1024: a few chunks if scanned, under half of the whole if not."""
    t, h = 1024, 4
    q, k, v = tensors(9, 1, t, t, h, h, 16)

    def memory(chunk):
        def loss(q, k, v):
            out, _ = xla.xla_attention(q, k, v, AttentionMask(causal=True), 0.25, chunk=chunk)
            return out.sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    whole, unrolled = memory(t), memory(128)
    monkeypatch.setattr(xla, "MAX_PIECES", 1)
    scanned = memory(128)
    assert unrolled < whole / 2
    assert scanned < 6 * (4 * h * 128 * t) < whole / 3


def test_unrolled_causal_chunks_skip_the_upper_triangle():
    q, k, v = tensors(10, 1, 512, 512, 2, 2, 64)

    def flops(mask):
        def call(q, k, v):
            return attention(q, k, v, mask=mask, implementation="xla")

        cost = jax.jit(call).lower(q, k, v).cost_analysis()
        assert cost is not None
        return cost["flops"]

    known = AttentionMask(causal=True)
    assert flops(known) < 0.75 * 4 * 512 * 512 * 2 * 64
