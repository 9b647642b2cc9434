"""Volume rendering of a density in the unit cube: rays, an occupancy grid, marching, compositing.

The settings (128^3 cells, threshold 1e-2 on density times step, step 5e-3) are the authors'; how
the grid is updated is from memory of the renderer that they use, and simpler, see
:func:`update_occupancy`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

Density = Callable[[Array], Array]
Radiance = Callable[[Array, Array], tuple[Array, Array]]


@struct.dataclass
class Rays:
    """Origins and unit directions, in the coordinates of the unit cube."""

    origins: Any  # (rays, 3)
    directions: Any  # (rays, 3)


@struct.dataclass
class Marched:
    """Sample points of every ray, first those that count; the rest is to be ignored."""

    distances: Any  # (rays, samples)
    valid: Any  # (rays, samples)
    dropped: Any  # (rays,): occupied steps beyond the budget of samples


@struct.dataclass
class Rendered:
    """What rays see."""

    colour: Any  # (rays, 3)
    opacity: Any  # (rays,)
    depth: Any  # (rays,)


def camera_rays(azimuth: float, elevation: float, size: int, radius: float = 1.3) -> Rays:
    """Rays of a square image of ``size``^2 pixels, from a sphere around the cube's centre.

    Angles in radians; z is up; the field of view is 50 degrees.

    Raises:
        ValueError: straight up or down, where "up" in the image is undefined.
    """
    if abs(elevation) > math.pi / 2 - 1e-3:
        raise ValueError(f"an elevation of {elevation} looks along the z axis: choose a smaller.")
    level = math.cos(elevation)
    back = jnp.asarray(
        [level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation)], jnp.float32
    )
    right = jnp.asarray([-math.sin(azimuth), math.cos(azimuth), 0.0], jnp.float32)
    up = jnp.cross(back, right)
    half = math.tan(math.radians(25.0))
    line = half * ((2 * jnp.arange(size) + 1) / size - 1)
    u, v = (grid.reshape(-1, 1) for grid in jnp.meshgrid(line, -line))
    direction = u * right[None] + v * up[None] - back[None]
    direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
    origin = jnp.broadcast_to(0.5 + radius * back, direction.shape)
    return Rays(origin, direction)


def ray_box(rays: Rays) -> tuple[Float[Array, " rays"], Float[Array, " rays"]]:
    """Distances at which rays enter and leave the unit cube; entry is not before the origin.

    A ray that misses leaves before it enters.
    """
    slope = jnp.where(jnp.abs(rays.directions) < 1e-9, 1e-9, rays.directions)
    low, high = -rays.origins / slope, (1 - rays.origins) / slope
    near = jnp.max(jnp.minimum(low, high), axis=-1)
    return jnp.maximum(near, 0.0), jnp.min(jnp.maximum(low, high), axis=-1)


def update_occupancy(
    occupancy: Float[Array, "n n n"], density: Density, step: float, key: Array
) -> Float[Array, "n n n"]:
    """Density times step at a random point of every cell, or 0.95 of the old value if larger.

    The original visits all cells for the first 256 steps only, and later a part of them.
    """
    n = occupancy.shape[0]
    cells = jnp.stack(jnp.meshgrid(*[jnp.arange(n)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    points = (cells + jax.random.uniform(key, cells.shape)) / n
    now = (density(points) * step).reshape(occupancy.shape)
    return jnp.maximum(0.95 * occupancy, now)


def is_occupied(
    occupancy: Float[Array, "n n n"], points: Float[Array, "*batch 3"], threshold: float = 1e-2
) -> Bool[Array, "*batch"]:
    """Whether points lie in a cell above the threshold, or above the mean if that is lower."""
    n = occupancy.shape[0]
    cell = jnp.clip(jnp.floor(points * n).astype(jnp.int32), 0, n - 1)
    bound = jnp.minimum(threshold, jnp.mean(occupancy))
    return occupancy[cell[..., 0], cell[..., 1], cell[..., 2]] > bound


def march(
    rays: Rays, occupancy: Float[Array, "n n n"], step: float, samples: int, key: Array | None
) -> Marched:
    """The first ``samples`` occupied steps of every ray inside the cube.

    Steps are of equal length; with a key each ray's first is shifted at random by up to one step.
    """
    near, far = ray_box(rays)
    shift = 0.5 if key is None else jax.random.uniform(key, (*near.shape, 1))
    steps = jnp.arange(math.ceil(math.sqrt(3) / step))[None]
    distance = near[:, None] + (steps + shift) * step
    points = rays.origins[:, None] + distance[..., None] * rays.directions[:, None]
    valid = (distance < far[:, None]) & is_occupied(occupancy, points)
    order = jnp.argsort(~valid, axis=-1, stable=True)[:, :samples]
    kept = jnp.take_along_axis(valid, order, axis=-1)
    return Marched(
        distances=jnp.take_along_axis(distance, order, axis=-1),
        valid=kept,
        dropped=jnp.sum(valid, axis=-1) - jnp.sum(kept, axis=-1),
    )


def composite(
    density: Float[Array, "rays samples"],
    colour: Float[Array, "rays samples 3"],
    marched: Marched,
    step: float,
    background: float,
) -> Rendered:
    """Emission and absorption along rays, in front of a grey background.

    Weight of a sample: ``(1 - exp(-density step))`` times the light that the ones before let pass.
    """
    thickness = jnp.where(marched.valid, density * step, 0.0)
    before = jnp.cumsum(thickness, axis=-1) - thickness
    weight = jnp.exp(-before) * -jnp.expm1(-thickness)
    opacity = jnp.sum(weight, axis=-1)
    seen = jnp.sum(weight[..., None] * colour, axis=1)
    return Rendered(
        colour=seen + (1 - opacity[:, None]) * background,
        opacity=opacity,
        depth=jnp.sum(weight * marched.distances, axis=-1),
    )


def render_rays(
    radiance: Radiance,
    rays: Rays,
    occupancy: Float[Array, "n n n"],
    *,
    step: float = 5e-3,
    samples: int = 128,
    background: float = 1.0,
    key: Array | None = None,
) -> tuple[Rendered, Marched]:
    """Colours of rays through a field ``radiance(points, directions) -> (density, colour)``.

    Args:
        occupancy: density times step per cell; empty space is skipped.
        step: length of a step, in sides of the cube.
        samples: how many occupied steps of a ray count; ``Marched.dropped`` says what is beyond.
        background: grey value behind everything.
        key: shifts the samples at random, for training.
    """
    marched = march(rays, occupancy, step, samples, key)
    points = rays.origins[:, None] + marched.distances[..., None] * rays.directions[:, None]
    directions = jnp.broadcast_to(rays.directions[:, None], points.shape)
    density, colour = radiance(points.reshape(-1, 3), directions.reshape(-1, 3))
    shape = marched.valid.shape
    return (
        composite(density.reshape(shape), colour.reshape(*shape, 3), marched, step, background),
        marched,
    )
