"""Volume rendering against closed forms, and a small radiance fit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import params
from models.radiance import RadianceConfig, specs
from ops.hash_grid import HashGridConfig
from research.approximation.metric_grids import radiance_fit, render
from research.approximation.metric_grids.radiance_fit import RadianceFit
from research.approximation.metric_grids.render import Rays

pytestmark = pytest.mark.slow  # a minute in all: networks are trained

FULL = jnp.ones((2, 2, 2))


def ray(origin: list[float], direction: list[float]) -> Rays:
    d = np.asarray([direction], np.float32)
    return Rays(jnp.asarray([origin], jnp.float32), jnp.asarray(d / np.linalg.norm(d)))


def test_rays_enter_and_leave_the_cube():
    near, far = render.ray_box(ray([-1.0, 0.5, 0.5], [1, 0, 0]))
    np.testing.assert_allclose([near[0], far[0]], [1, 2], atol=1e-5)
    near, far = render.ray_box(ray([0.5, 0.5, 0.5], [1, 1, 0]))
    np.testing.assert_allclose([near[0], far[0]], [0, math.sqrt(0.5)], atol=1e-5)
    near, far = render.ray_box(ray([-1.0, 2.0, 0.5], [1, 0, 0]))
    assert near[0] > far[0]


def test_a_uniform_fog_has_its_closed_form():
    fog = lambda x, d: (
        jnp.full(len(x), 2.0),
        jnp.tile(jnp.asarray([[0.2, 0.4, 0.8]]), (len(x), 1)),
    )
    out, marched = render.render_rays(
        fog, ray([-1.0, 0.5, 0.5], [1, 0, 0]), FULL, step=0.01, samples=200, background=1.0
    )
    opacity = 1 - math.exp(-2)
    np.testing.assert_allclose(out.opacity, opacity, rtol=1e-4)
    wanted = opacity * np.asarray([[0.2, 0.4, 0.8]]) + math.exp(-2)
    np.testing.assert_allclose(out.colour, wanted, rtol=1e-4)
    # The mean distance of an exponential law cut at 1, from the entry at 1.
    depth = opacity * 1 + (0.5 - math.exp(-2) * 1.5)
    np.testing.assert_allclose(out.depth, depth, rtol=1e-3)
    assert int(marched.valid.sum()) == 100 and int(marched.dropped[0]) == 0


def test_a_ray_that_misses_sees_the_background():
    fog = lambda x, d: (jnp.full(len(x), 9.0), jnp.zeros((len(x), 3)))
    out, _ = render.render_rays(fog, ray([-1.0, 3.0, 0.5], [1, 0, 0]), FULL, background=0.7)
    np.testing.assert_allclose(out.colour, 0.7)


def test_empty_cells_are_skipped_and_a_small_budget_is_reported():
    occupancy = jnp.zeros((4, 4, 4)).at[2].set(1.0)
    line = ray([-1.0, 0.5, 0.5], [1, 0, 0])
    marched = render.march(line, occupancy, 0.01, 60, None)
    kept = np.asarray(marched.distances[marched.valid]) - 1
    assert len(kept) == 25 and kept.min() > 0.5 and kept.max() < 0.75
    assert (np.diff(kept) > 0).all()
    short = render.march(line, occupancy, 0.01, 10, None)
    assert int(short.dropped[0]) == 15 and int(short.valid.sum()) == 10
    np.testing.assert_allclose(short.distances[0] - 1, kept[:10], atol=1e-6)


def test_training_rays_start_at_random():
    line = ray([-1.0, 0.5, 0.5], [1, 0, 0])
    marched = [render.march(line, FULL, 0.1, 5, jax.random.key(i)).distances[0] for i in range(2)]
    assert not np.allclose(*marched)
    for distances in marched:
        np.testing.assert_allclose(np.diff(distances), 0.1, rtol=1e-4)


def test_occupancy_rises_at_once_and_falls_slowly():
    density = lambda x: jnp.where(x[:, 0] > 0.5, 10.0, 0.0)
    grid = render.update_occupancy(jnp.full((4, 4, 4), 1.0), density, 0.5, jax.random.key(0))
    np.testing.assert_allclose(grid[:2], 0.95)
    np.testing.assert_allclose(grid[2:], 5.0)
    points = jnp.asarray([[0.1, 0.5, 0.5], [0.9, 0.5, 0.5], [1.0, 1.0, 1.0]])
    empty = jnp.zeros((4, 4, 4)).at[2:].set(5.0)
    assert render.is_occupied(empty, points).tolist() == [False, True, True]
    # A thin field is not empty because it is below the threshold everywhere.
    assert render.is_occupied(empty * 1e-4, points).tolist() == [False, True, True]


def test_cameras_look_at_the_centre():
    for azimuth, elevation in ((0.0, 0.0), (2.0, 0.7), (4.0, -0.5)):
        rays = render.camera_rays(azimuth, elevation, 9)
        middle = rays.directions[40]
        np.testing.assert_allclose(rays.origins[40] + 1.3 * middle, 0.5, atol=1e-5)
        np.testing.assert_allclose(jnp.linalg.norm(rays.directions, axis=-1), 1, atol=1e-6)
        assert rays.directions[4, 2] > rays.directions[76, 2]  # the first rows look up
    with pytest.raises(ValueError, match="looks along the z axis"):
        render.camera_rays(0.0, math.pi / 2, 4)


def test_rates_follow_the_schedule():
    share = [float(radiance_fit.rate_share(i, 1000)) for i in (0, 50, 100, 499, 500, 750, 900)]
    wanted = [0.01, 0.505, 1, 1, 0.33, 0.33**2, 0.33**3]
    np.testing.assert_allclose(share, wanted, rtol=1e-5)


SMALL = RadianceFit(
    RadianceConfig(
        HashGridConfig(3, 6, 2, 11, 4, 32), sigma_hidden=16, spatial_hidden=16, bottleneck=8,
        lobes=(2, 4), directional_hidden=16, directional_layers=1,
    ),
    steps=150, rays=128, views=6, size=16, occupancy=16, step=0.03, samples=32,
)  # fmt: skip


def test_table_and_networks_have_their_own_rates():
    """The first update of Adam is its rate, for every parameter with a gradient."""
    tree = specs(SMALL.config)
    drawn = params.init(tree, jax.random.key(0))
    rule = radiance_fit.make_rule(SMALL, tree)
    grads = jax.tree.map(jnp.ones_like, drawn)
    updates, _ = rule.update(grads, rule.init(drawn), drawn)
    np.testing.assert_allclose(updates.table, -2e-2 * 0.01, rtol=1e-4)
    np.testing.assert_allclose(updates.sigma[0].w, -1e-3 * 0.01, rtol=1e-4)


def test_a_radiance_field_is_fitted():
    rays, colours = radiance_fit.pictures(SMALL)
    assert colours.shape == (6 * 256, 3) and np.isfinite(colours).all()
    state, history = radiance_fit.fit_radiance(SMALL, rays, colours, jax.random.key(0))
    losses = history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-10:].mean() < 0.4 * losses[:10].mean()
    # Views that were not trained on.
    other = dataclasses.replace(SMALL, views=1)
    _, wanted = radiance_fit.pictures(other, turn=0.5)
    seen = radiance_fit.view(other, state, 0.5, 0.0).reshape(-1, 3)
    error = float(jnp.mean(jnp.square(seen - wanted)))
    constant = float(jnp.mean(jnp.square(wanted - wanted.mean(0, keepdims=True))))
    assert error < 0.5 * constant
