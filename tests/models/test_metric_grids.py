"""Metric coordinates, the shared encoder, the modulated decoder, and the two baselines."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import coordinate_fields, metric_grids, params
from models.coordinate_fields import Field, InstantNGP, Siren, check_domain, is_table
from models.metric_grids import MetricGrids, metric_coords
from ops.hash_grid import HashGridConfig, hashgrid_encode, hashgrid_gather, hashgrid_meta

GRID = HashGridConfig(2, 3, 2, 8, 8, 40)
CFG = MetricGrids(GRID, out_dim=3, hidden=16)
FIELDS = {
    "full": CFG,
    "one grid": dataclasses.replace(CFG, spaces=1),
    "no modulators": dataclasses.replace(CFG, modulate=False),
    "separate": dataclasses.replace(CFG, separate_tables=True),
    "deeper": dataclasses.replace(CFG, num_layers=8),
    "instant-ngp": InstantNGP(GRID, 3, hidden=16),
    "siren": Siren(2, 3, hidden=16),
}


forward = jax.jit(metric_grids.forward, static_argnums=1)
hidden = jax.jit(metric_grids.hidden, static_argnums=1)


def points(count: int = 50, d: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (count, d)), jnp.float32)


def made(cfg: MetricGrids, scale: float = 1.0) -> metric_grids.Params:
    """Initial parameters with a table that matters."""
    drawn = params.init(cfg.specs(), jax.random.key(0))
    table = scale * jax.random.normal(jax.random.key(1), drawn.table.shape)
    return dataclasses.replace(drawn, table=table)


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_every_field_keeps_the_interface(field: Field):
    assert isinstance(field, Field)
    drawn = params.init(field.specs(), jax.random.key(0))
    x = points().reshape(5, 10, 2)
    values = jax.jit(lambda p, x: field.apply(p, field.samples(x)))(drawn, x)
    assert values.shape == (5, 10, 3) and np.isfinite(values).all()
    at = jax.jit(field.samples)(x.reshape(50, 2))
    flat = jax.jit(field.apply)(drawn, at)
    np.testing.assert_allclose(values.reshape(50, 3), flat, atol=1e-5)
    moved = jax.tree.map(lambda p: p * 1.5, drawn)
    assert not np.allclose(jax.jit(field.apply)(moved, at), flat, atol=1e-3)


def test_ranges_end_points_and_monotony():
    line = jnp.linspace(-1, 1, 401)[:, None]
    c = np.asarray(metric_coords(line))[..., 0]
    for k, (low, high) in enumerate([(0, 1), (-1, 0), (-1, -0.5)]):
        np.testing.assert_allclose(c[k, [0, -1]], [low, high], atol=1e-6)
        assert (np.diff(c[k]) > 0).all()
    inside = np.asarray(line, np.float64)[:, 0]
    np.testing.assert_allclose(c[2], (np.arcsin(inside) - 1.5 * np.pi) / (2 * np.pi), atol=1e-6)
    n = np.asarray(metric_coords((line + 1) / 2, "nerf"))[..., 0]
    unit = (inside + 1) / 2
    np.testing.assert_allclose(n, [unit, np.sin(unit), np.cos(unit)], atol=1e-6)
    assert n[2].min() == pytest.approx(math.cos(1), abs=1e-6) and n.min() >= 0


def test_rounding_beyond_the_ends_gives_no_nan():
    x = jnp.asarray([[1.0 + 1e-7, -1.0 - 1e-7], [1.0, -1.0], [np.nextafter(1, 2), 0.3]])
    assert np.isfinite(metric_coords(x)).all()
    slope = jax.jacfwd(lambda v: metric_coords(v[None])[2, 0])(jnp.asarray([1.0, 0.5]))
    assert np.isfinite(slope).all()
    wanted = np.diag([1 / np.sqrt(2e-6 - 1e-12), 1 / np.sqrt(0.75)]) / (2 * np.pi)
    np.testing.assert_allclose(slope, wanted, rtol=0.05)


def test_unknown_kinds_and_counts_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'sdf': choose one of image, nerf"):
        metric_coords(points(), "sdf")
    with pytest.raises(ValueError, match="1 to 3 metric spaces"):
        metric_coords(points(), spaces=4)
    for change in ({"spaces": 0}, {"num_layers": 1}, {"hidden": 0}, {"out_dim": 0}):
        with pytest.raises(ValueError, match=r"spaces|decoder needs"):
            dataclasses.replace(CFG, **change)
    small = dataclasses.replace(GRID, log2_size=4)
    with pytest.raises(ValueError, match="separate tables halve"):
        MetricGrids(small, 3, separate_tables=True)
    with pytest.raises(ValueError, match="a network needs num_layers"):
        InstantNGP(GRID, 3, num_layers=1)
    with pytest.raises(ValueError, match="a network needs num_layers"):
        Siren(2, 0)


def test_coordinates_outside_are_refused():
    check_domain(np.asarray([[1.0, -1.0], [1 + 1e-7, 0.0]]))
    check_domain(np.zeros((0, 2)))
    for bad in (1.01, -1.5, np.nan):
        with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
            check_domain(np.asarray([[0.0, bad]]))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        check_domain(np.asarray([-0.2]), 0.0, 1.0)


def decoder_by_hand(p: metric_grids.Params, cfg: MetricGrids, x, features) -> np.ndarray:
    """The decoder in numpy and float64, features (spaces, points, e)."""
    x, features = np.asarray(x, np.float64), np.asarray(features, np.float64)

    def layer(z, linear):
        return np.sin(cfg.omega * (z @ np.asarray(linear.w, np.float64) + linear.b[None]))

    z = features.sum(0)
    for i, sine in enumerate(p.sine):
        z = layer(z, sine)
        if cfg.modulate:
            source = (x + 1) / 2 if i == 0 else features[min(i - 1, len(features) - 1)]
            z = z * layer(source, p.modulators[i]) ** 2
    return z @ np.asarray(p.out.w, np.float64) + p.out.b[None]


@pytest.mark.parametrize("name", ["full", "one grid", "no modulators", "deeper"])
def test_the_decoder_in_float64(name: str):
    cfg = FIELDS[name]
    p, x = made(cfg, 0.3), points()
    coords = metric_coords(x, spaces=cfg.spaces)
    features = hashgrid_encode(p.table, coords, GRID)
    wanted = decoder_by_hand(p, cfg, x, features)
    np.testing.assert_allclose(forward(p, cfg, x), wanted, atol=2e-4)
    assert np.ptp(wanted) > 0.01


def test_modulators_of_one_leave_a_plain_siren():
    """Also with -1 in some channels: modulators enter squared."""
    p, x = made(CFG, 0.3), points()
    quarter = math.pi / 2 / CFG.omega
    signs = jnp.where(jnp.arange(16) % 3 == 0, -quarter, quarter)
    flat = tuple(dataclasses.replace(m, w=jnp.zeros_like(m.w), b=signs) for m in p.modulators)
    ones = dataclasses.replace(p, modulators=flat)
    plain = dataclasses.replace(CFG, modulate=False)
    siren = dataclasses.replace(p, modulators=())
    np.testing.assert_allclose(forward(ones, CFG, x), forward(siren, plain, x), atol=1e-5)


def test_the_sign_of_a_modulator_does_not_matter():
    p, x = made(CFG, 0.3), points()
    for i in range(len(p.modulators)):
        turned = list(p.modulators)
        turned[i] = jax.tree.map(jnp.negative, turned[i])
        other = dataclasses.replace(p, modulators=tuple(turned))
        np.testing.assert_allclose(forward(other, CFG, x), forward(p, CFG, x), atol=1e-6)
    turned = dataclasses.replace(p, sine=jax.tree.map(jnp.negative, p.sine))
    assert not np.allclose(forward(turned, CFG, x), forward(p, CFG, x))


def test_layers_beyond_the_spaces_read_the_last_one():
    """With one live modulator at a time: which space it reads, the features' sum being kept."""
    cfg = FIELDS["deeper"]
    p, x = made(cfg, 0.3), points(10)
    features = hashgrid_gather(p.table, jax.jit(cfg.samples)(x).lookup)
    assert len(p.sine) == len(p.modulators) == 7

    def moves(live: int, a: int, b: int) -> bool:
        modulators = tuple(
            m if i == live else dataclasses.replace(m, w=jnp.zeros_like(m.w))
            for i, m in enumerate(p.modulators)
        )
        q = dataclasses.replace(p, modulators=modulators)
        moved = features.at[:, a].add(0.1).at[:, b].add(-0.1)
        change = hidden(q, cfg, x, moved) - hidden(q, cfg, x, features)
        return bool(np.abs(change).max() > 1e-3)

    for live in range(1, 7):
        reads = [k for k in range(3) if moves(live, k, (k + 1) % 3) and moves(live, k, (k + 2) % 3)]
        assert reads == [min(live - 1, 2)]


