"""The EAGLE-like drafter's layer as a function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import init_cache
from models import eagle, params
from models.attention import Step
from ops.tree import EAGLE_25
from tests.inference.models import config

TARGET = config()
CFG = eagle.EagleConfig()


def test_cached_steps_equal_one_pass() -> None:
    p = params.init(eagle.specs(CFG, TARGET), jax.random.key(0))
    features, embeds = (
        jax.random.normal(jax.random.key(i), (2, 9, TARGET.hidden_size)) for i in range(2)
    )
    whole, _ = jax.jit(lambda f, e: eagle.forward(p, TARGET, f, e))(features, embeds)
    cache = init_cache(eagle.layer_config(TARGET), 2, 16)
    parts = []
    for start, stop in ((0, 6), (6, 9)):
        row = jnp.arange(start, stop, dtype=jnp.int32)[None]
        cache, first = cache.append_scratch(jnp.broadcast_to(row, (2, stop - start)))
        step = Step(
            positions=jnp.broadcast_to(row, (2, stop - start)),
            start=first,
            slot_positions=cache.positions,
        )
        out, layers = eagle.forward(
            p, TARGET, features[:, start:stop], embeds[:, start:stop], step, cache.layers
        )
        cache = cache.replace(layers=layers).commit(None, jnp.full((2,), stop - start))
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_input_norm_is_a_choice() -> None:
    assert eagle.specs(CFG, TARGET).input_norm is None
    with_norm = eagle.specs(eagle.EagleConfig(input_norm=True), TARGET)
    assert params.count(with_norm) == params.count(eagle.specs(CFG, TARGET)) + TARGET.hidden_size


@pytest.mark.parametrize("reads", ["both", "features", "tokens"])
def test_an_ablation_sees_one_input_alone(reads: str) -> None:
    p = params.init(eagle.specs(eagle.EagleConfig(reads=reads), TARGET), jax.random.key(0))
    given = jax.random.normal(jax.random.key(1), (2, 1, 5, TARGET.hidden_size))
    other = jax.random.normal(jax.random.key(2), (2, 1, 5, TARGET.hidden_size))

    def differs(features: jax.Array, embeds: jax.Array) -> bool:
        out = eagle.forward(p, TARGET, features, embeds)[0]
        return bool(jnp.any(out != eagle.forward(p, TARGET, given[0], given[1])[0]))

    assert differs(other[0], given[1]) == (reads != "tokens")
    assert differs(given[0], other[1]) == (reads != "features")


def test_an_unknown_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown input 'nothing': choose one of both, features"):
        eagle.EagleConfig(reads="nothing")


def test_flops_by_hand() -> None:
    d, v, fed, context = TARGET.hidden_size, 10, 2.0, 7
    kv, q, inner = 2 * 8, 4 * 8, TARGET.intermediate_size
    layer = 2 * d * (q + kv + kv + q) + 4 * (context + 1) * q + 2 * 3 * d * inner
    once = 2 * (2 * d) * d + layer
    expanded = 11  # nodes of the tree that have children, the root among them
    expected = (fed + expanded - 1) * once + expanded * 2 * d * v
    assert eagle.draft_flops(CFG, TARGET, EAGLE_25, v, context, fed) == expected
