"""MetricGrids as a radiance field: density and view-dependent colour from summed features.

Source: arXiv 2503.10000 and its released code for the encoding and the density; the colour head is
that of neural rendering feature fields (NRFF): anisotropic spherical Gaussians seen in the
reflected direction. Of the head only the sizes are given by our source; how the Gaussians are
placed and evaluated is written from memory of that work and may differ from the released code.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from models.coordinate_fields import TABLE, uniform_linear
from models.layers import Linear, linear
from models.metric_grids import metric_coords
from models.params import Constant, ParamSpec
from ops.hash_grid import HashGridConfig, hashgrid_encode, hashgrid_meta

DENSITY_LIMIT = 15.0
"""Beyond this log density the gradient stops growing."""


@dataclasses.dataclass(frozen=True)
class RadianceConfig:
    """Grid on [0, 1]^3 and heads.

    Attributes:
        grid: the hash grid, shared by the three spaces, whose features are summed.
        sigma_hidden: width of the density network.
        geometry: its outputs; the first is the log density, the others exist in the original too,
            where the colour head does not read them.
        spatial_hidden: width of the two layers that give diffuse colour, tint, normal, bottleneck
            and the Gaussians' amplitudes.
        bottleneck: features handed to the directional network.
        lobes: rows and columns of the Gaussians' directions on the sphere.
        directional_hidden: width of the directional network.
        directional_layers: its hidden layers.

    Raises:
        ValueError: a grid that is not three-dimensional, or a size below 1.
    """

    grid: HashGridConfig
    sigma_hidden: int = 64
    geometry: int = 16
    spatial_hidden: int = 256
    bottleneck: int = 128
    lobes: tuple[int, ...] = (8, 16)
    directional_hidden: int = 256
    directional_layers: int = 5

    def __post_init__(self):
        if self.grid.n_dims != 3:
            raise ValueError(f"a radiance field is over 3 dimensions, got {self.grid.n_dims}.")
        sizes = (
            self.sigma_hidden, self.geometry, self.spatial_hidden, self.bottleneck, *self.lobes,
            self.directional_hidden, self.directional_layers,
        )  # fmt: skip
        if len(self.lobes) != 2 or min(sizes) < 1:
            raise ValueError("every size must be at least 1, and lobes a pair of rows and columns.")


@struct.dataclass
class Params:
    """Table, density network, and the colour head."""

    table: Any  # (rows, features)
    sigma: tuple[Linear, ...]  # no biases
    spatial: tuple[Linear, ...]
    sharpness: Any  # (lobes, 2): log of the Gaussians' two bandwidths
    directional: tuple[Linear, ...]


def specs(cfg: RadianceConfig) -> Params:
    """The abstract parameters; matrices and biases within 1/sqrt(inputs)."""
    meta, features = hashgrid_meta(cfg.grid), cfg.grid.n_features
    e, lobes = cfg.grid.n_levels * features, math.prod(cfg.lobes)

    def network(sizes: list[int], bias: bool = True) -> tuple[Linear, ...]:
        pairs = itertools.pairwise(sizes)
        return tuple(uniform_linear(i, o, i**-0.5, bias) for i, o in pairs)

    return Params(
        table=ParamSpec((meta.rows, features), (None, None), TABLE),
        sigma=network([e, cfg.sigma_hidden, cfg.geometry], bias=False),
        spatial=network([e, *[cfg.spatial_hidden] * 2, 9 + cfg.bottleneck + lobes]),
        sharpness=ParamSpec((lobes, 2), (None, None), Constant(math.log(5.0))),
        directional=network(
            [cfg.bottleneck + lobes + 1, *[cfg.directional_hidden] * cfg.directional_layers, 3]
        ),
    )


def encode(params: Params, cfg: RadianceConfig, x: Float[Array, "n 3"]) -> Float[Array, "n e"]:
    """The sum of the features at ``x``, ``sin x`` and ``cos x``, of one table."""
    return jnp.sum(hashgrid_encode(params.table, metric_coords(x, "nerf"), cfg.grid), axis=0)


@jax.custom_jvp
def bounded_exp(x: Array) -> Array:
    """exp(x), whose derivative is that at :data:`DENSITY_LIMIT` for larger ``x``."""
    return jnp.exp(x)


@bounded_exp.defjvp
def _bounded_exp_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.exp(x), dx * jnp.exp(jnp.minimum(x, DENSITY_LIMIT))


def density_of(
    params: Params, x: Float[Array, "n 3"], features: Float[Array, "n e"]
) -> Float[Array, " n"]:
    """exp(first output - 1) of the density network; 0 outside of the unit cube."""
    first, second = params.sigma
    out = linear(jax.nn.relu(linear(features, first)), second)
    inside = jnp.all((x >= 0) & (x <= 1), axis=-1)
    return jnp.where(inside, bounded_exp(out[:, 0] - 1), 0.0)


def density(params: Params, cfg: RadianceConfig, x: Float[Array, "n 3"]) -> Float[Array, " n"]:
    """Density per unit of length at points of the unit cube."""
    return density_of(params, x, encode(params, cfg, x))


def lobe_frames(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions (lobes, 3) on a grid of angles, each with two tangents, all orthonormal."""
    polar = (np.arange(rows) + 0.5) * math.pi / rows
    around = np.arange(columns) * 2 * math.pi / columns
    theta, phi = (a.reshape(-1) for a in np.meshgrid(polar, around, indexing="ij"))
    lobe = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
    tangent = np.stack(
        [np.cos(theta) * np.cos(phi), np.cos(theta) * np.sin(phi), -np.sin(theta)], -1
    )
    return lobe, tangent, np.cross(lobe, tangent)


