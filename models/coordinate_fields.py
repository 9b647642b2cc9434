"""What can represent a signal on [-1, 1]^d, behind one interface, and the two plainest.

instant-ngp: a hash grid and a small ReLU network, arXiv 2201.05989. SIREN: sines alone, arXiv
2006.09661. :mod:`models.metric_grids` has a third.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models.layers import Linear, linear
from models.params import ParamSpec, Uniform
from ops.hash_grid import HashGridConfig, hashgrid_gather, hashgrid_lookup, hashgrid_meta
from ops.sine import sine

TABLE = Uniform(-1e-4, 1e-4)
"""Initial features of a hash grid."""


@struct.dataclass
class Samples:
    """Points, and what depends on them alone: kept when the same points come again."""

    x: Any  # (*batch, d)
    lookup: Any  # Lookup of (*batch, spaces, levels, corners), or None for a field without a grid


@runtime_checkable
class Field(Protocol):
    """A signal's representation: parameters, what depends on the points alone, and values."""

    @property
    def out_dim(self) -> int:
        """Channels of the signal."""
        ...

    @property
    def n_dims(self) -> int:
        """Coordinates of a point."""
        ...

    def specs(self) -> Any:
        """The abstract parameters."""
        ...

    def samples(self, x: Float[Array, "*batch d"]) -> Samples:
        """Points with everything that does not depend on parameters."""
        ...

    def apply(self, params: Any, at: Samples) -> Float[Array, "*batch channels"]:
        """The signal at the samples."""
        ...


def uniform_linear(inner: int, outer: int, bound: float, bias: bool = True) -> Linear:
    """Specs of a linear map whose matrix and bias are uniform within ``bound``."""
    draw = Uniform(-bound, bound)
    return Linear(
        ParamSpec((inner, outer), (None, None), draw),
        ParamSpec((outer,), (None,), draw) if bias else None,
    )


def sine_specs(inner: int, hidden: int, layers: int, omega: float) -> tuple[Linear, ...]:
    """SIREN's initial values, biases too: within 1/inner, then within sqrt(6/hidden)/omega."""
    later = math.sqrt(6 / hidden) / omega
    sizes = [(inner, 1 / inner)] + [(hidden, later)] * (layers - 1)
    return tuple(uniform_linear(size, hidden, bound) for size, bound in sizes)


@struct.dataclass
class NetworkParams:
    """A table, if there is a grid, and layers."""

    table: Any  # (rows, features) or None
    layers: tuple[Linear, ...]


@dataclasses.dataclass(frozen=True)
class InstantNGP:
    """A hash grid on ``(x + 1)/2`` and a ReLU network with biases.

    Initial matrices and biases are uniform within 1/sqrt(inputs); instant-ngp's fused networks have
    no biases and other initial values.

    Attributes:
        grid: the hash grid.
        out_dim: channels of the signal.
        hidden: width of the network.
        num_layers: hidden layers and the linear one after them.
    """

    grid: HashGridConfig
    out_dim: int
    hidden: int = 64
    num_layers: int = 3

    def __post_init__(self):
        _check_layers(self.num_layers, self.hidden, self.out_dim)

    @property
    def n_dims(self) -> int:
        """See :class:`Field`."""
        return self.grid.n_dims

    def specs(self) -> NetworkParams:
        """See :class:`Field`."""
        rows, features = hashgrid_meta(self.grid).rows, self.grid.n_features
        sizes = [self.grid.n_levels * features] + [self.hidden] * (self.num_layers - 1)
        outputs = [*sizes[1:], self.out_dim]
        return NetworkParams(
            ParamSpec((rows, features), (None, None), TABLE),
            tuple(uniform_linear(i, o, i**-0.5) for i, o in zip(sizes, outputs, strict=True)),
        )

    def samples(self, x: Float[Array, "*batch d"]) -> Samples:
        """See :class:`Field`."""
        return Samples(x, hashgrid_lookup((x + 1) / 2, self.grid))

    def apply(self, params: Any, at: Samples) -> Float[Array, "*batch channels"]:
        """See :class:`Field`."""
        assert at.lookup is not None
        z = hashgrid_gather(params.table, at.lookup)
        for layer in params.layers[:-1]:
            z = jax.nn.relu(linear(z, layer))
        return linear(z, params.layers[-1])


@dataclasses.dataclass(frozen=True)
class Siren:
    """Sine layers on the coordinates, and a linear one; SIREN's initial values.

    Attributes:
        n_dims: coordinates of a point.
        out_dim: channels of the signal.
        hidden: width of the network.
        num_layers: sine layers and the linear one after them.
        omega: factor of every sine's argument.
    """

    n_dims: int
    out_dim: int
    hidden: int = 64
    num_layers: int = 5
    omega: float = 30.0

    def __post_init__(self):
        _check_layers(self.num_layers, self.hidden, self.out_dim)

    def specs(self) -> NetworkParams:
        """See :class:`Field`."""
        layers = sine_specs(self.n_dims, self.hidden, self.num_layers - 1, self.omega)
        last = uniform_linear(self.hidden, self.out_dim, math.sqrt(6 / self.hidden) / self.omega)
        return NetworkParams(None, (*layers, last))

    def samples(self, x: Float[Array, "*batch d"]) -> Samples:
        """See :class:`Field`."""
        return Samples(x, None)

    def apply(self, params: Any, at: Samples) -> Float[Array, "*batch channels"]:
        """See :class:`Field`."""
        z = at.x
        for layer in params.layers[:-1]:
            z = sine(self.omega * linear(z, layer))
        return linear(z, params.layers[-1])


def is_table(name: str) -> bool:
    """Whether the parameter of this path is a hash grid's table, the optimiser's first group."""
    return name.endswith(".table")


def check_domain(x: Any, low: float = -1.0, high: float = 1.0) -> None:
    """Raise ValueError unless all coordinates lie in [low, high], up to rounding. For the host.

    Outside a hash grid reads unrelated rows, so that values there would be arbitrary.
    """
    outside = jnp.max(jnp.abs(jnp.asarray(x) - (low + high) / 2), initial=0.0) - (high - low) / 2
    if not outside <= 1e-6:
        raise ValueError(
            f"coordinates must lie in [{low:g}, {high:g}], but one is {float(outside):g} outside: "
            "scale the points into that range first."
        )


def _check_layers(num_layers: int, hidden: int, out_dim: int) -> None:
    if num_layers < 2 or hidden < 1 or out_dim < 1:
        raise ValueError(
            "a network needs num_layers >= 2, hidden >= 1 and out_dim >= 1, got "
            f"{num_layers}, {hidden}, {out_dim}."
        )
