"""The hash grid against plain integer arithmetic, and its invariants."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.hash_grid import (
    HashGridConfig,
    hashgrid_encode,
    hashgrid_gather,
    hashgrid_indices,
    hashgrid_lookup,
    hashgrid_meta,
    hashgrid_row,
)
from ops.hash_grid.reference import PRIMES, fused_multiply_add

GRIDS = {
    "2d": HashGridConfig(2, 5, 2, 8, 4, 40),
    "3d": HashGridConfig(3, 4, 3, 9, 3, 30),
    "1d": HashGridConfig(1, 3, 1, 6, 8, 100),
    "4d": HashGridConfig(4, 2, 2, 7, 2, 6),
    "one level": HashGridConfig(2, 1, 2, 8, 7, 7),
}
DENSE = HashGridConfig(2, 3, 2, 14, 5, 33)

indices = jax.jit(hashgrid_indices, static_argnums=1)
encode = jax.jit(hashgrid_encode, static_argnums=2)


def points(cfg: HashGridConfig, count: int = 200, low: float = -1.0, high: float = 1.0):
    rng = np.random.default_rng(cfg.n_dims)
    return rng.uniform(low, high, (count, cfg.n_dims)).astype(np.float32)


def table(cfg: HashGridConfig, seed: int = 0) -> jax.Array:
    shape = (hashgrid_meta(cfg).rows, cfg.n_features)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def row_by_integers(vertex: list[int], resolution: int, size: int) -> int:
    """The definition in Python's integers, walking the strides as tiny-cuda-nn does."""
    bound = {1: 2**32 - 1, 2: 65535, 3: 1625, 4: 255}[len(vertex)]
    index, stride, wrapped = 0, 1, [v % 2**32 for v in vertex]
    for v in wrapped:
        index, stride = (index + v * stride) % 2**32, stride * resolution
    if resolution > bound:
        stride = 2**32 - 1
    if size < stride:
        index = 0
        for v, prime in zip(wrapped, PRIMES, strict=False):
            index ^= v * prime % 2**32
    return index % size


@pytest.mark.parametrize(
    ("dims", "resolution", "size"),
    [
        (1, 50, 56), (1, 50, 16), (2, 17, 296), (2, 17, 288), (2, 65535, 2**14),
        (2, 65536, 2**14), (3, 12, 1728), (3, 12, 1024), (3, 1625, 2**19), (3, 1626, 2**19),
        (3, 5000, 2**15), (4, 4, 256), (4, 300, 2**10),
    ],
)  # fmt: skip
def test_rows_equal_integer_arithmetic(dims: int, resolution: int, size: int):
    rng = np.random.default_rng(resolution)
    vertices = rng.integers(-(2**31), 2**31, (60, dims))
    vertices[:30] = rng.integers(-2 * resolution, 2 * resolution, (30, dims))
    got = jax.jit(hashgrid_row, static_argnums=(1, 2))(
        jnp.asarray(vertices.astype(np.int32).view(np.uint32)), resolution, size
    )
    assert got.dtype == jnp.uint32
    assert got.tolist() == [row_by_integers(v.tolist(), resolution, size) for v in vertices]


@pytest.mark.parametrize("cfg", GRIDS.values(), ids=GRIDS)
def test_indices_and_weights_equal_the_definition(cfg: HashGridConfig):
    meta = hashgrid_meta(cfg)
    x = points(cfg, 40)
    rows, weights = indices(x, cfg)
    for i, level in itertools.product(range(len(x)), range(cfg.n_levels)):
        # A product of two float32 numbers is exact in float64, so this rounds once.
        position = (np.float64(meta.scales[level]) * x[i] + 0.5).astype(np.float32)
        cell = np.floor(position).astype(np.int64)
        fraction = (position - cell).astype(np.float64)
        for corner in range(2**cfg.n_dims):
            bits = [corner >> k & 1 for k in range(cfg.n_dims)]
            wanted = row_by_integers(
                (cell + bits).tolist(), int(meta.resolutions[level]), int(meta.sizes[level])
            )
            weight = np.prod([t if bit else 1 - t for t, bit in zip(fraction, bits, strict=True)])
            assert rows[i, level, corner] == wanted
            np.testing.assert_allclose(weights[i, level, corner], weight, atol=2e-7)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8),
    st.floats(0, 5000, width=32),
)
def test_the_position_is_rounded_once(values: list[float], scale: float):
    tiny = np.finfo(np.float32).tiny  # XLA flushes smaller numbers to zero
    x = np.asarray([v if abs(v) > tiny else 0.0 for v in values], np.float32)
    factor = np.float32(scale if scale > tiny else 0.0)
    wanted = (np.float64(factor) * x.astype(np.float64) + 0.5).astype(np.float32)
    np.testing.assert_array_equal(fused_multiply_add(jnp.asarray(x), factor, 0.5), wanted)


