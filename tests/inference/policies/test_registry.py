import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from inference.policies.dual_chunk import DualChunkPolicy
from inference.policies.registry import POLICIES, ScaledRope, make_policy
from models.attention import DensePolicy
from models.positions import RopeScaling
from tests.inference.models import assert_greedy, config, engine, prompts

THETA = 10000.0 ** -(np.arange(4) / 4)


def test_policies_are_made_by_name():
    cfg = config()
    assert make_policy("dense", cfg) == DensePolicy()
    np.testing.assert_array_equal(make_policy("window:5", cfg).windows, [5, 5])
    narrow = make_policy("window:5", config(windows=(3, None)))
    np.testing.assert_array_equal(narrow.windows, [3, 5])
    assert make_policy("dual_chunk:24:8", cfg) == DualChunkPolicy(24, 8)
    assert make_policy("dual_chunk:24:8:20", cfg) == DualChunkPolicy(24, 8, 20)
    slowed = make_policy("power:0.5", cfg).scheme.inv_freq
    np.testing.assert_allclose(slowed[1:] / slowed[0], THETA[1:] * (1 - np.arange(1, 4) / 4) ** 0.5)
    assert make_policy("truncated:16", cfg).scheme.inv_freq[-1] == 0
    scheme = make_policy("yarn:4", cfg).scheme
    assert scheme == ScaledRope(RopeScaling("yarn", factor=4.0, original_max_position=160))


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_a_named_scheme_is_the_configs_own(kind):
    base = config(max_length=16)
    scaled = config(rope=RopeScaling(kind, factor=4.0, original_max_position=16))
    policy = make_policy(f"{kind}:4", base)
    got = engine(base, policy=policy, context_limit=64).generate(prompts(40), 8).tokens[0]
    assert_greedy(scaled, prompts(40)[0], got, length=48)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse", "unknown policy 'sparse': choose one of dense, window:SIZE"),
        ("", "unknown policy ''"),
        ("dense:3", "wrong arguments: write dense"),
        ("window", "write window:SIZE"),
        ("dual_chunk:4", "write dual_chunk:CHUNK:LOCAL or dual_chunk:CHUNK:LOCAL:TRAINED"),
        ("dual_chunk:8:", "write dual_chunk:CHUNK:LOCAL"),
        ("window:0", "whole numbers of 1 or more, got '0'"),
        ("dual_chunk:8:x", "whole numbers of 1 or more, got 'x'"),
        ("dual_chunk:8:8", "0 <= local_size < chunk_size"),
        ("dual_chunk:800:8", "exceeds the model's 160"),
        ("yarn:0.5", "factor of 1 or more, got '0.5'"),
        ("power:x", "power takes a number, got 'x'"),
        ("truncated:1.5", "truncated takes a number, got '1.5'"),
        ("ntk:many", "factor of 1 or more, got 'many'"),
    ],
)
def test_names_are_checked(name, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name, config())


def test_models_that_a_scheme_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="'learned'"):
        make_policy("linear:2", config(position="learned"))
    with pytest.raises(ValueError, match="'linear': use 'dense'"):
        make_policy("ntk:2", config(rope=RopeScaling("linear", factor=2.0)))


def test_every_entry_can_be_resolved():
    assert all(callable(pkgutil.resolve_name(entry)) for entry in POLICIES.values())
    assert jnp.ndim(make_policy("window:9", config()).windows) == 1
