"""MetricGrids: one hash grid read at three nonlinear maps of a point, and a modulated sine decoder.

Source: arXiv 2503.10000 and its released code. A point's features are those of the same table at
three metric coordinates; the decoder multiplies their sum by sines of each, which makes terms of
higher order. Radiance fields use the features alone, see :mod:`models.radiance`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models.coordinate_fields import TABLE, Samples, sine_specs, uniform_linear
from models.layers import Linear, linear
from models.params import ParamSpec
from ops.hash_grid import HashGridConfig, Lookup, hashgrid_gather, hashgrid_lookup, hashgrid_meta
from ops.sine import sine

KINDS = ("image", "nerf")


@dataclasses.dataclass(frozen=True)
class MetricGrids:
    """Grid and decoder of one signal on [-1, 1]^d: an image or signed distances.

    Attributes:
        grid: the hash grid of all spaces.
        out_dim: channels of the signal.
        hidden: width of the sine layers.
        num_layers: sine layers and the linear one after them. Sine layers beyond ``spaces`` + 1
            are modulated by the last space again and raise the order further.
        spaces: metric spaces, 1 to 3; 1 is a plain grid under the same decoder.
        modulate: whether sine layers are multiplied by squared modulators; without, the decoder is
            a SIREN on the summed features.
        separate_tables: tables of 2^log2_size, half and a quarter of the rows for the three spaces,
            as the paper words it, in place of one table for all, as the released code does.
        omega: factor of every sine's argument.

    Raises:
        ValueError: a setting out of its range.
    """

    grid: HashGridConfig
    out_dim: int
    hidden: int = 64
    num_layers: int = 5
    spaces: int = 3
    modulate: bool = True
    separate_tables: bool = False
    omega: float = 30.0

    def __post_init__(self):
        if not 1 <= self.spaces <= 3:
            raise ValueError(f"there are 1 to 3 metric spaces, got spaces={self.spaces}.")
        if self.num_layers < 2 or self.hidden < 1 or self.out_dim < 1:
            raise ValueError(
                "the decoder needs num_layers >= 2, hidden >= 1 and out_dim >= 1, got "
                f"{self.num_layers}, {self.hidden}, {self.out_dim}."
            )
        if self.separate_tables and self.grid.log2_size - self.spaces < 2:
            raise ValueError(
                f"separate tables halve 2^{self.grid.log2_size} rows: raise grid.log2_size."
            )

    @property
    def n_dims(self) -> int:
        """Coordinates of a point."""
        return self.grid.n_dims

    @property
    def features(self) -> int:
        """Features of a point in one space."""
        return self.grid.n_levels * self.grid.n_features

    def specs(self) -> "Params":
        """See :func:`specs`; this and the next two make it a ``coordinate_fields.Field``."""
        return specs(self)

    def samples(self, x: Float[Array, "*batch d"]) -> Samples:
        """See :func:`samples`."""
        return samples(x, self)

    def apply(self, params: Any, at: Samples) -> Float[Array, "*batch channels"]:
        """See :func:`apply`."""
        return apply(params, self, at)


@struct.dataclass
class Params:
    """One table of all levels (and of all spaces, if separate), and the decoder."""

    table: Any  # (rows, features)
    sine: tuple[Linear, ...]
    modulators: tuple[Linear, ...]  # empty without modulation
    out: Linear


def grids(cfg: MetricGrids) -> tuple[HashGridConfig, ...]:
    """The grid of each space: the same, or ever smaller ones."""
    if not cfg.separate_tables:
        return (cfg.grid,) * cfg.spaces
    sizes = [cfg.grid.log2_size - k for k in range(cfg.spaces)]
    return tuple(dataclasses.replace(cfg.grid, log2_size=size) for size in sizes)


def table_rows(cfg: MetricGrids) -> int:
    """Rows of the table of :class:`Params`."""
    each = [hashgrid_meta(grid).rows for grid in grids(cfg)]
    return sum(each) if cfg.separate_tables else each[0]


def specs(cfg: MetricGrids) -> Params:
    """The abstract parameters, with the released code's initial values.

    The modulators' are those of a plain linear layer, within 1/sqrt(inputs), and not SIREN's.
    """
    layers, d, e, h = cfg.num_layers - 1, cfg.grid.n_dims, cfg.features, cfg.hidden
    inputs = [d] + [e] * (layers - 1) if cfg.modulate else []
    return Params(
        table=ParamSpec((table_rows(cfg), cfg.grid.n_features), (None, None), TABLE),
        sine=sine_specs(e, h, layers, cfg.omega),
        modulators=tuple(uniform_linear(n, h, n**-0.5) for n in inputs),
        out=uniform_linear(h, cfg.out_dim, math.sqrt(6 / h) / cfg.omega),
    )


def metric_coords(
    x: Float[Array, "*batch d"], kind: str = "image", spaces: int = 3
) -> Float[Array, "spaces *batch d"]:
    """The point under each metric map; all are monotone in every coordinate.

    Image and signed distances, x in [-1, 1]: ``(x + 1)/2`` in [0, 1], ``(sin x - sin 1)/(2 sin 1)``
    in [-1, 0], ``(arcsin x - 3 pi/2)/(2 pi)`` in [-1, -1/2]. Radiance fields, x in [0, 1]: ``x,
    sin x, cos x``. The last two ranges of an image overlap, so both spaces share rows of the table
    there, as in the released code. ``x`` beyond [-1, 1] by rounding is clipped for the arcsine,
    whose derivative is that at 1 - 1e-6 from there on.

    Raises:
        ValueError: an unknown kind, or not 1 to 3 spaces.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}.")
    if not 1 <= spaces <= 3:
        raise ValueError(f"there are 1 to 3 metric spaces, got spaces={spaces}.")
    if kind == "nerf":
        maps = (lambda x: x, jnp.sin, jnp.cos)
    else:
        maps = (
            lambda x: (x + 1) / 2,
            lambda x: (jnp.sin(x) - math.sin(1)) / (2 * math.sin(1)),
            lambda x: (_arcsin(x) - 1.5 * math.pi) / (2 * math.pi),
        )
    return jnp.stack([f(x) for f in maps[:spaces]])