def test_all_spaces_share_one_table_or_have_their_own():
    x = points()
    shared, separate = CFG.samples(x).lookup, FIELDS["separate"].samples(x).lookup
    rows = hashgrid_meta(GRID).rows
    assert metric_grids.table_rows(CFG) == rows
    assert shared.index.max() < rows
    # The ranges of the second and third space overlap: they touch common rows.
    touched = [set(np.unique(shared.index[:, k]).tolist()) for k in range(3)]
    assert touched[1] & touched[2]
    smaller = [hashgrid_meta(g).rows for g in metric_grids.grids(FIELDS["separate"])]
    assert smaller[0] == rows and smaller[0] > smaller[1] > smaller[2]
    starts = np.cumsum([0, *smaller])
    for k in range(3):
        part = np.asarray(separate.index[:, k])
        assert part.min() >= starts[k] and part.max() < starts[k + 1]
    assert FIELDS["separate"].specs().table.shape == (starts[-1], 2)


def test_samples_equal_the_encoder_on_every_space():
    x, p = points(), made(CFG)
    features = hashgrid_gather(p.table, CFG.samples(x).lookup)
    wanted = hashgrid_encode(p.table, metric_coords(x), GRID)
    np.testing.assert_allclose(jnp.moveaxis(features, -2, 0), wanted, atol=1e-6)


