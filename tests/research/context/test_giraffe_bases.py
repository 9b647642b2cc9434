"""Giraffe's bases: frequencies, positions, xPos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.attention import Frequencies, Step
from models.positions import RopeScaling, rope_frequencies
from research.context.giraffe.bases import (
    Basis,
    XPos,
    giraffe_inv_freq,
    make_scheme,
    random_positions,
    xpos_reach,
    xpos_scales,
    xpos_zeta,
)
from tests.models import tiny

DIM, BASE, TRAINED = 64, 10000.0, 256
THETA = giraffe_inv_freq(DIM, BASE)


def test_the_default_is_rope_to_the_bit():
    for dim, base in ((64, 1e4), (10, 5e5), (2, 1e4)):
        want, _ = rope_frequencies(RopeScaling(), dim, base)
        found = giraffe_inv_freq(dim, base, 1.0, 0.0, 0)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(np.float32(found), want)


@pytest.mark.parametrize("power", [0.1, 0.5, 2.0])
def test_the_power_basis_stretches_slow_pairs_most(power: float):
    found = giraffe_inv_freq(DIM, BASE, power=power)
    factor = found / THETA
    assert factor[0] == 1.0 and (np.diff(factor) < 0).all() and (found > 0).all()
    assert factor[-1] == pytest.approx((2 / DIM) ** power)
    np.testing.assert_array_equal(giraffe_inv_freq(DIM, BASE, power=0.0), THETA)


@pytest.mark.parametrize(("scale", "power"), [(1.0, 0.0), (4.0, 0.0), (1.0, 0.5), (2.0, 0.1)])
def test_a_truncated_basis_has_kept_slow_and_still_pairs(scale: float, power: float):
    before = giraffe_inv_freq(DIM, BASE, scale, power)
    found = giraffe_inv_freq(DIM, BASE, scale, power, TRAINED)
    cutoff, slow = 2 * np.pi / TRAINED, 2 * np.pi / (16 * TRAINED)
    kept = found == before
    assert kept.any() and (found == slow).any() and (found == 0).any()
    assert (kept | (found == slow) | (found == 0)).all()
    assert (np.diff(found) <= 0).all()
    assert (2 * np.pi / found[kept] <= TRAINED).all()
    np.testing.assert_array_equal(kept, before >= cutoff)
    np.testing.assert_array_equal(found == 0, before < cutoff / 8)


def test_truncated_angles_were_all_seen_in_training():
    found = giraffe_inv_freq(DIM, BASE, truncate=TRAINED)
    kept = found[2 * np.pi / TRAINED <= found]
    seen = np.arange(TRAINED)[:, None] * kept
    new = np.arange(TRAINED, 8 * TRAINED)[:, None] * kept
    for j, theta in enumerate(kept):
        gap = np.abs(new[:, j, None] - seen[None, :, j]) % (2 * np.pi)
        nearest = np.minimum(gap, 2 * np.pi - gap).min(axis=1)
        assert nearest.max() <= theta / 2 + 1e-9
    slow = found[(found > 0) & (found < kept.min())]
    assert len(slow) > 0 and (slow * 2 * TRAINED < 2 * np.pi).all()  # angles that are new


def rotated_logits(inv_freq: np.ndarray, rng: np.random.Generator, pairs: np.ndarray):
    """Logits of one q and one k that live in ``pairs``, for all distances up to 50."""
    scheme = Frequencies(jnp.asarray(inv_freq, jnp.float32))
    row = jnp.arange(51, dtype=jnp.int32)[None]
    rope = scheme.rope(tiny.config(head_dim=DIM), Step(row), False)
    live = np.concatenate([pairs, pairs])
    q, k = (np.where(live, rng.normal(size=DIM), 0.0) for _ in range(2))
    q = rope.rotate_q(jnp.broadcast_to(jnp.asarray(q, jnp.float32), (1, 51, 1, DIM)))
    k = rope.rotate_k(jnp.broadcast_to(jnp.asarray(k, jnp.float32), (1, 51, 1, DIM)))
    return np.einsum("td,d->t", q[0, :, 0], k[0, 0, 0])


def test_still_pairs_carry_no_position():
    found, rng = giraffe_inv_freq(DIM, BASE, truncate=TRAINED), np.random.default_rng(0)
    still = rotated_logits(found, rng, found == 0)
    np.testing.assert_array_equal(still, still[:1].repeat(51))
    assert np.ptp(rotated_logits(found, rng, found > 0)) > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 7}, "must be even, got 7"),
        ({"dim": 0}, "must be even, got 0"),
        ({"scale": 0.5}, "scale is 0.5: give 1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"power": -0.1}, "power is -0.1: give 0"),
        ({"truncate": -1}, "truncate is -1: give the trained length"),
    ],
)
def test_bad_bases_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        giraffe_inv_freq(**({"dim": DIM, "base": BASE} | fields))


# Randomised positions.
def test_random_positions_rise_by_one_on_average():
    """The mean step is 1 before rows are shrunk, and approaches 1 from below with the length."""
    draw = jax.jit(random_positions, static_argnums=(1, 2))
    ends = {}
    for length, rows in ((24, 4000), (4096, 64)):
        found = np.asarray(draw(jax.random.key(length), rows, length))
        assert found.shape == (rows, length) and found.dtype == np.float32
        assert (found > 0).all() and (np.diff(found, axis=1) > 0).all()
        assert found.max() <= length * (1 + 1e-6)
        ends[length] = found[:, -1].mean() / length
        full = found[:, -1] < length * (1 - 1e-6)
        assert 0.3 < full.mean() < 0.7  # about half the rows are never stretched
    assert ends[24] == pytest.approx(0.953, abs=0.005)
    assert 0.99 < ends[4096] < 1
    steps = np.diff(np.asarray(draw(jax.random.key(1), 64, 4096)), axis=1)
    assert steps.max() <= 2 and steps.min() < 0.1


# xPos.
def rope_of(scale_base: float, center: float, positions: np.ndarray, dtype=jnp.float32):
    scheme = XPos(jnp.asarray(THETA, jnp.float32), scale_base, center)
    rope = scheme.rope(tiny.config(head_dim=DIM), Step(jnp.asarray(positions)[None]), False)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=DIM), dtype) for _ in range(2))
    shape = (1, len(positions), 1, DIM)
    return rope.rotate_q(jnp.broadcast_to(q, shape)), rope.rotate_k(jnp.broadcast_to(k, shape))


def logits_of(*args, **kwargs) -> np.ndarray:
    q, k = (np.asarray(x[0, :, 0], np.float64) for x in rope_of(*args, **kwargs))
    return q @ k.T


def test_xpos_logits_depend_on_distances_only():
    at = np.arange(12)
    want = logits_of(16.0, 0.0, at)
    for shift, center in ((3, 0.0), (0, 40.0), (17, 6.0)):
        np.testing.assert_allclose(logits_of(16.0, center, at + shift), want, atol=1e-4)
    along = [np.diagonal(want, -d) for d in range(12)]
    assert max(np.ptp(x) for x in along) < 1e-4
    assert np.ptp([x[0] for x in along]) > 1


def test_xpos_is_rope_for_a_large_base():
    at = np.arange(12)
    scheme = Frequencies(jnp.asarray(THETA, jnp.float32))
    rope = scheme.rope(tiny.config(head_dim=DIM), Step(jnp.asarray(at)[None]), False)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=DIM), jnp.float32) for _ in range(2))
    q, k = (turn(jnp.broadcast_to(x, (1, 12, 1, DIM))) for turn, x in
            ((rope.rotate_q, q), (rope.rotate_k, k)))  # fmt: skip
    want = np.asarray(q[0, :, 0]) @ np.asarray(k[0, :, 0]).T
    np.testing.assert_allclose(logits_of(1e9, 6.0, at), want, atol=1e-4)
    assert np.abs(logits_of(16.0, 6.0, at) - want).max() > 1


def test_the_scales_of_a_pair_of_positions_multiply_to_the_decay():
    at = np.asarray([0.0, 3.0, 500.0])
    scales = np.asarray(xpos_scales(at, DIM, 128.0, 250.0), np.float64)
    product = scales[:, None] / scales[None]
    decay = xpos_zeta(DIM) ** ((at[:, None, None] - at[None, :, None]) / 128.0)
    np.testing.assert_allclose(product, decay, rtol=2e-5)
    assert (xpos_zeta(DIM) < 1).all() and (np.diff(xpos_zeta(DIM)) > 0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_xpos_in_low_precision(dtype):
    """Over the longest text that the dtype reaches; an uncentred one would leave its range."""
    reach = xpos_reach(DIM, 512.0, dtype)
    at = np.linspace(0, reach, 64)
    exact = logits_of(512.0, reach / 2, at)
    found = logits_of(512.0, reach / 2, at, dtype=dtype)
    causal = np.tril(np.ones_like(exact)) > 0
    error = np.abs(found - exact)[causal].max()
    assert error < 64 * float(jnp.finfo(dtype).eps)
    if dtype == jnp.float16:
        _, k = rope_of(512.0, 0.0, at * 3, dtype)
        assert not np.isfinite(np.asarray(k, np.float32)).all()


def test_xpos_beyond_the_range_of_a_dtype_is_refused():
    cfg, basis = tiny.config(head_dim=DIM, max_length=2048), Basis(xpos=True)
    make_scheme(cfg, basis, scale_base=128.0)
    with pytest.raises(
        ValueError, match=r"reaches 9\d\d tokens in float16, and the length is 2048"
    ):
        make_scheme(cfg, basis, scale_base=128.0, dtype=jnp.float16)
    with pytest.raises(ValueError, match="needs scale_base"):
        make_scheme(cfg, basis)
    with pytest.raises(ValueError, match="positive number"):
        make_scheme(cfg, basis, scale_base=0.0)


def test_a_model_with_another_scheme_is_refused():
    for cfg in (
        tiny.config(rope=RopeScaling("linear", 2.0)),
        tiny.config(position="learned", norm="layer", gated_mlp=False, activation="gelu"),
    ):
        with pytest.raises(ValueError, match="use one scheme or the other"):
            make_scheme(cfg, Basis(scale=2.0))


def test_another_basis_is_data():
    cfg = tiny.config()
    params, tokens = tiny.weights(cfg), tiny.tokens()
    run = jax.jit(lambda p, policy: decoder.forward(p, cfg, tokens, policy=policy).hidden)
    plain = decoder.forward(params, cfg, tokens).hidden
    found = [
        run(params, decoder.default_policy(cfg, make_scheme(cfg, basis)))
        for basis in (Basis(), Basis(scale=4.0), Basis(power=0.5), Basis(truncate=16))
    ]
    assert run._cache_size() == 1
    np.testing.assert_allclose(found[0], plain, atol=1e-6)
    for i in range(4):
        for j in range(i):
            assert np.abs(np.asarray(found[i] - found[j])).max() > 1e-4
    for scale_base in (512.0, 64.0):
        run(
            params,
            decoder.default_policy(cfg, make_scheme(cfg, Basis(xpos=True), scale_base=scale_base)),
        )
    assert run._cache_size() == 2


def test_windows_of_the_model_stay():
    cfg = tiny.config(windows=(4, None, 4))
    policy = decoder.default_policy(cfg, make_scheme(cfg, Basis()))
    np.testing.assert_array_equal(policy.windows, decoder.default_policy(cfg).windows)
