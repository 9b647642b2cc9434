"""CLEX's ODE: its solution, factors and training positions; numbers are in the goldens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import clex, params
from models.clex import CLEXConfig, CLEXParams
from models.positions import RopeScaling, rope_frequencies

CFG = CLEXConfig(head_dim=16, base=10000.0, max_position=32, max_factor=4, time_dt=0.05)


@functools.cache
def weights(seed: int = 0, scale: float = 0.05) -> CLEXParams:
    """Random float32 matrices, of which the second is not zero."""
    rng, half = np.random.default_rng(seed), CFG.head_dim // 2
    w_up, w_down = rng.normal(size=(half, CFG.width)), rng.normal(size=(CFG.width, half))
    return CLEXParams(jnp.asarray(w_up / 4, jnp.float32), jnp.asarray(scale * w_down, jnp.float32))


def doubled(given: CLEXParams) -> CLEXParams:
    """The same in float64, where that is enabled."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), given)


def theta(cfg: CLEXConfig = CFG) -> np.ndarray:
    return np.asarray(rope_frequencies(RopeScaling(), cfg.head_dim, cfg.base)[0])


def test_the_factor_one_is_plain_rope_to_the_bit_and_solves_nothing():
    broken = jax.tree.map(lambda x: x * jnp.nan, weights())
    at_one = jax.jit(lambda p, t: clex.frequencies_at(p, CFG, t))
    np.testing.assert_array_equal(at_one(broken, jnp.asarray(1.0)), theta())
    assert not np.isfinite(at_one(broken, jnp.asarray(2.0))[1:]).any()
    np.testing.assert_array_equal(clex.table(weights(), CFG)[0], theta())
    assert (np.asarray(clex.table(weights(), CFG))[1:, 1:] != theta()[1:]).all()


@pytest.mark.parametrize("double", [True, False])
def test_without_a_network_it_is_dynamic_ntk(double: bool):
    still = weights(scale=0.0)
    share = np.arange(0, CFG.head_dim, 2) / (CFG.head_dim - 2)
    t = np.arange(1, CFG.max_factor + 1)[:, None]
    want = 10000.0 ** (-np.arange(0, CFG.head_dim, 2) / CFG.head_dim) * (2.0 * t - 1) ** -share
    with jax.enable_x64(double):
        found = np.asarray(clex.table(doubled(still) if double else still, CFG))
    np.testing.assert_allclose(found, want, rtol=1e-5 if double else 5e-5)
    np.testing.assert_array_equal(found[:, 0], 1)


def test_initial_parameters_are_dynamic_ntk():
    made = params.init(clex.specs(CFG), jax.random.key(0))
    assert made.w_up.shape == (8, 16) and made.w_down.shape == (16, 8)
    assert float(jnp.abs(made.w_down).max()) == 0
    assert 0.2 < float(jnp.abs(made.w_up).max()) <= 0.25  # uniform within 1/sqrt(16)
    np.testing.assert_allclose(clex.table(made, CFG), clex.table(weights(scale=0.0), CFG))


def test_the_fastest_pair_has_no_analytic_slope():
    z = jnp.asarray(np.log(theta()))
    still = clex.field(weights(scale=0.0), CFG, jnp.asarray(2.5), z)
    assert float(still[0]) == 0 and (np.asarray(still[1:]) < 0).all()
    moved = clex.field(weights(), CFG, jnp.asarray(2.5), z)
    hidden = jnp.tanh((2 * z + (still / 2 * (2 * 2.5 - 1)) * jnp.log(4.0)) @ weights().w_up)
    np.testing.assert_allclose(moved, hidden @ weights().w_down + still, rtol=1e-5)


def test_solutions_join():
    """1 to s and s to t is 1 to t; half the step changes nothing to speak of."""
    with jax.enable_x64(True):
        given = doubled(weights())
        start = jnp.asarray(np.log(theta()), jnp.float64)
        grid = clex.nodes(CFG)
        whole = clex.integrate(given, CFG, start, grid)
        middle = np.linspace(1, 2.37, 40)
        first = clex.integrate(given, CFG, start, middle)[-1]
        second = clex.integrate(given, CFG, first, np.linspace(2.37, 4, 50))
        np.testing.assert_allclose(second[-1], whole[-1], atol=1e-6)
        half = clex.integrate(
            given, CFG, start, clex.nodes(dataclasses.replace(CFG, time_dt=0.025))
        )
        np.testing.assert_allclose(half[::2], whole, atol=1e-6)
        assert np.abs(whole[-1] - whole[0]).max() > 0.5


