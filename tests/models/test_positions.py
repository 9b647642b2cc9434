"""The registry of rotary schemes and the rotation's shapes; numbers are in the goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import positions
from models.positions import (
    RopeScaling,
    apply_rope,
    register_rope_type,
    rope_angles,
    rope_frequencies,
    within_documents,
)


def test_registering_a_scheme(monkeypatch):
    monkeypatch.setattr(positions, "_REGISTRY", dict(positions._REGISTRY))

    def halved(cfg, dim, base, length):
        return np.full(dim // 2, 0.5), 2.0

    register_rope_type("halved", halved)
    register_rope_type("halved", halved)
    inv_freq, factor = rope_frequencies(RopeScaling("halved"), 6, 10.0)
    assert inv_freq.tolist() == [0.5] * 3 and factor == 2.0 and inv_freq.dtype == jnp.float32
    with pytest.raises(ValueError, match="'linear' is already registered"):
        register_rope_type("linear", halved)


@pytest.mark.parametrize(
    ("cfg", "dim", "message"),
    [
        (RopeScaling(), 5, "must be even, got 5"),
        (RopeScaling("spiral"), 4, "unknown rope type 'spiral': known are default, dynamic"),
        (RopeScaling("yarn", 2.0), 4, "'yarn' needs original_max_position"),
        (RopeScaling("dynamic", 2.0), 4, "'dynamic' needs original_max_position"),
        (
            RopeScaling("longrope", 2.0, 8, short_factor=(1.0,), long_factor=(1.0, 1.0)),
            4,
            "short_factor has 1 entries but the rotary width 4 needs 2",
        ),
    ],
)
def test_bad_settings_are_refused(cfg, dim, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(cfg, dim, 10000.0)


def test_partial_rotation_passes_the_rest_through():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 8)), jnp.float32)
    inv_freq, _ = rope_frequencies(RopeScaling(), 4, 100.0)
    turned = apply_rope(x, *rope_angles(jnp.ones((2, 3)), inv_freq))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert not np.allclose(turned[..., :4], x[..., :4])
    zero = apply_rope(x, *rope_angles(jnp.zeros((2, 3)), inv_freq))
    np.testing.assert_array_equal(zero, x)


def test_rows_have_their_own_positions_and_frequencies():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2, 4)), jnp.float32)
    rows = jnp.asarray([[0.0, 1.5, 2.0], [7.0, 8.0, 9.25]])
    frequencies = jnp.asarray([[0.5, 0.1], [0.3, 0.2]])
    both = apply_rope(x, *rope_angles(rows, frequencies))
    for i in range(2):
        alone = apply_rope(x[i], *rope_angles(rows[i], frequencies[i]))
        np.testing.assert_allclose(both[i], alone, atol=1e-6)


def test_rotation_of_low_precision_is_computed_in_float32():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    tables = rope_angles(jnp.asarray([[300]]), jnp.ones(1))
    turned = apply_rope(x, *tables)
    assert turned.dtype == jnp.bfloat16
    exact = np.cos(300.0) - np.sin(300.0)
    assert float(turned[0, 0, 0, 0]) == pytest.approx(exact, abs=0.01)


def test_lengths_are_data():
    cfg = RopeScaling("dynamic", 2.0, 16)
    found = jax.jit(lambda n: rope_frequencies(cfg, 4, 100.0, n)[0])
    assert not np.array_equal(found(jnp.int32(20)), found(jnp.int32(40)))
    assert found._cache_size() == 1


def test_drawn_positions_count_within_documents():
    drawn = jnp.asarray([[0.5, 2.0, 3.5, 4.0, 6.0], [1.0, 1.5, 3.0, 4.5, 5.0]])
    positions = jnp.asarray([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], jnp.int32)
    want = [[0.0, 1.5, 3.0, 3.5, 5.5], [0.0, 0.5, 0.0, 1.5, 2.0]]
    np.testing.assert_allclose(within_documents(drawn, positions), want)
