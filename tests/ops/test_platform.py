"""The target platform: default, override, nesting, and its part in jit's cache."""

import threading

import jax
import jax.numpy as jnp
import pytest

from ops.platform import target, target_platform


def test_default_is_the_backend():
    assert target_platform() == {"cuda": "gpu", "rocm": "gpu"}.get(
        jax.default_backend(), jax.default_backend()
    )


def test_override_nests_and_ends():
    before = target_platform()
    with target("tpu"):
        with target("gpu"):
            assert target_platform() == "gpu"
        assert target_platform() == "tpu"
        with pytest.raises(KeyError), target("gpu"):
            raise KeyError
        assert target_platform() == "tpu"
    assert target_platform() == before


def test_a_traced_function_is_traced_again_for_another_target():
    seen = []

    @jax.jit
    def function(x):
        seen.append(target_platform())
        return x

    function(jnp.zeros(2))
    with target("tpu"):
        function.trace(jnp.zeros(2))
        function.trace(jnp.zeros(2))
    function(jnp.zeros(2))
    assert seen == [target_platform(), "tpu"]


def test_other_threads_keep_theirs():
    seen = []
    with target("tpu"):
        thread = threading.Thread(target=lambda: seen.append(target_platform()))
        thread.start()
        thread.join()
    assert seen == [target_platform()]


def test_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="name one of cpu, gpu, tpu"), target("h100"):
        target_platform()
