"""Training MetricGrids and its baselines on an image or on signed distances, one model per signal.

All data are resident on the device: the rows and weights of every pixel, or the points of all
batches. Optimiser groups are ``table`` and ``decoder``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from models.coordinate_fields import InstantNGP, Samples, Siren, is_table
from models.metric_grids import MetricGrids
from models.params import count, nbytes
from research.approximation.metric_grids import sdf
from research.approximation.metric_grids.fit import (
    check_field,
    evaluate,
    mean_squared,
    relative_error,
)
from research.approximation.metric_grids.images import load_image, pixel_centres, psnr
from research.approximation.metric_grids.shapes import Shape
from train.task import BaseTask, Context


@struct.dataclass
class Examples:
    """Samples and the signal's values there."""

    at: Samples
    targets: Any  # (rows, channels)


@dataclasses.dataclass(frozen=True)
class FieldTask(BaseTask):
    """What fitting any signal by any field has in common."""

    field: Any

    def specs(self) -> Any:
        """The field's parameters."""
        return self.field.specs()

    def group(self, name: str) -> str:
        """``table`` or ``decoder``, as the authors use an optimiser for each."""
        return "table" if is_table(name) else "decoder"

    def sizes(self, params: Any) -> dict[str, float]:
        """Parameters, and bytes as stored in float32."""
        return {"parameters": float(count(params)), "bytes": float(nbytes(params))}


def check_precision(context: Context) -> None:
    """Raise ValueError unless everything is computed in float32."""
    if context.config.compute_dtype != "float32":
        raise ValueError(
            f"config.compute_dtype is {context.config.compute_dtype}: sines of arguments times 30 "
            "need float32."
        )


