"""The polynomial sine against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.platform import target
from ops.sine import polynomial_sine, sine


def points(limit: float) -> np.ndarray:
    turns = np.arange(-40, 41) * np.pi / 2
    spread = np.random.default_rng(0).uniform(-limit, limit, 20_000)
    return np.concatenate([turns, spread, [0.0, limit, -limit]]).astype(np.float32)


@pytest.mark.parametrize("limit", [4.0, 300.0, 20_000.0])
def test_value_and_derivative(limit: float):
    x = points(limit)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(jax.jit(polynomial_sine)(x), np.sin(exact), atol=3e-7, rtol=0)
    slope = jax.jit(jax.vmap(jax.grad(polynomial_sine)))(x)
    np.testing.assert_allclose(slope, np.cos(exact), atol=3e-7, rtol=0)


def test_infinite_and_missing_values_give_nan():
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    assert np.isnan(polynomial_sine(x)).all()


def test_other_platforms_take_their_own():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    with target("tpu"):
        assert " sin " in str(jax.make_jaxpr(sine)(x))
    with target("cpu"):
        assert " sin " not in str(jax.make_jaxpr(sine)(x))