@jax.custom_jvp
def _arcsin(x: Array) -> Array:
    return jnp.arcsin(jnp.clip(x, -1.0, 1.0))


@_arcsin.defjvp
def _arcsin_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    inside = jnp.clip(x, -1 + 1e-6, 1 - 1e-6)
    return _arcsin(x), dx / jnp.sqrt((1 - inside) * (1 + inside))


def samples(x: Float[Array, "*batch d"], cfg: MetricGrids) -> Samples:
    """Points with the rows and weights of all spaces; for a fixed set this is made once."""
    coords = metric_coords(x, "image", cfg.spaces)
    start, index, weights = 0, [], []
    for space, grid in enumerate(grids(cfg)):
        lookup = hashgrid_lookup(coords[space], grid)
        index.append(lookup.index + start)
        weights.append(lookup.weights)
        if cfg.separate_tables:
            start += hashgrid_meta(grid).rows
    return Samples(x, Lookup(jnp.stack(index, axis=-3), jnp.stack(weights, axis=-3)))


def hidden(
    params: Params,
    cfg: MetricGrids,
    x: Float[Array, "*batch d"],
    features: Float[Array, "*batch spaces e"],
) -> Float[Array, "*batch hidden"]:
    """The last sine layer: every layer's sine times the squared sine of its modulator.

    The first modulator reads ``(x + 1)/2``, each later one the features of the next space, and of
    the last space when there are no more.
    """
    z = jnp.sum(features, axis=-2)
    for i, layer in enumerate(params.sine):
        z = sine(cfg.omega * linear(z, layer))
        if cfg.modulate:
            source = (x + 1) / 2 if i == 0 else features[..., min(i - 1, cfg.spaces - 1), :]
            z *= jnp.square(sine(cfg.omega * linear(source, params.modulators[i])))
    return z


def apply(params: Params, cfg: MetricGrids, at: Samples) -> Float[Array, "*batch channels"]:
    """The signal at points whose lookup is known."""
    assert at.lookup is not None
    features = hashgrid_gather(params.table, at.lookup)
    return linear(hidden(params, cfg, at.x, features), params.out)


def forward(
    params: Params, cfg: MetricGrids, x: Float[Array, "*batch d"]
) -> Float[Array, "*batch channels"]:
    """The signal at points of [-1, 1]^d."""
    return apply(params, cfg, samples(x, cfg))