@dataclasses.dataclass(frozen=True)
class ImageTask(FieldTask):
    """An image; the loss is the mean squared error.

    A step takes one random pixel of every square block, whose side is chosen so that a batch has
    about ``config.batch_size`` pixels, and the whole image if that side rounds to 1.

    Attributes:
        field: the model, with the image's channels as ``out_dim``; its kind is the subclass's.
        image: path of the image, see :func:`load_image`.
        known_rows: keep rows and weights of all pixels on the device
            (``8 * spaces * levels * 4`` bytes each) in place of computing them in every step.
    """

    image: str = ""
    known_rows: bool = True

    @functools.cached_property
    def values(self) -> Float[np.ndarray, "height width channels"]:
        """The image in [0, 1]."""
        if not self.image:
            raise ValueError("config.task.image is empty: give the path of an image.")
        return load_image(self.image)

    def resident(self, context: Context) -> Examples:
        """All pixels."""
        check_precision(context)
        height, width, channels = self.values.shape
        check_field(self.field, 2, channels)
        split = context.batch_sharding(height * width)
        x = jax.device_put(pixel_centres(height, width), split)
        at = jax.jit(self.field.samples)(x) if self.known_rows else Samples(x, None)
        targets = jax.device_put(self.values.reshape(-1, channels).astype(np.float32), split)
        return Examples(at, targets)

    def generate(self, key: jax.Array, rows: int, resident: Examples) -> Examples:
        """One pixel of every block, or all."""
        height, width, _ = self.values.shape
        block = block_side(height, width, rows)
        if block == 1:
            return resident
        chosen = stratified_pixels(key, height, width, block)
        return jax.tree.map(lambda x: x[chosen], resident)

    def loss(
        self, params: Any, batch: Examples, key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error, and its PSNR in dB."""
        at = batch.at if self.known_rows else self.field.samples(batch.at.x)
        error = mean_squared(self.field.apply(params, at), batch.targets)
        return error, {"psnr": -10 * jnp.log10(jnp.maximum(error, 1e-12))}

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """PSNR of the whole image in dB, values clipped to [0, 1]; sizes."""
        values = evaluate(self.field, params, pixel_centres(*self.values.shape[:2]))
        quality = psnr(values.reshape(self.values.shape), self.values)
        return {"psnr": quality, **self.sizes(params)}


@dataclasses.dataclass(frozen=True)
class MetricGridsImage(ImageTask):
    """MetricGrids on an image."""

    field: MetricGrids


@dataclasses.dataclass(frozen=True)
class InstantNgpImage(ImageTask):
    """instant-ngp on an image."""

    field: InstantNGP


@dataclasses.dataclass(frozen=True)
class SirenImage(ImageTask):
    """SIREN on an image."""

    field: Siren


def block_side(height: int, width: int, rows: int) -> int:
    """Side of the blocks of which about ``rows`` cover an image."""
    return max(1, round((height * width / rows) ** 0.5))


def stratified_pixels(key: jax.Array, height: int, width: int, block: int) -> Array:
    """The number of one random pixel of every block; blocks at the far edges may be smaller."""
    top, left = jnp.arange(0, height, block), jnp.arange(0, width, block)
    shape = (len(top), len(left))
    tall = jnp.broadcast_to(jnp.minimum(block, height - top)[:, None], shape)
    wide = jnp.broadcast_to(jnp.minimum(block, width - left)[None], shape)
    keys = jax.random.split(key)
    row = jax.random.randint(keys[0], shape, 0, tall) + jnp.broadcast_to(top[:, None], shape)
    column = jax.random.randint(keys[1], shape, 0, wide) + jnp.broadcast_to(left[None], shape)
    return (row * width + column).reshape(-1)


@dataclasses.dataclass(frozen=True)
class SdfTask(FieldTask):
    """Signed distances; the loss is the mean relative error.

    ``config.batch_size`` is the size of a batch; ``batches`` of them are made beforehand and every
    step draws one.

    Attributes:
        field: the model, with three coordinates and ``out_dim`` 1; its kind is the subclass's.
        shape: ``torus``, ``csg`` or an OBJ file.
        batches: batches made beforehand (1,000 in the official setting).
        resolution: points per axis of the grid on which volumes are compared (officially 1024).
    """

    shape: str = "torus"
    batches: int = 16
    resolution: int = 64

    def __post_init__(self):
        if self.batches < 1:
            raise ValueError(f"batches is {self.batches}: give at least 1.")

    @functools.cached_property
    def solid(self) -> Shape:
        """The shape."""
        return sdf.load_shape(self.shape)

    @functools.cached_property
    def target(self) -> Float[np.ndarray, " n"]:
        """Signed distances on the evaluation's grid."""
        return self.solid.distance(sdf.cube(self.resolution).astype(np.float64))

    def resident(self, context: Context) -> Examples:
        """The points of all batches, stacked."""
        check_precision(context)
        check_field(self.field, 3, 1)
        rng = np.random.default_rng(context.config.seed)
        rows = context.config.batch_size
        points, values = sdf.training_points(self.solid, self.batches, rows, rng)
        split = context.batch_sharding(rows, leading=1)
        return Examples(Samples(jax.device_put(points, split), None), jax.device_put(values, split))

    def generate(self, key: jax.Array, rows: int, resident: Examples) -> Examples:
        """One of the batches."""
        chosen = jax.random.randint(key, (), 0, self.batches)
        return jax.tree.map(lambda x: x[chosen], resident)

    def loss(
        self, params: Any, batch: Examples, key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean relative error, and the mean absolute one."""
        values = self.field.apply(params, self.field.samples(batch.at.x))
        absolute = jnp.mean(jnp.abs(values - batch.targets))
        return relative_error(values, batch.targets), {"absolute": absolute}

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """Volume overlap on a grid with corners at -1 and 1, mean errors on fresh points; sizes."""
        values = evaluate(self.field, params, sdf.cube(self.resolution))[:, 0]
        rng = np.random.default_rng(context.config.seed + 1)
        points, wanted = sdf.training_points(self.solid, 1, 8192, rng)
        fresh = evaluate(self.field, params, points[0])
        return {
            "iou": sdf.overlap(values < 0, self.target < 0),
            "relative_error": float(relative_error(jnp.asarray(fresh), jnp.asarray(wanted[0]))),
            "absolute_error": float(np.abs(fresh - wanted[0]).mean()),
            **self.sizes(params),
        }


@dataclasses.dataclass(frozen=True)
class MetricGridsSdf(SdfTask):
    """MetricGrids on signed distances."""

    field: MetricGrids


@dataclasses.dataclass(frozen=True)
class InstantNgpSdf(SdfTask):
    """instant-ngp on signed distances."""

    field: InstantNGP
