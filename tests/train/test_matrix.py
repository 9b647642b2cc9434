"""Trained matrices against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.params import init
from ops.weights import matmul
from train.matrix import TrainedMatrix, wrap_matrices


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("transpose", [False, True])
def test_product_and_gradients(shape: tuple[int, int], transpose: bool):
    w = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (2, 3, shape[1] if transpose else shape[0]))

    def loss(x, w, wrap):
        return jnp.sum(jnp.sin(matmul(x, TrainedMatrix(w) if wrap else w, transpose)))

    got = jax.value_and_grad(loss, argnums=(0, 1))(x, w, True)
    want = jax.value_and_grad(loss, argnums=(0, 1))(x, w, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_wrapping_a_model_changes_nothing_but_the_type():
    cfg = decoder.Config(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
        intermediate_size=12, max_length=16, qkv_bias=True,
    )  # fmt: skip
    params = init(decoder.specs(cfg), jax.random.key(0))
    segment = params.segments[0]
    wrapped = params.replace(segments=(segment.replace(layers=wrap_matrices(segment.layers)),))
    assert isinstance(wrapped.segments[0].layers.attn.q.w, TrainedMatrix)
    assert not isinstance(wrapped.segments[0].layers.attn.q.b, TrainedMatrix)
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    np.testing.assert_allclose(
        decoder.forward(wrapped, cfg, tokens).hidden,
        decoder.forward(params, cfg, tokens).hidden,
        atol=1e-6,
    )