def test_the_position_is_rounded_once_where_two_roundings_differ():
    x, scale = points(DENSE, 20_000), np.float32(255.00003)
    wanted = (np.float64(scale) * x + 0.5).astype(np.float32)
    assert np.any(scale * x + np.float32(0.5) != wanted)  # what the trick is for
    np.testing.assert_array_equal(fused_multiply_add(jnp.asarray(x), scale, 0.5), wanted)
    compiled = jax.jit(lambda x: fused_multiply_add(x, scale, 0.5))
    np.testing.assert_array_equal(compiled(x), wanted)


@pytest.mark.parametrize("cfg", GRIDS.values(), ids=GRIDS)
def test_weights_are_a_partition_of_one(cfg: HashGridConfig):
    x = points(cfg, low=-3.0, high=3.0)
    _, weights = indices(x, cfg)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    constant = jnp.broadcast_to(
        jnp.arange(1.0, cfg.n_features + 1), (hashgrid_meta(cfg).rows, cfg.n_features)
    )
    features = encode(constant, x, cfg).reshape(len(x), cfg.n_levels, cfg.n_features)
    wanted = np.broadcast_to(np.arange(1.0, cfg.n_features + 1), features.shape)
    np.testing.assert_allclose(features, wanted, rtol=1e-6)


@pytest.mark.parametrize("cfg", [DENSE, GRIDS["2d"], GRIDS["3d"]], ids=["dense", "2d", "3d"])
def test_features_are_continuous(cfg: HashGridConfig):
    """Also across cell borders, and for negative coordinates of hashed levels."""
    meta = hashgrid_meta(cfg)
    border = (np.arange(1, 4) - 0.5) / meta.scales[-1]
    x = np.concatenate([points(cfg, low=0.05, high=0.9), *np.full((3, 1, cfg.n_dims), border[0])])
    step = 1e-6
    values = table(cfg)
    low, high = (encode(values, jnp.asarray(x + s), cfg) for s in (-step, step))
    largest = np.ptp(np.asarray(values)) * cfg.n_dims * meta.scales.max()
    # Four times the step, for the rounding of x and of positions.
    assert np.abs(high - low).max() < 4 * step * largest
    assert np.abs(high - low).max() > 0


def test_dense_levels_are_injective_up_to_the_last_half_cell():
    meta = hashgrid_meta(DENSE)
    assert np.all(meta.sizes >= meta.resolutions.astype(np.int64) ** 2)
    for level in range(DENSE.n_levels):
        last = 1 - 0.5 / meta.scales[level] - 1e-4
        line = np.linspace(0, last, 200, dtype=np.float32)
        x = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        rows, _ = indices(x, DENSE)
        seen = np.unique(rows[:, level])
        assert len(seen) == meta.resolutions[level] ** 2
    # The last half cell touches the vertex past the end, which wraps: intended, as in the original.
    end = jnp.ones((1, 2), jnp.float32)
    rows, _ = indices(end, DENSE)
    resolution, size = int(meta.resolutions[0]), int(meta.sizes[0])
    assert int(rows[0, 0, 3]) == (resolution + resolution * resolution) % size


