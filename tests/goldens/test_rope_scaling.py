"""Rotary schemes against ``transformers``' initialisers, and the invariants of the family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.positions import (
    RopeScaling,
    apply_rope,
    ntk_base,
    riflex,
    rope_angles,
    rope_frequencies,
)
from tests.goldens import golden

RTOL = 1e-5


def setting(data, **fields):
    return RopeScaling(
        factor=float(data["factor"]), original_max_position=int(data["orig_max_pos"]), **fields
    )


def frequencies(data, cfg, length=None):
    inv_freq, factor = rope_frequencies(cfg, int(data["head_dim"]), float(data["base"]), length)
    return np.asarray(inv_freq), float(factor)


def longrope(data):
    tables = {
        f"{kind}_factor": tuple(float(x) for x in data[f"longrope_{kind}_factor"])
        for kind in ("short", "long")
    }
    return setting(data, rope_type="longrope", **tables)


@pytest.fixture
def data():
    return golden("rope_scaling", "rope_params")


@pytest.mark.parametrize("name", ["default", "linear", "ntk", "yarn", "yarn2", "llama3"])
def test_frequencies_and_factor(data, name):
    fields = {}
    if name == "yarn2":
        keys = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        fields = {key: float(data[f"yarn2_{key}"]) for key in keys}
    cfg = setting(data, rope_type=name.rstrip("2"), **fields)
    inv_freq, factor = frequencies(data, cfg)
    np.testing.assert_allclose(inv_freq, data[f"{name}_inv_freq"], rtol=RTOL)
    np.testing.assert_allclose(factor, data.get(f"{name}_attention_factor", 1.0), rtol=RTOL)
    if name == "ntk":
        base = ntk_base(float(data["base"]), float(data["factor"]), int(data["head_dim"]))
        np.testing.assert_allclose(base, data["ntk_base"], rtol=RTOL)


@pytest.mark.parametrize("form", ["python", "traced", "rows"])
def test_dynamic_at_every_length(data, form):
    cfg = setting(data, rope_type="dynamic")
    lengths = data["dyn_seq_lens"]
    if form == "rows":
        found = frequencies(data, cfg, jnp.asarray(lengths))[0]
    elif form == "traced":
        traced = jax.jit(
            lambda n: rope_frequencies(cfg, int(data["head_dim"]), float(data["base"]), n)[0]
        )
        found = np.stack([traced(n) for n in lengths])
        assert traced._cache_size() == 1
    else:
        found = np.stack([frequencies(data, cfg, int(n))[0] for n in lengths])
    np.testing.assert_allclose(found, data["dynamic_inv_freq"], rtol=RTOL)


@pytest.mark.parametrize("as_length", [int, jnp.asarray])
def test_longrope_switches_tables_after_the_trained_length(data, as_length):
    trained = int(data["orig_max_pos"])
    for length, kind in ((trained, "short"), (trained + 1, "long")):
        inv_freq, factor = frequencies(data, longrope(data), as_length(length))
        np.testing.assert_allclose(inv_freq, data[f"longrope_{kind}_inv_freq"], rtol=RTOL)
        np.testing.assert_allclose(factor, data["longrope_attention_factor"], rtol=RTOL)


@pytest.mark.parametrize("name", ["default", "yarn"])
def test_tables_and_rotated_vectors(data, name):
    positions = data["positions"]
    for source in ("given", "own"):
        if source == "given":
            inv_freq = jnp.asarray(data[f"{name}_inv_freq"])
            factor = float(data.get(f"{name}_attention_factor", 1.0))
            atol = 1e-4
        else:
            inv_freq, factor = frequencies(data, setting(data, rope_type=name))
            atol = 3e-7 * positions.max()
        cos, sin = rope_angles(positions, jnp.asarray(inv_freq), factor)
        np.testing.assert_allclose(cos, data[f"{name}_cos"], atol=atol)
        np.testing.assert_allclose(sin, data[f"{name}_sin"], atol=atol)
        for x in ("q", "k"):
            turned = apply_rope(jnp.asarray(data[x]).swapaxes(0, 1), cos, sin).swapaxes(0, 1)
            size = max(1.0, np.abs(data[x]).max())
            np.testing.assert_allclose(turned, data[f"{name}_{x}_rot"], atol=size * atol)


DIM, BASE, TRAINED = 16, 10000.0, 64
ONES = (1.0,) * (DIM // 2)


def scheme(kind, factor=4.0, **fields):
    return RopeScaling(kind, factor, TRAINED, short_factor=ONES, long_factor=ONES, **fields)


def spectrum(kind, factor=4.0, length=None, dim=DIM, **fields):
    inv_freq, a = rope_frequencies(scheme(kind, factor, **fields), dim, BASE, length)
    return np.asarray(inv_freq, np.float64), float(a)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("length", [None, 7, TRAINED])
def test_without_scaling_every_scheme_is_the_default(kind, length):
    inv_freq, factor = spectrum(kind, 1.0, length)
    default, _ = spectrum("default")
    np.testing.assert_array_max_ulp(inv_freq.astype(np.float32), default.astype(np.float32), 1)
    assert factor == 1.0


def test_linear_divides_positions():
    positions = jnp.arange(0, 100, 4, dtype=jnp.float32)
    default, _ = rope_frequencies(scheme("default"), DIM, BASE)
    linear, _ = rope_frequencies(scheme("linear"), DIM, BASE)
    for a, b in zip(
        rope_angles(positions, linear), rope_angles(positions / 4, default), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_ntk_keeps_the_first_pair_and_divides_the_last():
    default, ntk = spectrum("default")[0], spectrum("ntk")[0]
    assert ntk[0] == default[0]
    assert ntk[-1] == pytest.approx(default[-1] / 4, rel=1e-6)
    assert (ntk[1:-1] < default[1:-1]).all() and (ntk[1:-1] > default[1:-1] / 4).all()


@pytest.mark.parametrize("as_length", [int, jnp.asarray])
def test_dynamic_grows_with_the_length(as_length):
    at_trained = spectrum("dynamic", length=as_length(TRAINED))[0]
    np.testing.assert_array_equal(at_trained, spectrum("default")[0])
    alpha = 4.0 * 3 - 3.0  # s n / L - (s - 1) at n = 3 L
    grown = spectrum("dynamic", length=as_length(3 * TRAINED))[0]
    np.testing.assert_allclose(grown, spectrum("ntk", alpha)[0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("dim", [16, 64])
def test_mixed_schemes_stay_between_both_ends(kind, dim):
    default, mixed = spectrum("default", dim=dim)[0], spectrum(kind, dim=dim)[0]
    assert (mixed <= default * (1 + 1e-6)).all() and (mixed >= default / 4 * (1 - 1e-6)).all()
    assert (np.diff(mixed) <= 0).all()
    if kind == "yarn":
        turns = TRAINED * default / (2 * np.pi)
        untouched, divided = turns > 32, turns < 1
        low = int(np.floor(dim * np.log(TRAINED / (2 * np.pi * 32)) / (2 * np.log(BASE))))
        high = int(np.ceil(dim * np.log(TRAINED / (2 * np.pi)) / (2 * np.log(BASE))))
        untouched, divided = np.arange(dim // 2) <= low, np.arange(dim // 2) >= high
    else:
        untouched, divided = 2 * np.pi / default < TRAINED / 4, 2 * np.pi / default > TRAINED
    assert divided.any()
    np.testing.assert_allclose(mixed[untouched], default[untouched], rtol=1e-6)
    np.testing.assert_allclose(mixed[divided], default[divided] / 4, rtol=1e-6)


def test_yarn_clips_its_range_and_can_skip_rounding():
    # Here the ramp runs from pair 0 to 7 although only 4 pairs exist: its end is clipped to
    # dim - 1, not to the last pair, so the last pair is mixed and not divided.
    mixed, _ = rope_frequencies(RopeScaling("yarn", 4.0, 265), 8, 10.0)
    theta = 10.0 ** (-np.arange(4) / 4)
    ramp = np.arange(4) / 7
    np.testing.assert_allclose(mixed, theta * (1 - ramp) + theta / 4 * ramp, rtol=1e-6)
    assert (spectrum("yarn", truncate=False)[0] != spectrum("yarn")[0]).any()
    assert spectrum("yarn", attention_factor=1.5)[1] == 1.5


def rotated(kind, q, k, q_position, k_position):
    inv_freq, factor = rope_frequencies(scheme(kind), DIM, BASE)
    q_tables = rope_angles(jnp.asarray([q_position], jnp.float32), inv_freq, factor)
    k_tables = rope_angles(jnp.asarray([k_position], jnp.float32), inv_freq, factor)
    return apply_rope(q[None, None], *q_tables)[0, 0], apply_rope(k[None, None], *k_tables)[0, 0]


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rotation_keeps_norms_and_sees_only_distances(kind):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=DIM), jnp.float32) for _ in range(2))
    factor = spectrum(kind)[1]
    size = float(jnp.linalg.norm(q) * jnp.linalg.norm(k))
    q_turned, k_turned = rotated(kind, q, k, 23, 5)
    assert float(jnp.linalg.norm(q_turned)) == pytest.approx(
        factor * float(jnp.linalg.norm(q)), rel=1e-6
    )
    logit = float(q_turned @ k_turned)
    for shift in (1, 17.5, 60):
        moved = rotated(kind, q, k, 23 + shift, 5 + shift)
        assert float(moved[0] @ moved[1]) == pytest.approx(logit, abs=2e-6 * size * factor**2)
    further = rotated(kind, q, k, 24, 5)
    assert abs(float(further[0] @ further[1]) - logit) > 1e-3


def test_the_attention_factor_enters_logits_squared():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, DIM)), jnp.float32) for _ in range(2))
    inv_freq, factor = rope_frequencies(scheme("yarn"), DIM, BASE)
    assert factor > 1.1
    at = jnp.asarray([9.0])
    plain = rope_angles(at, inv_freq)
    scaled = rope_angles(at, inv_freq, factor)
    bare = jnp.vdot(apply_rope(q, *plain), apply_rope(k, *plain))
    warm = jnp.vdot(apply_rope(q, *scaled), apply_rope(k, *scaled))
    assert float(warm) == pytest.approx(float(factor**2 * bare), rel=1e-5)


def test_split_half_and_interleaved_agree_after_the_permutation():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(6, 3, DIM)), jnp.float32)
    inv_freq, _ = rope_frequencies(scheme("default"), DIM, BASE)
    positions = jnp.arange(6)
    order = np.arange(DIM).reshape(2, -1).T.reshape(-1)  # 0, d/2, 1, d/2 + 1, ...
    halves = apply_rope(x, *rope_angles(positions, inv_freq))
    pairs = apply_rope(x[..., order], *rope_angles(positions, inv_freq, interleaved=True), True)
    np.testing.assert_allclose(halves[..., order], pairs, atol=1e-6)


def test_riflex_slows_one_pair_to_less_than_a_turn():
    theta, _ = spectrum("default")
    slowed, factor = riflex(3, 500)(scheme("default"), DIM, BASE, None)
    assert slowed[2] == pytest.approx(0.9 * 2 * np.pi / 500) and factor == 1.0
    assert np.delete(slowed, 2) == pytest.approx(np.delete(theta, 2))
    short = int(2 * np.pi / theta[2])
    assert riflex(3, short)(scheme("default"), DIM, BASE, None)[0] == pytest.approx(theta)
