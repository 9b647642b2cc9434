"""Fully connected networks: the parts of an operator network, and its simplest rival."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models.layers import Linear, linear
from models.params import Constant, GlorotNormal, ParamSpec

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class FNNConfig:
    """Widths from input to output; the last layer is linear."""

    widths: tuple[int, ...]
    activation: str = "relu"

    def __post_init__(self):
        check_widths("widths", self.widths)
        check_activation(self.activation)


@struct.dataclass
class Params:
    """One :class:`models.layers.Linear` per layer."""

    layers: Any


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """Raise ValueError unless there are two or more widths, all positive."""
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            f"{name} is {widths}: give the widths from the input to the output, as (100, 40, 40)."
        )


def check_activation(name: str) -> None:
    """Raise ValueError unless the activation is known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}.")


def linear_specs(fan_in: int, fan_out: int) -> Linear:
    """Specs of a matrix by Glorot's normal rule and a bias of zeros."""
    return Linear(
        ParamSpec((fan_in, fan_out), (None, None), GlorotNormal()),
        ParamSpec((fan_out,), (None,), Constant(0.0)),
    )


def layer_specs(widths: tuple[int, ...]) -> Params:
    """Specs of the layers between consecutive widths."""
    return Params(tuple(linear_specs(*pair) for pair in itertools.pairwise(widths)))


def specs(cfg: FNNConfig) -> Params:
    """Specs of the whole network."""
    return layer_specs(cfg.widths)


def run_layers(
    layers: Any, activation: Callable[[Array], Array], x: Float[Array, "*batch inner"]
) -> Float[Array, "*batch outer"]:
    """All layers, with the activation between them and none after the last."""
    for layer in layers[:-1]:
        x = activation(linear(x, layer))
    return linear(x, layers[-1])


def forward(
    params: Params, cfg: FNNConfig, x: Float[Array, "*batch inner"]
) -> Float[Array, "*batch outer"]:
    """The network's output.

    Raises:
        ValueError: the input is not as wide as the config says.
    """
    if x.shape[-1] != cfg.widths[0]:
        raise ValueError(
            f"the network reads {cfg.widths[0]} values, got {x.shape[-1]}: "
            "give inputs of that width, or another config."
        )
    return run_layers(params.layers, ACTIVATIONS[cfg.activation], x)