def test_a_tenfold_step_is_fine_enough():
    """What ``configs/clex.py`` relies on."""
    fine = dataclasses.replace(CFG, max_factor=16, time_dt=0.01)
    coarse = dataclasses.replace(fine, time_dt=0.1)
    found, want = clex.table(weights(), coarse), clex.table(weights(), fine)
    np.testing.assert_allclose(found, want, rtol=1e-4)
    assert np.abs(np.asarray(want[-1] / want[0])[1:] - 1).max() > 0.3


def test_the_solver_is_the_three_eighths_rule():
    cfg = dataclasses.replace(CFG, max_factor=2, time_dt=1.0)
    z = np.log(theta().astype(np.float64))
    with jax.enable_x64(True):
        given = doubled(weights(scale=0.5))

        def f(t, z):
            return np.asarray(clex.field(given, cfg, jnp.asarray(t), jnp.asarray(z)))

        k1 = f(1.0, z)
        k2 = f(1 + 1 / 3, z + k1 / 3)
        k3 = f(1 + 2 / 3, z + k2 - k1 / 3)
        k4 = f(2.0, z + k1 - k2 + k3)
        want = z + (k1 + 3 * k2 + 3 * k3 + k4) / 8
        a = f(1.5, z + k1 / 2)
        b = f(1.5, z + a / 2)
        classical = z + (k1 + 2 * a + 2 * b + f(2.0, z + b)) / 6
        found = np.asarray(clex.integrate(given, cfg, jnp.asarray(z), clex.nodes(cfg)))[-1]
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert np.abs(found - classical).max() > 1e-5


def test_a_largest_factor_of_two_gives_frequencies():
    """The released code returns angles there."""
    cfg = dataclasses.replace(CFG, max_factor=2)
    found = np.asarray(clex.table(weights(), cfg))
    assert found.shape == (2, 8)
    np.testing.assert_allclose(found, np.asarray(clex.table(weights(), CFG))[:2], rtol=1e-6)


@pytest.mark.parametrize("time_dt", [0.01, 0.05, 0.3, 1.0])
def test_the_grid_ends_at_the_largest_factor(time_dt: float):
    cfg = dataclasses.replace(CFG, time_dt=time_dt)
    grid = clex.nodes(cfg)
    assert grid[0] == 1 and grid[-1] == 4
    steps = np.diff(grid)
    np.testing.assert_allclose(steps[:-1], time_dt)
    assert 0 < steps[-1] <= time_dt * 1.001
    assert clex.nodes(cfg, 2.5)[-1] == 2.5
    assert len(clex.nodes(dataclasses.replace(cfg, time_dt=float(np.float32(time_dt))))) == len(
        grid
    )


def test_real_factors_are_interpolated_between_nodes():
    at = jax.jit(lambda t: clex.frequencies(weights(), CFG, t))
    low, mid, high = np.log(np.asarray(at(jnp.asarray([2.0, 2.02, 2.05])), np.float64))
    np.testing.assert_allclose(mid, 0.6 * low + 0.4 * high, atol=2e-6)
    assert (mid[1:] != low[1:]).all()
    exact = clex.frequencies(weights(), CFG, jnp.asarray([2.525]), stop=2.525)
    np.testing.assert_allclose(at(jnp.asarray([2.525] * 3))[0], exact[0], rtol=1e-3)
    ends = at(jnp.asarray([0.5, 4.0, 9.0]))  # clipped
    np.testing.assert_array_equal(ends[0], theta())
    np.testing.assert_array_equal(ends[1], ends[2])


def test_the_ode_is_solved_in_float32():
    low = params.cast(weights(), jnp.bfloat16)
    found = clex.table(low, CFG)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, clex.table(params.cast(low, jnp.float32), CFG))


