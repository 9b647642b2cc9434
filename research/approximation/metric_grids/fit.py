"""Fitting one signal in one compiled loop without checkpoints, for experiments and notebooks.

:mod:`research.approximation.metric_grids.task` trains the same models in the training loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from models.coordinate_fields import Field, Samples, check_domain
from models.params import init
from research.approximation.metric_grids.images import pixel_centres, psnr

Loss = Callable[[Array, Array], Array]


def mean_squared(
    values: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """Mean squared error, the loss of images and radiance."""
    return jnp.mean(jnp.square(values - target))


def relative_error(
    values: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """Mean of ``|value - target| / (|target| + 0.01)``, the loss of signed distances.

    The 0.01 is from memory of the code that the authors built on.
    """
    return jnp.mean(jnp.abs(values - target) / (jnp.abs(target) + 0.01))


def cosine_rate(step: Any, steps: int, floor: float) -> Array:
    """Share of the learning rate at a step: a cosine from 1 to ``floor`` at the last one."""
    done = step / max(steps - 1, 1)
    return floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done))


def make_fit(
    field: Field, loss: Loss, steps: int, floor: float, batches: int | None = None
) -> Callable[..., tuple[Any, Float[Array, " steps"]]]:
    """``fit(params, rate, samples, targets, key) -> (params, losses)``: Adam(0.9, 0.99, 1e-15).

    The learning rate is data, so that ``jax.vmap`` fits several at once. With ``batches`` samples
    and targets have a leading axis of so many batches, and every step draws one.
    """
    rule = optax.scale_by_adam(0.9, 0.99, 1e-15)

    def fit(
        params: Any, rate: Array, samples: Samples, targets: Array, key: Array
    ) -> tuple[Any, Array]:
        def step(carry: tuple[Any, Any], i: Array) -> tuple[tuple[Any, Any], Array]:
            params, state = carry
            at, wanted = samples, targets
            if batches is not None:
                chosen = jax.random.randint(jax.random.fold_in(key, i), (), 0, batches)
                at, wanted = jax.tree.map(lambda x: x[chosen], (samples, targets))
            # A field with a grid finds rows for drawn points here, and knows those of fixed ones.
            at = at if at.lookup is not None else field.samples(at.x)
            value, grads = jax.value_and_grad(lambda p: loss(field.apply(p, at), wanted))(params)
            updates, state = rule.update(grads, state, params)
            now = rate * cosine_rate(i, steps, floor)
            params = jax.tree.map(lambda p, u: p - now * u, params, updates)
            return (params, state), value

        (params, _), losses = jax.lax.scan(step, (params, rule.init(params)), jnp.arange(steps))
        return params, losses

    return fit


def fit_image(
    image: Float[np.ndarray, "height width channels"],
    field: Field,
    steps: int,
    key: Array,
    learning_rate: float = 1e-3,
    floor: float = 0.01,
) -> tuple[Any, float]:
    """Parameters fitted to all pixels at once, and their PSNR in dB.

    Raises:
        ValueError: a field of other dimensions or channels than the image.
    """
    check_field(field, 2, image.shape[2])
    samples = jax.jit(field.samples)(pixel_centres(*image.shape[:2]))
    targets = jnp.asarray(image, jnp.float32).reshape(-1, image.shape[2])
    fit = jax.jit(make_fit(field, mean_squared, steps, floor))
    params, _ = fit(init(field.specs(), key), jnp.float32(learning_rate), samples, targets, key)
    values = jax.jit(field.apply)(params, samples)
    return params, psnr(np.asarray(values).reshape(image.shape), np.asarray(image))


def evaluate(
    field: Field, params: Any, points: Float[np.ndarray, "n d"], chunk: int = 65_536
) -> Float[np.ndarray, "n channels"]:
    """The field's values at any number of points of its domain, chunk by chunk.

    Raises:
        ValueError: coordinates outside of [-1, 1].
    """
    check_domain(points)
    count = len(points)
    size = min(chunk, count)
    padded = np.resize(np.asarray(points, np.float32), (-(-count // size) * size, points.shape[1]))
    run = jax.jit(lambda p, x: field.apply(p, field.samples(x)))
    values = [np.asarray(run(params, x)) for x in padded.reshape(-1, size, points.shape[1])]
    return np.concatenate(values)[:count]


def check_field(field: Field, n_dims: int, channels: int) -> None:
    """Raise ValueError unless the field is of this signal's dimensions and channels."""
    if (field.n_dims, field.out_dim) != (n_dims, channels):
        raise ValueError(
            f"the field maps {field.n_dims} coordinates to {field.out_dim} channels, but the "
            f"signal needs {n_dims} and {channels}: change grid.n_dims and out_dim."
        )