def test_the_table_gradient_is_a_scatter_add():
    cfg = GRIDS["2d"]
    values, x = table(cfg), jnp.asarray(points(cfg, 7))
    cotangent = jnp.asarray(np.random.default_rng(3).normal(size=(7, 10)), jnp.float32)
    grad = jax.grad(lambda t: jnp.sum(encode(t, x, cfg) * cotangent))(values)
    lookup = hashgrid_lookup(x, cfg)
    wanted = np.zeros(values.shape)
    per_level = np.asarray(cotangent).reshape(7, cfg.n_levels, 1, cfg.n_features)
    np.add.at(wanted, lookup.index, np.asarray(lookup.weights)[..., None] * per_level)
    np.testing.assert_allclose(grad, wanted, atol=1e-6)
    touched = np.unique(lookup.index)
    assert 0 < len(touched) < len(values)
    assert np.all(np.delete(np.asarray(grad), touched, axis=0) == 0)
    # Finite differences are exact up to rounding, since features are linear in the table.
    row = int(touched[3])
    moved = values.at[row, 1].add(1.0)
    change = encode(moved, x, cfg) - encode(values, x, cfg)
    np.testing.assert_allclose(jnp.sum(change * cotangent), grad[row, 1], rtol=1e-4, atol=1e-5)


def test_the_coordinate_gradient_is_the_slope_inside_a_cell():
    cfg = GRIDS["3d"]
    values = table(cfg)
    x = jnp.asarray([[0.31, 0.47, 0.62]], jnp.float32)
    total = lambda x: jnp.sum(encode(values, x, cfg))
    slope = jax.grad(total)(x)
    for axis in range(3):
        step = jnp.zeros((1, 3)).at[0, axis].set(2e-3)
        numeric = (total(x + step) - total(x - step)) / 4e-3
        np.testing.assert_allclose(slope[0, axis], numeric, rtol=1e-2)


def test_a_known_lookup_gives_the_same_features():
    cfg = GRIDS["3d"]
    values, x = table(cfg), jnp.asarray(points(cfg, 12)).reshape(3, 4, 3)
    lookup = jax.jit(lambda x: hashgrid_lookup(x, cfg))(x)
    assert lookup.index.shape == (3, 4, cfg.n_levels, 8)
    np.testing.assert_allclose(hashgrid_gather(values, lookup), encode(values, x, cfg), atol=1e-6)
    assert hashgrid_gather(values, lookup).shape == (3, 4, cfg.n_levels * cfg.n_features)


def test_parameter_counts_of_the_official_settings():
    """Kodak, signed distances and radiance fields; numbers of the method's specification."""
    for cfg, count in (
        (HashGridConfig(2, 13, 2, 14, 16, 256), 187_040),
        (HashGridConfig(3, 15, 2, 15, 16, 2048), 884_496),
        (HashGridConfig(3, 16, 2, 19, 16, 4096), 12_599_920),
    ):
        assert hashgrid_meta(cfg).rows * cfg.n_features == count


def test_float32_scales_decide_the_resolution():
    meta = hashgrid_meta(HashGridConfig(2, 13, 2, 14, 16, 256))
    assert meta.scales.dtype == np.float32
    assert meta.resolutions[-1] == int(np.ceil(meta.scales[-1])) + 1
    assert meta.resolutions[0] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_dims": 5}, "1 to 4 dimensions"),
        ({"n_levels": 0}, "at least one level"),
        ({"log2_size": 2}, "choose 3 to 30"),
        ({"max_res": 3}, "1 <= base_res <= max_res"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str):
    fields = {
        "n_dims": 2, "n_levels": 4, "n_features": 2, "log2_size": 8, "base_res": 4, "max_res": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        HashGridConfig(**{**fields, **change})


def test_points_and_tables_that_do_not_fit_are_refused():
    cfg = GRIDS["2d"]
    with pytest.raises(ValueError, match="n_dims=2 but the points have 3"):
        hashgrid_encode(table(cfg), jnp.zeros((4, 3)), cfg)
    with pytest.raises(ValueError, match="the table has shape"):
        hashgrid_encode(jnp.zeros((5, 2)), jnp.zeros((4, 2)), cfg)
    with pytest.raises(ValueError, match="rows: lower log2_size"):
        hashgrid_meta(HashGridConfig(3, 16, 2, 30, 512, 4096))
