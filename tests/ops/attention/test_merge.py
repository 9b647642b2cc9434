"""Joining attentions over parts equals attention over the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, attention, merge
from tests.ops.attention.cases import tensors

Q, K, V = tensors(20, 2, 6, 90, 4, 2, 16)


def part(start, stop, valid=None):
    mask = AttentionMask(k_valid=valid)
    return attention(Q, K[:, start:stop], V[:, start:stop], mask=mask, return_lse=True)


@pytest.mark.parametrize("cut", [1, 30, 89])
def test_two_parts_are_the_whole(cut):
    out, lse = merge(*part(0, cut), *part(cut, 90))
    whole, whole_lse = part(0, 90)
    np.testing.assert_allclose(out, whole, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-6)


def test_order_and_grouping_do_not_matter():
    a, b, c = part(0, 20), part(20, 50), part(50, 90)
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*c, *b))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def test_an_empty_half_changes_no_bit():
    full, empty = part(0, 50), part(50, 90, jnp.zeros((2, 40), bool))
    assert np.isneginf(empty[1]).all()
    for both in (merge(*full, *empty), merge(*empty, *full)):
        for x, y in zip(both, full, strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    out, lse = merge(*empty, *empty)
    assert (np.asarray(out) == 0).all() and np.isneginf(lse).all()


def test_extreme_weights_do_not_overflow():
    out = jnp.ones((1, 1, 1, 4))
    high, low = jnp.full((1, 1, 1), 3e4), jnp.full((1, 1, 1), -3e4)
    merged, lse = merge(out, high, 2 * out, low)
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(lse, high)


def test_gradient_is_that_of_the_whole():
    def split(k):
        a = attention(Q, k[:, :30], V[:, :30], return_lse=True)
        b = attention(Q, k[:, 30:], V[:, 30:], return_lse=True)
        return merge(*a, *b)[0].sum()

    def empty_half(k):
        a = attention(Q, k, V, return_lse=True)
        none = AttentionMask(lengths=jnp.zeros(2, jnp.int32))
        return merge(*a, *attention(Q, k, V, mask=none, return_lse=True))[0].sum()

    wanted = jax.jit(jax.grad(lambda k: attention(Q, k, V).sum()))(K)
    for function in (split, empty_half):
        gradient = jax.jit(jax.grad(function))(K)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_output_keeps_its_type():
    out, lse = part(0, 90)
    merged, merged_lse = merge(out.astype(jnp.bfloat16), lse, out.astype(jnp.bfloat16), lse)
    assert merged.dtype == jnp.bfloat16 and merged_lse.dtype == jnp.float32


def test_gradient_of_two_empty_halves_is_finite():
    out, empty = jnp.ones((1, 1, 1, 4)), jnp.full((1, 1, 1), -jnp.inf)
    gradient = jax.grad(lambda *x: merge(*x)[0].sum(), argnums=(0, 1, 2, 3))(out, empty, out, empty)
    assert all(np.isfinite(x).all() for x in gradient)
