"""The strict settings that `tests/conftest.py` promises are really in force."""

import pathlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ops.attention import merge
from tests import conftest


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


def test_programs_are_dropped_once_there_are_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    mappings = tmp_path / "maps"
    monkeypatch.setattr(conftest, "MAPPINGS", mappings)
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    for lines, left in ((conftest.MANY, 1), (conftest.MANY + 1, 0)):
        mappings.write_text("one mapping\n" * lines)
        conftest.drop_programs()
        assert double._cache_size() == left
