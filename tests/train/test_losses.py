"""The chunked cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses


def plain(hidden, head, targets, mask):
    logits = hidden.astype(jnp.float32) @ head.T.astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(chosen * mask)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        (3 * jax.random.normal(keys[0], (3, 12, 8))).astype(dtype),
        jax.random.normal(keys[1], (20, 8)).astype(dtype),
        jax.random.randint(keys[2], (3, 12), 0, 20),
        (jax.random.uniform(keys[3], (3, 12)) > 0.3).astype(jnp.float32) * 0.5,
    )


@pytest.mark.parametrize("rows", [1, 9, 36])
def test_value_and_gradients_are_those_of_the_plain_loss(rows: int, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)
    hidden, head, targets, mask = inputs()
    value = losses.token_cross_entropy(hidden, head, targets, mask)
    np.testing.assert_allclose(value, plain(hidden, head, targets, mask), rtol=1e-5)

    def scaled(function):
        return jax.grad(lambda h, w: 3.0 * function(h, w, targets, mask), argnums=(0, 1))

    got = scaled(losses.token_cross_entropy)(hidden, head)
    want = scaled(plain)(hidden, head)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 9, 36])
def test_laws_of_another_model_are_targets_without_a_gradient(rows: int, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", rows)
    hidden, head, _, mask = inputs()
    teacher = jax.random.normal(jax.random.key(5), (3, 12, 6))
    rows_ = jax.random.normal(jax.random.key(6), (20, 6))

    def want(hidden, head, teacher, rows_):
        law = jax.nn.softmax(teacher @ rows_.T)
        return -jnp.sum(jnp.sum(law * jax.nn.log_softmax(hidden @ head.T), -1) * mask)

    def got(*args):
        return losses.law_cross_entropy(*args, mask)

    args = hidden, head, teacher, rows_
    np.testing.assert_allclose(got(*args), want(*args), rtol=1e-5)
    grads = jax.grad(got, argnums=(0, 1, 2, 3))(*args)
    for a, b in zip(grads[:2], jax.grad(want, argnums=(0, 1))(*args), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not np.any(grads[2]) and not np.any(grads[3])


def test_bfloat16_inputs_give_a_float32_sum():
    hidden, head, targets, mask = inputs(jnp.bfloat16)
    value, grads = jax.value_and_grad(losses.token_cross_entropy, argnums=(0, 1))(
        hidden, head, targets, mask
    )
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, plain(hidden, head, targets, mask), rtol=1e-4)
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16


def test_logits_of_the_whole_batch_never_exist():
    hidden, head, targets, mask = (
        jnp.zeros((4, 4096, 8)), jnp.zeros((512, 8)), jnp.zeros((4, 4096), jnp.int32),
        jnp.ones((4, 4096)),
    )  # fmt: skip
    step = jax.jit(jax.grad(losses.token_cross_entropy)).lower(hidden, head, targets, mask)
    assert step.compile().memory_analysis().temp_size_in_bytes < 4 * 4096 * 512 * 4
