"""The definition itself against float64 numpy, the choice of implementation, and errors."""

import jax
import numpy as np
import pytest

from ops.attention import AttentionMask, BlockSizes, attention
from ops.platform import target
from tests.ops.attention.cases import CASES, tensors


@pytest.mark.parametrize("name", CASES)
def test_reference_is_softmax_in_float64(name):
    (b, t, s, h, g, *rest), mask = CASES[name]
    q, k, v = tensors(30, b, t, s, h, g, *rest)
    out, lse = attention(q, k, v, mask=mask, return_lse=True, implementation="reference")
    dense = np.broadcast_to(mask.dense(t, s), (b, 1, t, s))[:, 0]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for row, i, head in [(0, 0, 0), (b - 1, t - 1, h - 1), (0, t // 2, h // 2)]:
        slots = np.flatnonzero(dense[row, i])
        if not len(slots):
            assert (np.asarray(out)[row, i, head] == 0).all()
            continue
        group = head // (h // g)
        scores = k[row, slots, group] @ q[row, i, head] / np.sqrt(q.shape[3])
        weights = np.exp(scores)
        wanted = weights @ v[row, slots, group] / weights.sum()
        np.testing.assert_allclose(out[row, i, head], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[row, i, head], np.log(weights.sum()), rtol=1e-5, atol=1e-6)


def test_auto_follows_the_target_and_not_the_device():
    q, k, v = tensors(31, *CASES["one_token"][0])
    call = jax.jit(attention)
    plain = call.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    with target("tpu"):
        kernel = call.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    again = call.trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in kernel
    assert "tpu_custom_call" not in plain and "tpu_custom_call" not in again


def test_naming_the_kernel_fails_loudly_on_cpu():
    q, k, v = tensors(32, *CASES["one_token"][0])
    with pytest.raises(ValueError, match="interpret mode"):
        jax.jit(lambda *x: attention(*x, implementation="tpu")).lower(q, k, v)


def test_errors_name_the_fix():
    q, k, v = tensors(33, 1, 2, 5, 3, 2, 8)
    with pytest.raises(ValueError, match="h % g == 0"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="name one of auto"):
        attention(q, k[:, :, :1], v[:, :, :1], implementation="fast")


def test_default_mask_and_blocks():
    q, k, v = tensors(34, 1, 2, 5, 2, 2, 8)
    wanted = attention(q, k, v, mask=AttentionMask(), blocks=BlockSizes())
    np.testing.assert_array_equal(attention(q, k, v), wanted)
    assert attention(q, k, v, return_lse=True)[1].shape == (1, 2, 2)
