"""Fitting a radiance field to pictures of a scene that a formula gives.

The fit has a loop of its own, because its occupancy grid changes with the training and is no
parameter. Left out against the authors' setting: captured scenes, unbounded ones (contraction), and
ray counts that adapt to the number of samples; here a batch has a fixed number of rays.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from models import radiance as field
from models.coordinate_fields import is_table
from models.params import init, path_name
from models.radiance import RadianceConfig
from research.approximation.metric_grids.render import (
    Rays,
    camera_rays,
    render_rays,
    update_occupancy,
)

BALLS = np.asarray(
    [[0.35, 0.4, 0.45, 0.18], [0.65, 0.6, 0.5, 0.15], [0.5, 0.35, 0.7, 0.1]], np.float32
)
"""Centres and radii of the scene."""

PAINT = np.asarray([[0.9, 0.25, 0.2], [0.2, 0.5, 0.9], [0.95, 0.8, 0.2]], np.float32)


def scene(
    x: Float[Array, "n 3"], direction: Float[Array, "n 3"]
) -> tuple[Float[Array, " n"], Float[Array, "n 3"]]:
    """Density and colour of three striped balls with soft edges and a view-dependent gleam."""
    away = x[:, None] - BALLS[None, :, :3]
    length = jnp.linalg.norm(away, axis=-1)
    each = 60 * jax.nn.sigmoid((jnp.broadcast_to(BALLS[:, 3], length.shape) - length) / 0.01)
    total = jnp.sum(each, axis=-1)
    share = each / jnp.maximum(total, 1e-6)[:, None]
    stripes = 0.75 + 0.25 * jnp.sin(40 * x[:, 2:])
    nearest = jnp.argmax(each, axis=-1)
    normal = jnp.take_along_axis(away, nearest[:, None, None], axis=1)[:, 0]
    normal /= jnp.maximum(jnp.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    gleam = jnp.maximum(-jnp.sum(normal * direction, axis=-1, keepdims=True), 0) ** 8
    return total, jnp.clip(stripes * (share @ PAINT) + 0.2 * gleam, 0, 1)


@dataclasses.dataclass(frozen=True)
class RadianceFit:
    """Settings of a fit; step counts and sizes are small, the rest is the authors'.

    Attributes:
        config: the field.
        steps: updates.
        rays: rays per update.
        views: training pictures, on a spiral around the scene.
        size: pixels per side of a picture.
        occupancy: cells per side of the occupancy grid (128 officially).
        step: length of a marching step.
        samples: occupied steps of a ray that count.
        update_every: updates between two updates of the occupancy grid.
        table_rate: peak learning rate of the table.
        network_rate: peak learning rate of the networks.
        weight_decay: added to the gradient as this share of the parameter.
    """

    config: RadianceConfig
    steps: int
    rays: int = 1024
    views: int = 12
    size: int = 48
    occupancy: int = 32
    step: float = 5e-3
    samples: int = 96
    update_every: int = 16
    table_rate: float = 2e-2
    network_rate: float = 1e-3
    weight_decay: float = 1e-6


@struct.dataclass
class State:
    """What changes during a fit."""

    params: Any
    optimizer: Any
    occupancy: Any


def rate_share(step: Any, steps: int) -> Array:
    """Share of the peak rate: linear from 0.01 over 100 steps, times 0.33 at 1/2, 3/4 and 9/10."""
    warm = jnp.minimum(0.01 + 0.99 * step / 100, 1.0)
    passed = sum((step >= part * steps) * 1.0 for part in (0.5, 0.75, 0.9))
    return warm * 0.33**passed


def make_rule(fit: RadianceFit, specs: Any) -> optax.GradientTransformation:
    """Adam(0.9, 0.999, 1e-15) with L2 decay, one rate for the table and one for the networks."""

    def rule(peak: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(fit.weight_decay),
            optax.scale_by_adam(0.9, 0.999, 1e-15),
            optax.scale_by_learning_rate(lambda step: peak * rate_share(step, fit.steps)),
        )

    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "table" if is_table(path_name(path)) else "networks", specs
    )
    rules: dict[Hashable, optax.GradientTransformation] = {
        "table": rule(fit.table_rate),
        "networks": rule(fit.network_rate),
    }
    return optax.multi_transform(rules, labels)


def pictures(fit: RadianceFit, turn: float = 0.0) -> tuple[Rays, Float[Array, "n 3"]]:
    """All rays of the training views, turned by an angle, and the colours that the scene has."""
    views = [
        camera_rays(turn + 2.4 * i, 0.9 * math.sin(1.3 * i), fit.size) for i in range(fit.views)
    ]
    rays = jax.tree.map(lambda *x: jnp.concatenate(x), *views)
    full = jnp.ones((2, 2, 2))
    budget = math.ceil(math.sqrt(3) / fit.step)
    render = jax.jit(lambda r: render_rays(scene, r, full, step=fit.step, samples=budget)[0].colour)
    return rays, jnp.concatenate([render(view) for view in views])


def fit_radiance(
    fit: RadianceFit, rays: Rays, colours: Float[Array, "n 3"], key: Array
) -> tuple[State, dict[str, Float[Array, " steps"]]]:
    """The state after all updates, and per update the loss and the share of steps not sampled."""
    specs = field.specs(fit.config)
    rule = make_rule(fit, specs)

    def loss(params: Any, chosen: Array, occupancy: Array, key: Array) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda x: x[chosen], rays)
        out, marched = render_rays(
            lambda x, d: field.radiance(params, fit.config, x, d),
            batch,
            occupancy,
            step=fit.step,
            samples=fit.samples,
            key=key,
        )
        total = jnp.sum(marched.dropped) + jnp.sum(marched.valid)
        dropped = jnp.sum(marched.dropped) / jnp.maximum(total, 1)
        return jnp.mean(jnp.square(out.colour - colours[chosen])), dropped

    def one(state: State, i: Array) -> tuple[State, dict[str, Array]]:
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        occupancy = jax.lax.cond(
            i % fit.update_every == 0,
            lambda o: update_occupancy(
                o, lambda x: field.density(state.params, fit.config, x), fit.step, keys[0]
            ),
            lambda o: o,
            state.occupancy,
        )
        chosen = jax.random.randint(keys[1], (fit.rays,), 0, len(colours))
        (value, dropped), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, chosen, occupancy, keys[2]
        )
        updates, optimizer = rule.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, optimizer, occupancy), {"loss": value, "dropped": dropped}

    params = init(specs, key)
    state = State(params, rule.init(params), jnp.zeros((fit.occupancy,) * 3))
    return jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(fit.steps)))(state)


def view(
    fit: RadianceFit, state: State, azimuth: float, elevation: float
) -> Float[Array, "size size 3"]:
    """A picture of the fitted field."""
    out, _ = jax.jit(
        lambda r: render_rays(
            lambda x, d: field.radiance(state.params, fit.config, x, d),
            r,
            state.occupancy,
            step=fit.step,
            samples=fit.samples,
        )
    )(camera_rays(azimuth, elevation, fit.size))
    return out.colour.reshape(fit.size, fit.size, 3)