def test_parameter_counts():
    """The official Kodak decoder, and the small protocol's models."""
    kodak = MetricGrids(HashGridConfig(2, 13, 2, 14, 16, 256), 3)
    assert params.count(kodak.specs()) == 187_040 + 19_779
    small = HashGridConfig(2, 8, 2, 8, 8, 64)
    assert round(params.count(MetricGrids(small, 3).specs()), -2) == 20_600
    assert round(params.count(InstantNGP(small, 3).specs()), -2) == 8_900


def test_initial_values():
    cfg = dataclasses.replace(CFG, hidden=64)
    p = params.init(cfg.specs(), jax.random.key(0))
    e, later = cfg.features, math.sqrt(6 / 64) / 30
    bounds = [
        (p.table, 1e-4), (p.sine[0], 1 / e), (p.sine[1], later), (p.sine[3], later),
        (p.out, later), (p.modulators[0], 2**-0.5), (p.modulators[1], e**-0.5),
    ]  # fmt: skip
    for leaves, bound in bounds:
        for leaf in jax.tree.leaves(leaves):
            assert np.abs(leaf).max() <= bound
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(leaves)) > 0.9 * bound


def test_only_tables_are_in_the_table_group():
    for field in FIELDS.values():
        names = [
            params.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(field.specs())
        ]
        tables = [name for name in names if is_table(name)]
        assert len(tables) == (0 if isinstance(field, Siren) else 1)


def test_siren_is_sines_of_affine_maps():
    field = coordinate_fields.Siren(2, 1, hidden=8, num_layers=3)
    p, x = params.init(field.specs(), jax.random.key(3)), points(9)
    z = np.asarray(x, np.float64)
    for layer in p.layers[:-1]:
        z = np.sin(30 * (z @ np.asarray(layer.w, np.float64) + layer.b[None]))
    wanted = z @ np.asarray(p.layers[-1].w) + p.layers[-1].b[None]
    np.testing.assert_allclose(field.apply(p, field.samples(x)), wanted, atol=1e-5)
