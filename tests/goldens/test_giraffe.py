"""Giraffe's bases against the official code's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import Rope, Step
from models.positions import apply_rope, rope_angles
from research.context.giraffe.bases import XPos, giraffe_inv_freq, positions_of_steps
from tests.goldens import golden
from tests.models import tiny

BASE = 10000.0  # of all arrays, by their README


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return golden("giraffe", "bases")


def assert_frequencies(found: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(found == 0, want == 0)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_frequencies_of_every_basis(data) -> None:
    make = functools.partial(giraffe_inv_freq, int(data["head_dim"]), BASE)
    scale, cut = float(data["scale"]), int(data["truncate"])
    assert_frequencies(make(), data["base_freq"])
    assert_frequencies(make(scale=scale), data["linear_freq"])
    assert_frequencies(make(truncate=cut), data["trunc_freq"])
    assert_frequencies(make(scale=scale, truncate=cut), data["linear_trunc_freq"])
    for i, power in enumerate(data["powers"].tolist()):
        assert_frequencies(make(power=power), data["power_freq"][i])
        assert_frequencies(make(power=power, truncate=cut), data["power_trunc_freq"][i])


def test_randomised_positions_and_their_tables(data) -> None:
    positions = positions_of_steps(jnp.asarray(2 * data["rand_u"]))
    np.testing.assert_allclose(positions, data["rand_positions"], rtol=1e-6)
    cos, sin = rope_angles(positions, jnp.asarray(data["base_freq"]))
    np.testing.assert_allclose(cos, data["rand_cos"], atol=1e-5)
    np.testing.assert_allclose(sin, data["rand_sin"], atol=1e-5)


def xpos(data, scale_base: float, table: int) -> Rope:
    rows, length, dim = data["q"].shape
    cfg = tiny.config(head_dim=dim)
    row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    scheme = XPos(jnp.asarray(giraffe_inv_freq(dim, BASE), jnp.float32), scale_base, table / 2)
    return scheme.rope(cfg, Step(row), has_cache=False)


def neighbours(rotate, x: np.ndarray) -> np.ndarray:
    """A rotation of split halves, on channels whose pairs are neighbours."""
    dim = x.shape[-1]
    halves = np.arange(dim).reshape(-1, 2).T.reshape(-1)  # 0, 2, ... then 1, 3, ...
    turned = np.asarray(rotate(jnp.asarray(x[..., halves])[:, :, None]))[:, :, 0]
    return turned[..., np.argsort(halves)]


@pytest.mark.parametrize("scale_base", [512, 8192])
def test_xpos(data, scale_base: int) -> None:
    rope = xpos(data, scale_base, int(data["xpos_cache_len"]))
    q, k = neighbours(rope.rotate_q, data["q"]), neighbours(rope.rotate_k, data["k"])
    np.testing.assert_allclose(q, data[f"xpos{scale_base}_q"], atol=1e-5)
    np.testing.assert_allclose(k, data[f"xpos{scale_base}_k"], atol=1e-5)
    want = np.einsum(
        "bqd,bkd->bqk", data[f"xpos{scale_base}_q"], data[f"xpos{scale_base}_k"], dtype=np.float64
    )
    other = xpos(data, scale_base, 8 * int(data["xpos_cache_len"]))
    for rotation in (rope, other):  # the table's length cancels
        q, k = neighbours(rotation.rotate_q, data["q"]), neighbours(rotation.rotate_k, data["k"])
        np.testing.assert_allclose(np.einsum("bqd,bkd->bqk", q, k), want, atol=2e-4)


def test_the_interleaved_rotation_of_the_shared_code_is_the_same(data) -> None:
    """As B grows, xPos is a plain rotation of neighbouring pairs."""
    plain = xpos(data, 1e12, 2)
    positions = jnp.arange(data["q"].shape[1])[None]
    tables = rope_angles(positions, jnp.asarray(data["base_freq"]), interleaved=True)
    want = apply_rope(jnp.asarray(data["q"])[:, :, None], *tables, interleaved=True)[:, :, 0]
    found = jax.device_get(neighbours(plain.rotate_q, data["q"]))
    np.testing.assert_allclose(found, want, atol=1e-5)
