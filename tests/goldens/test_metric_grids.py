"""The hash grid, the metric encodings and the decoder against an independent implementation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import metric_grids
from models.layers import Linear
from models.metric_grids import MetricGrids, Params, metric_coords
from ops.hash_grid import (
    HashGridConfig,
    Lookup,
    hashgrid_encode,
    hashgrid_gather,
    hashgrid_indices,
    hashgrid_meta,
    hashgrid_row,
)
from tests.goldens import golden

grid_golden = functools.partial(golden, "metric_grids")


def _decoder(g: dict[str, np.ndarray]) -> Params:
    def linear(weight: str, bias: str) -> Linear:
        return Linear(jnp.asarray(g[weight].T), jnp.asarray(g[bias]))

    layers = sum(re.fullmatch(r"w\d+", name) is not None for name in g)
    return Params(
        table=jnp.asarray(g["table"]),
        sine=tuple(linear(f"w{i}", f"b{i}") for i in range(layers)),
        modulators=tuple(linear(f"mod_w{i}", f"mod_b{i}") for i in range(layers)),
        out=linear("w_out", "b_out"),
    )


def _config(g: dict[str, np.ndarray]) -> MetricGrids:
    d, levels, features, width, base, finest, log2_size, channels = g["dims"].tolist()
    grid = HashGridConfig(d, levels, features, log2_size, base, finest)
    layers = 1 + sum(re.fullmatch(r"w\d+", name) is not None for name in g)
    return MetricGrids(grid, channels, hidden=width, num_layers=layers, spaces=g["coords"].shape[0])


def _check_levels(g: dict[str, np.ndarray], grid: HashGridConfig) -> None:
    meta = hashgrid_meta(grid)
    np.testing.assert_array_equal(meta.resolutions, g["resolution"])
    np.testing.assert_array_equal(meta.sizes, g["level_size"])
    np.testing.assert_allclose(meta.scales, g["scale"], rtol=1e-6)
    np.testing.assert_array_equal(meta.rows, len(g["table"]))
    levels = len(g["scale"])
    growth = ((g["scale"][-1] + 1) / (g["scale"][0] + 1)) ** (1 / max(levels - 1, 1))
    np.testing.assert_allclose(growth, g["growth"], rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_2d", "forward_3d"])
def test_forward(name: str) -> None:
    g = grid_golden(name)
    cfg, params = _config(g), _decoder(g)
    _check_levels(g, cfg.grid)
    x, coords = jnp.asarray(g["x"]), jnp.asarray(g["coords"])
    np.testing.assert_allclose(metric_coords(x), coords, atol=1e-6)

    rows, weights = jax.jit(hashgrid_indices, static_argnums=1)(coords, cfg.grid)
    # Within 1e-6 of a cell's border two implementations may take either side.
    position = g["scale"].reshape(-1, 1) * np.float64(g["coords"])[:, :, None] + 0.5
    clear = (np.abs(position - np.round(position)) > 1e-6).all(-1)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(rows[clear], g["corner_index"][clear])
    np.testing.assert_allclose(weights[clear], g["corner_weight"][clear], atol=1e-5)

    encoded = jax.jit(hashgrid_encode, static_argnums=2)(params.table, coords, cfg.grid)
    np.testing.assert_allclose(encoded, g["features"], atol=1e-5)
    features = jnp.moveaxis(encoded, 0, -2)
    hidden = jax.jit(metric_grids.hidden, static_argnums=1)(params, cfg, x, features)
    np.testing.assert_allclose(hidden, g["hidden_last"], atol=1e-4)
    # The whole model from the point on, its metric coordinates included.
    y = jax.jit(metric_grids.forward, static_argnums=1)(params, cfg, x)
    np.testing.assert_allclose(y, g["y"], atol=1e-4)


@pytest.mark.parametrize("name", ["forward_2d", "forward_3d"])
def test_gather_at_the_golden_rows(name: str) -> None:
    g = grid_golden(name)
    starts = np.concatenate([[0], np.cumsum(g["level_size"])[:-1]]).reshape(-1, 1)
    index = jnp.asarray(g["corner_index"] + starts, jnp.int32)
    features = hashgrid_gather(
        jnp.asarray(g["table"]), Lookup(index, jnp.asarray(g["corner_weight"]))
    )
    np.testing.assert_allclose(features, g["features"], atol=1e-5)


def test_radiance_encoding() -> None:
    g = grid_golden("nerf_encoding_3d")
    levels, features = len(g["scale"]), g["table"].shape[1]
    base, finest = (round(float(s)) + 1 for s in g["scale"][[0, -1]])
    # The largest level is a full table, a power of two, unless all levels are dense.
    log2_size = int(np.ceil(np.log2(g["level_size"].max())))
    grid = HashGridConfig(g["x"].shape[1], levels, features, log2_size, base, finest)
    _check_levels(g, grid)
    coords = metric_coords(jnp.asarray(g["x"]), "nerf")
    np.testing.assert_allclose(coords, g["coords"], atol=1e-6)
    encoded = hashgrid_encode(jnp.asarray(g["table"]), jnp.asarray(g["coords"]), grid)
    np.testing.assert_allclose(encoded, g["features"], atol=1e-5)
    np.testing.assert_allclose(encoded.sum(0), g["features_sum"], atol=1e-5)


def test_rows_of_vertices() -> None:
    g = grid_golden("hash_index")
    settings = [m for name in g if (m := re.fullmatch(r"idx(\d+)_res(\d+)_size(\d+)", name))]
    assert settings
    for match in settings:
        d, resolution, size = map(int, match.groups())
        vertex = jnp.asarray(g[f"pos{d}"].astype(np.int32).view(np.uint32))
        np.testing.assert_array_equal(hashgrid_row(vertex, resolution, size), g[match[0]])
