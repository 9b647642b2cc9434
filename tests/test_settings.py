"""The strict settings that `tests/conftest.py` promises are really in force."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ops.attention import merge


def test_eight_cpu_devices():
    if jax.default_backend() != "cpu":
        pytest.skip("JAX_PLATFORMS names another backend")
    assert len(jax.devices()) == 8


def test_rank_promotion_is_an_error():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_matrix_products_are_full_float32():
    assert jax.config.jax_default_matmul_precision == "highest"


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn("planted", UserWarning, stacklevel=1)


def test_shapes_of_our_functions_are_checked():
    out, lse = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3))
    with pytest.raises(TypeCheckError):
        merge(out, lse, out[..., :2], lse)
