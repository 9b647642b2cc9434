"""Hooks on logits: the same in every implementation, their meaning, gradients and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import (
    AttentionMask,
    BlockSizes,
    LogitHook,
    alibi,
    attention,
    temperature,
    window_decay,
)
from ops.platform import target
from tests.ops.attention.cases import CASES, TOLERANCE, tensors

BLOCKS = BlockSizes(q=128, kv=128)


def hooks_of(h):
    """All kinds in one list: added per head, multiplied, and multiplied where positive."""
    slopes = jnp.asarray(2.0 ** -np.arange(1, h + 1), jnp.float32)
    return alibi(slopes), window_decay(0.5, 20.0), temperature(16.0)


def run(implementation, q, k, v, mask, hooks):
    def call(q, k, v, mask, hooks):
        return attention(
            q, k, v, mask=mask, hooks=hooks, return_lse=True, blocks=BLOCKS,
            implementation=implementation,
        )  # fmt: skip

    return jax.jit(call)(q, k, v, mask, hooks)


def inputs(name, dtype=jnp.float32):
    sizes, mask = CASES[name]
    q, k, v = (x.astype(dtype) for x in tensors(31, *sizes))
    if mask.q_positions is None and sizes[1] != sizes[2]:
        at = jnp.broadcast_to(jnp.arange(sizes[1], dtype=jnp.int32)[None], (sizes[0], sizes[1]))
        mask = mask.replace(q_positions=at)
    return q, k, v, mask


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, jnp.float32) for n in ("tree", "gaps_and_validity", "encoder", "long_chunk", "causal")]
    + [("long_chunk", jnp.bfloat16), ("one_token", jnp.bfloat16)],
)
def test_equals_the_reference(implementation, name, dtype):
    arguments = inputs(name, dtype)
    hooks = hooks_of(arguments[0].shape[2])
    wanted = run("reference", *arguments, hooks)
    out, lse = run(implementation, *arguments, hooks)
    tolerance = 2 * TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.float32(out), np.float32(wanted[0]), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_formula():
    q, k, v = tensors(32, 1, 40, 40, 2, 1, 8)
    slopes, factor, distance, trained = np.array([0.5, 0.1]), 0.7, 6.0, 8.0
    hooks = (
        alibi(jnp.asarray(slopes)), window_decay(factor, distance), temperature(trained),
    )  # fmt: skip
    out, _ = run("reference", q, k, v, AttentionMask(causal=True), hooks)
    i, j = np.indices((40, 40))
    k, v = np.repeat(np.float64(k), 2, axis=2), np.repeat(np.float64(v), 2, axis=2)
    scores = np.einsum("bthd,bshd->bhts", np.float64(q), k) * 8**-0.5
    scores -= slopes[:, None, None] * (i - j)
    scores *= np.where((np.abs(i - j) > distance) & (scores > 0), factor, 1.0)
    scores *= np.maximum(0.1 * np.log((i + 1) / trained) + 1, 1) ** 2
    weights = np.where(j <= i, np.exp(scores), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhts,bshd->bthd", weights, v), atol=1e-5)


@pytest.mark.parametrize("name", ["chunk_over_cache", "long_chunk"])
def test_numbers_are_data_and_have_gradients(name):
    q, k, v, mask = inputs(name)
    h = q.shape[2]

    def gradient(implementation):
        def loss(q, slopes, factor):
            hooks = alibi(slopes), window_decay(factor, 9.0)
            out, lse = attention(
                q, k, v, mask=mask, hooks=hooks, return_lse=True, blocks=BLOCKS,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

        slopes = jnp.linspace(0.01, 0.2, h)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, slopes, jnp.float32(0.6))

    for ours, wanted in zip(gradient("interpret"), gradient("reference"), strict=True):
        assert np.abs(np.asarray(wanted)).max() > 0.1
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kernel"), [("long_chunk", "attention_prefill"), ("one_token", "attention_decode")]
)
def test_exports_for_tpu(name, kernel):
    q, k, v, mask = inputs(name, jnp.bfloat16)
    hooks = hooks_of(q.shape[2])
    call = jax.jit(lambda q, k, v: attention(q, k, v, mask=mask, hooks=hooks))
    with target("tpu"):
        exported = jax.export.export(call, platforms=["tpu"])(q, k, v)
    assert kernel in exported.mlir_module()


def test_refusals():
    q, k, v = tensors(33, 1, 4, 9, 4, 2, 8)
    with pytest.raises(ValueError, match=r"must have shape \(4, n\) or \(1, n\)"):
        attention(q, k, v, hooks=(alibi(jnp.ones(3)),))
    with pytest.raises(ValueError, match="unknown kind of logit hook 'divide'"):
        attention(q, k, v, hooks=(LogitHook(jnp.ones((1, 1)), jnp.add, "divide"),))
    with pytest.raises(ValueError, match=r"4 queries and 9 slots need mask\.q_positions"):
        attention(q, k, v, hooks=(alibi(jnp.ones(4)),))