def gaussians(
    sharpness: Float[Array, "lobes 2"], cfg: RadianceConfig, direction: Float[Array, "n 3"]
) -> Float[Array, "n lobes"]:
    """Anisotropic spherical Gaussians at unit directions, without amplitudes.

    ``max(v.z, 0) exp(-a (v.x)^2 - b (v.y)^2)`` for a lobe z with tangents x and y.
    """
    z, x, y = (direction @ jnp.asarray(f.T, direction.dtype) for f in lobe_frames(*cfg.lobes))
    a, b = jnp.exp(sharpness.T)[:, None]
    return jnp.maximum(z, 0) * jnp.exp(
        -jnp.broadcast_to(a, x.shape) * x**2 - jnp.broadcast_to(b, y.shape) * y**2
    )


def colour_of(
    params: Params,
    cfg: RadianceConfig,
    features: Float[Array, "n e"],
    direction: Float[Array, "n 3"],
) -> Float[Array, "n 3"]:
    """Red, green and blue in (0, 1) seen along unit ``direction`` (from the eye into the scene)."""
    z = features
    for layer in params.spatial[:-1]:
        z = jax.nn.gelu(linear(z, layer), approximate=False)
    parts = jnp.split(linear(z, params.spatial[-1]), np.cumsum([3, 3, 3, cfg.bottleneck]), axis=-1)
    diffuse, tint, normal, bottleneck, amplitude = parts
    normal /= jnp.sqrt(jnp.sum(normal**2, axis=-1, keepdims=True) + 1e-8)
    toward_eye = -direction
    cosine = jnp.sum(toward_eye * normal, axis=-1, keepdims=True)
    reflected = 2 * cosine * normal - toward_eye
    lit = amplitude * gaussians(params.sharpness, cfg, reflected)
    z = jnp.concatenate([bottleneck, lit, cosine], axis=-1)
    for layer in params.directional[:-1]:
        z = jax.nn.gelu(linear(z, layer), approximate=False)
    specular = linear(z, params.directional[-1])
    return jax.nn.sigmoid(diffuse + tint * specular)


def radiance(
    params: Params,
    cfg: RadianceConfig,
    x: Float[Array, "n 3"],
    direction: Float[Array, "n 3"],
) -> tuple[Float[Array, " n"], Float[Array, "n 3"]]:
    """Density and colour at points of the unit cube, seen along unit directions."""
    features = encode(params, cfg, x)
    return density_of(params, x, features), colour_of(params, cfg, features, direction)