def test_the_slope_of_the_frequencies():
    """With respect to both matrices: zero at factor 1, and of the first while the second is 0."""
    size = jax.jit(jax.grad(lambda p, t: jnp.sum(clex.frequencies_at(p, CFG, t))))
    for scale, t, moves in ((0.0, 1.0, (0, 0)), (0.0, 3.0, (0, 1)), (0.05, 3.0, (1, 1))):
        slope = size(weights(scale=scale), jnp.asarray(t))
        found = [bool(jnp.abs(x).max() > 0) for x in (slope.w_up, slope.w_down)]
        assert found == [bool(x) for x in moves], (scale, t)


# Factors.
def test_the_factor_steps_at_multiples_of_the_context():
    lengths = np.arange(1, 140)
    want = np.clip(-(-lengths // 32), 1, 4)
    np.testing.assert_array_equal(jax.jit(lambda n: clex.factor(n, CFG))(lengths), want)
    assert [clex.factor(n, CFG) for n in (1, 32, 33, 64, 65, 128)] == [1, 1, 2, 2, 3, 4]
    assert CFG.max_length == 128


@pytest.mark.parametrize("length", [0, 129])
def test_a_known_length_without_a_factor_is_refused(length: int):
    with pytest.raises(ValueError, match=rf"text of {length} tokens is not within 1 .. 128"):
        clex.factor(length, CFG)


def test_queries_are_scaled_by_the_logarithm_of_the_length():
    found = clex.length_scale(jnp.asarray([16, 32, 1024]), CFG)
    np.testing.assert_allclose(found, [0.8, 1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("continuous", [False, True])
def test_factors_are_drawn_evenly(continuous: bool):
    cfg = dataclasses.replace(CFG, continuous=continuous)
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(jax.vmap(lambda k: clex.draw_factor(k, cfg))(keys))
    assert found.min() >= 1 and found.max() <= 4
    assert found.mean() == pytest.approx(2.5, abs=0.1)
    assert (len(np.unique(found)) > 1000) == continuous
    if not continuous:
        np.testing.assert_array_equal(np.unique(found), [1, 2, 3, 4])


# Training positions.
@pytest.mark.parametrize("length", [2, 3, 32, 50, 64, 100])
def test_training_positions_span_the_window(length: int):
    c = max(1, length // 32)
    draw = jax.jit(lambda key, t: clex.train_positions(key, length, t, CFG))
    for t in (1, 2, 4):
        for seed in range(5):
            found = np.asarray(draw(jax.random.key(seed), jnp.asarray(t, jnp.float32)))
            assert found.shape == (length,) and found[0] == 0
            assert found[-1] == (length * t) // c - 1
            inner = np.round(found[1:-1] * c)
            np.testing.assert_allclose(found[1:-1] * c, inner, rtol=1e-6)
            assert (np.diff(inner) > 0).all()
            assert not len(inner) or (inner.min() >= 1 and inner.max() <= length * t - 2)
            if c == 1:
                assert (np.diff(found) > 0).all()
                if t == 1:
                    np.testing.assert_array_equal(found, np.arange(length))
    assert draw._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_samples_of_positions_are_even():
    keys = jax.random.split(jax.random.key(1), 2000)
    draw = jax.jit(jax.vmap(lambda k: clex.train_positions(k, 10, jnp.asarray(3.0), CFG)))
    found = np.asarray(draw(keys)).astype(int)[:, 1:-1]
    counts = np.bincount(found.ravel(), minlength=30)
    assert counts[0] == counts[29] == 0
    np.testing.assert_allclose(counts[1:29] / 2000, 8 / 28, atol=0.05)


def test_positions_at_a_real_factor():
    found = np.asarray(clex.train_positions(jax.random.key(0), 10, jnp.asarray(2.57), CFG))
    assert found[0] == 0 and found[-1] == 24 and (np.diff(found) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "head_dim is 7: CLEX needs an even width of 4 or more"),
        ({"head_dim": 2}, "head_dim is 2"),
        ({"max_factor": 1}, "max_factor is 1: give 2 or more"),
        ({"max_position": 1}, "max_position is 1"),
        ({"param_factor": 0.0}, "leaves no hidden unit"),
        ({"activation": "relu"}, "unknown activation 'relu': use one of tanh, silu"),
        ({"time_dt": 0.0}, "time_dt is 0.0"),
    ],
)
def test_bad_settings_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)


def test_rows_without_room_for_positions_are_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        clex.train_positions(jax.random.key(0), 1, jnp.asarray(2.0), CFG)
