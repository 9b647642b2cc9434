"""The radiance field: encoding, density and the colour head."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import params, radiance
from models.metric_grids import metric_coords
from models.radiance import RadianceConfig
from ops.hash_grid import HashGridConfig, hashgrid_encode

pytestmark = pytest.mark.slow  # a minute in all: it runs with the slow tier

GRID = HashGridConfig(3, 2, 2, 8, 4, 16)
CFG = RadianceConfig(
    GRID, sigma_hidden=8, geometry=4, spatial_hidden=8, bottleneck=6, lobes=(2, 4),
    directional_hidden=8, directional_layers=2,
)  # fmt: skip


def made() -> radiance.Params:
    drawn = params.init(radiance.specs(CFG), jax.random.key(0))
    return dataclasses.replace(drawn, table=jax.random.normal(jax.random.key(1), drawn.table.shape))


field = jax.jit(radiance.radiance, static_argnums=1)


def points(count: int = 20) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((count, 3)), jnp.float32)


def directions(count: int = 20) -> jax.Array:
    d = np.random.default_rng(1).normal(size=(count, 3))
    return jnp.asarray(d / np.linalg.norm(d, axis=-1, keepdims=True), jnp.float32)


def test_features_are_summed_over_the_spaces():
    p, x = made(), points()
    coords = metric_coords(x, "nerf")
    each = [jax.jit(hashgrid_encode, static_argnums=2)(p.table, c, GRID) for c in coords]
    encode = jax.jit(radiance.encode, static_argnums=1)
    np.testing.assert_allclose(encode(p, CFG, x), sum(each), atol=1e-5)


def test_density_is_an_exponential_inside_and_zero_outside():
    p, x = made(), points()
    features = np.asarray(radiance.encode(p, CFG, x))
    first, second = (np.asarray(layer.w) for layer in p.sigma)
    assert all(layer.b is None for layer in p.sigma)
    wanted = np.exp((np.maximum(features @ first, 0) @ second)[:, 0] - 1)
    np.testing.assert_allclose(radiance.density(p, CFG, x), wanted, rtol=1e-4)
    outside = x.at[:, 1].add(1.0)
    assert (np.asarray(radiance.density(p, CFG, outside)) == 0).all()


def test_the_density_gradient_is_bounded():
    grad = jax.vmap(jax.grad(radiance.bounded_exp))(jnp.asarray([1.0, 15.0, 20.0]))
    np.testing.assert_allclose(grad, np.exp([1.0, 15.0, 15.0]), rtol=1e-5)
    assert radiance.bounded_exp(jnp.float32(20.0)) == pytest.approx(math.exp(20), rel=1e-5)


def test_lobes_are_orthonormal_frames():
    frames = radiance.lobe_frames(8, 16)
    assert frames[0].shape == (128, 3)
    for i, a in enumerate(frames):
        for j, b in enumerate(frames):
            np.testing.assert_allclose(np.sum(a * b, -1), float(i == j), atol=1e-12)
    assert len(np.unique(np.round(frames[0], 6), axis=0)) == 128


def test_gaussians_peak_at_their_lobe_and_are_anisotropic():
    lobe, tangent, other = radiance.lobe_frames(*CFG.lobes)
    sharp = jnp.log(jnp.tile(jnp.asarray([[9.0, 1.0]]), (len(lobe), 1)))
    at = lambda v: np.diag(radiance.gaussians(sharp, CFG, jnp.asarray(v, jnp.float32)))
    np.testing.assert_allclose(at(lobe), 1, atol=1e-5)
    assert (at(-lobe) == 0).all()
    c, s = math.cos(0.4), math.sin(0.4)
    np.testing.assert_allclose(at(c * lobe + s * tangent), c * math.exp(-9 * s * s), rtol=1e-4)
    np.testing.assert_allclose(at(c * lobe + s * other), c * math.exp(-s * s), rtol=1e-4)


def test_colour_depends_on_point_and_direction_and_stays_in_range():
    p, x = made(), points()
    sigma, colour = field(p, CFG, x, directions())
    assert sigma.shape == (20,) and colour.shape == (20, 3)
    assert (colour > 0).all() and (colour < 1).all()
    _, turned = field(p, CFG, x, -directions())
    assert np.abs(turned - colour).max() > 1e-3
    _, moved = field(p, CFG, x[::-1], directions())
    assert np.abs(moved - colour).max() > 1e-3
    grads = jax.jit(jax.grad(lambda q: jnp.sum(radiance.radiance(q, CFG, x, directions())[1])))(p)
    colour_parts = (grads.table, grads.spatial, grads.sharpness, grads.directional)
    for leaf in jax.tree.leaves(colour_parts):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_a_diffuse_colour_ignores_the_direction():
    """With no tint the specular part is silent."""
    p, x = made(), points()
    last = p.spatial[-1]
    dull = dataclasses.replace(last, w=last.w.at[:, 3:6].set(0), b=last.b.at[3:6].set(0))
    q = dataclasses.replace(p, spatial=(*p.spatial[:-1], dull))
    one, other = (field(q, CFG, x, s * directions())[1] for s in (1, -1))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="over 3 dimensions, got 2"):
        dataclasses.replace(CFG, grid=HashGridConfig(2, 3, 2, 8, 4, 16))
    for change in ({"lobes": (8,)}, {"bottleneck": 0}):
        with pytest.raises(ValueError, match="at least 1, and lobes a pair"):
            dataclasses.replace(CFG, **change)


def test_official_sizes():
    grid = HashGridConfig(3, 16, 2, 19, 16, 4096)
    specs = radiance.specs(RadianceConfig(grid))
    assert math.prod(specs.table.shape) == 12_599_920
    assert [layer.w.shape for layer in specs.spatial] == [(32, 256), (256, 256), (256, 265)]
    assert len(specs.directional) == 6 and specs.sharpness.shape == (128, 2)
