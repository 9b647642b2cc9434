"""CLEX: rotary frequencies as the solution of a neural ODE over the length-scaling factor.

The state is the logarithm of the D/2 inverse frequencies, from those of plain RoPE at t = 1. Its
slope is that of dynamic NTK scaling plus a small network that starts at zero. One such ODE serves
all layers and heads. Source: CLEX, arXiv 2310.16450; the solver is the 3/8 rule that the released
code uses. Departures: the field is built with the model's own base (the released code has 10000
there, whatever the model), and a largest factor of 2 works.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from models.params import Constant, ParamSpec, Uniform
from models.positions import rope_theta
from ops.weights import Weight

ACTIVATIONS = {"tanh": jnp.tanh, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class CLEXConfig:
    """Settings of the ODE; hashable.

    Attributes:
        head_dim: D, channels of a head that are rotated.
        base: rope theta of the model.
        max_position: L, the context that the model was trained with.
        max_factor: the largest t; texts reach ``L * max_factor``.
        param_factor: width of the network in units of D.
        activation: ``tanh`` or ``silu``.
        time_dt: step of the solver.
        log_scale: multiply queries by ``ln(n) / ln(L)`` for a text of n tokens.
        continuous: draw real t in training instead of whole ones.

    Raises:
        ValueError: a value out of range.
    """

    head_dim: int
    base: float
    max_position: int
    max_factor: int = 16
    param_factor: float = 1.0
    activation: str = "tanh"
    time_dt: float = 0.01
    log_scale: bool = False
    continuous: bool = False

    def __post_init__(self):
        if self.head_dim % 2 or self.head_dim < 4:
            raise ValueError(f"head_dim is {self.head_dim}: CLEX needs an even width of 4 or more.")
        if self.max_factor < 2:
            raise ValueError(
                f"max_factor is {self.max_factor}: give 2 or more (1 is the model as it is)."
            )
        if self.max_position < 2:
            raise ValueError(f"max_position is {self.max_position}: give the trained context.")
        if self.width < 1:
            raise ValueError(f"param_factor {self.param_factor} leaves no hidden unit: raise it.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: use one of {', '.join(ACTIVATIONS)}."
            )
        if not 0 < self.time_dt <= 1:
            raise ValueError(f"time_dt is {self.time_dt}: give a step above 0, of at most 1.")

    @property
    def width(self) -> int:
        """Hidden units of the network."""
        return int(self.param_factor * self.head_dim)

    @property
    def max_length(self) -> int:
        """The longest text that a factor is made for."""
        return self.max_position * self.max_factor


@struct.dataclass
class CLEXParams:
    """The two matrices of the network; no biases."""

    w_up: Weight  # (D/2, width)
    w_down: Weight  # (width, D/2)


def specs(cfg: CLEXConfig) -> CLEXParams:
    """The abstract parameters: Kaiming-uniform (a = sqrt 5) and zeros, so that NTK is the start.

    The fan of the first is the length of its rows, as torch counts it for a matrix of this shape.
    """
    half, bound = cfg.head_dim // 2, cfg.width**-0.5
    return CLEXParams(
        w_up=ParamSpec((half, cfg.width), (None, None), Uniform(-bound, bound)),
        w_down=ParamSpec((cfg.width, half), (None, None), Constant(0.0)),
    )


def field(
    params: CLEXParams, cfg: CLEXConfig, t: Any, z: Float[Array, " half"]
) -> Float[Array, " half"]:
    """dz/dt at (t, z), in the dtype of ``z``.

    ``act((z + n(t)) W_up) W_down + n'(t)`` where ``n_j(t) = log theta_j - i/(D-2) log(2t - 1)``
    with i = 2j are the logarithms of dynamic NTK's frequencies.
    """
    share = jnp.asarray(np.arange(0, cfg.head_dim, 2) / (cfg.head_dim - 2), z.dtype)
    log_theta = jnp.asarray(np.log(rope_theta(cfg.head_dim, cfg.base)), z.dtype)
    alpha = jnp.where(t >= 1, 2 * t - 1, 1).astype(z.dtype)
    ntk, slope = log_theta - share * jnp.log(alpha), -2 * share / alpha
    w_up, w_down = params.w_up.astype(z.dtype), params.w_down.astype(z.dtype)
    hidden = jnp.dot(z + ntk, w_up, precision="highest")
    return jnp.dot(ACTIVATIONS[cfg.activation](hidden), w_down, precision="highest") + slope


def nodes(cfg: CLEXConfig, stop: float | None = None) -> np.ndarray:
    """Times of the solver: 1, 1 + h, ... and ``stop`` (default: the largest factor), float64.

    The last step is what is left; less than a thousandth of a step joins the one before.
    """
    stop = float(cfg.max_factor) if stop is None else stop
    count = max(1, math.ceil((stop - 1) / cfg.time_dt - 1e-3))
    times = 1 + cfg.time_dt * np.arange(count + 1)
    times[-1] = stop
    return times


def integrate(
    params: CLEXParams, cfg: CLEXConfig, z: Float[Array, " half"], times: np.ndarray
) -> Float[Array, "times half"]:
    """States at all ``times``, the first of which is ``z``, by the 3/8 rule of order 4.

    Differentiable through the steps; each is computed again in the backward pass.
    """

    def step(z: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        t, h = now
        k1 = field(params, cfg, t, z)
        k2 = field(params, cfg, t + h / 3, z + h * k1 / 3)
        k3 = field(params, cfg, t + 2 * h / 3, z + h * (k2 - k1 / 3))
        k4 = field(params, cfg, t + h, z + h * (k1 - k2 + k3))
        z = z + h * (k1 + 3 * (k2 + k3) + k4) / 8
        return z, z

    steps = (jnp.asarray(times[:-1], z.dtype), jnp.asarray(np.diff(times), z.dtype))
    _, rest = jax.lax.scan(jax.checkpoint(step), z, steps)
    return jnp.concatenate([z[None], rest])


def frequencies(
    params: CLEXParams, cfg: CLEXConfig, times: Any, stop: float | None = None
) -> Float[Array, "n half"]:
    """Inverse frequencies at the factors ``times`` (n,), which may be real and traced.

    One solution serves all of them; between its nodes the logarithms are interpolated linearly. At
    1 they are plain RoPE's to the bit. Computed in float32, or in float64 with such parameters.

    Args:
        times: clipped to 1 .. ``stop``.
        stop: where the solver ends (default: the largest factor).
    """
    dtype = jnp.promote_types(params.w_up.dtype, jnp.float32)
    theta = rope_theta(cfg.head_dim, cfg.base)
    grid = nodes(cfg, stop)
    path = integrate(params, cfg, jnp.asarray(np.log(theta), dtype), grid)
    t = jnp.clip(jnp.asarray(times, dtype), 1.0, grid[-1])
    at = jnp.clip(jnp.floor((t - 1) / cfg.time_dt).astype(jnp.int32), 0, len(grid) - 2)
    first, width = jnp.asarray(grid[:-1], dtype)[at], jnp.asarray(np.diff(grid), dtype)[at]
    share = ((t - first) / width)[:, None]
    z = path[at] * (1 - share) + path[at + 1] * share
    return jnp.where((t == 1)[:, None], jnp.asarray(theta, dtype)[None], jnp.exp(z))


def frequencies_at(
    params: CLEXParams, cfg: CLEXConfig, t: Float[Array, ""]
) -> Float[Array, " half"]:
    """Inverse frequencies at one factor; at 1 those of plain RoPE, without solving anything."""
    dtype = jnp.promote_types(params.w_up.dtype, jnp.float32)
    theta = jnp.asarray(rope_theta(cfg.head_dim, cfg.base), dtype)
    return jax.lax.cond(t == 1, lambda p: theta, lambda p: frequencies(p, cfg, t[None])[0], params)


def table(params: CLEXParams, cfg: CLEXConfig) -> Float[Array, "factors half"]:
    """Inverse frequencies at 1, 2, ... ``max_factor``: what decoding needs, computed once."""
    return frequencies(params, cfg, jnp.arange(1, cfg.max_factor + 1, dtype=jnp.float32))


def factor(length: Any, cfg: CLEXConfig) -> Any:
    """The factor t of a text of so many tokens: ``ceil(length / L)``, from 1 to ``max_factor``.

    Args:
        length: a Python int, or an array of lengths, which may be traced.

    Returns:
        An int for an int, else int32. In arrays, lengths beyond ``L * max_factor`` get the largest
        factor: positions go on, under the frequencies of the longest text that there are any for.

    Raises:
        ValueError: an int below 1 or beyond ``L * max_factor``.
    """
    if isinstance(length, int):
        check_length(length, cfg)
        return -(-length // cfg.max_position)
    t = -(-jnp.asarray(length).astype(jnp.int32) // cfg.max_position)
    return jnp.clip(t, 1, cfg.max_factor)


def check_length(length: int, cfg: CLEXConfig) -> None:
    """Raise ValueError unless a text of so many tokens has a factor."""
    if not 1 <= length <= cfg.max_length:
        raise ValueError(
            f"a text of {length} tokens is not within 1 .. {cfg.max_length}, the trained context "
            f"of {cfg.max_position} times max_factor {cfg.max_factor}: shorten it, or train with "
            "a larger max_factor."
        )


def length_scale(length: Any, cfg: CLEXConfig) -> Any:
    """What ``log_scale`` multiplies queries by: ``ln(length) / ln(L)``, also below L."""
    return jnp.log(jnp.asarray(length, jnp.float32)) / math.log(cfg.max_position)


def draw_factor(key: Array, cfg: CLEXConfig) -> Float[Array, ""]:
    """The t of one forward pass in training, float32: 1, 2, ... ``max_factor``, or any real one."""
    if cfg.continuous:
        return jax.random.uniform(key, (), minval=1.0, maxval=float(cfg.max_factor))
    return jax.random.randint(key, (), 1, cfg.max_factor + 1).astype(jnp.float32)


def train_positions(
    key: Array, length: int, t: Float[Array, ""], cfg: CLEXConfig
) -> Float[Array, " length"]:
    """Positions of a training row: a sorted sample of a window t times as long as the row.

    The sample is drawn without replacement, with t traced: the largest of one random number per
    candidate. For t = 1 and rows of at most L these are 0, 1, 2, ...

    Raises:
        ValueError: rows of fewer than 2 tokens.
    """
    if length < 2:
        raise ValueError(f"CLEX draws positions for rows of at least 2 tokens, not {length}.")
    candidates = jnp.arange(length * cfg.max_factor - 2)
    draws = jax.random.uniform(key, candidates.shape)
    draws = jnp.where(candidates < _window(length, t) - 2, draws, -1.0)
    _, sample = jax.lax.top_k(draws, length - 2)
    return pin_positions(jnp.sort(sample), length, t, cfg)


def pin_positions(
    sample: Int[Array, " inner"], length: int, t: Any, cfg: CLEXConfig
) -> Float[Array, " length"]:
    """``[0, (sample + 1)/c, length*t // c - 1]`` with c = length // L, at least 1.

    Rows longer than L are squeezed, so that the window is that of t trained contexts.
    """
    c = max(1, length // cfg.max_position)
    inner = (sample.astype(jnp.float32) + 1) / c
    last = (_window(length, t) // c - 1).astype(jnp.float32)
    return jnp.concatenate([jnp.zeros(1), inner, last[None]])


def _window(length: int, t: Any) -> Int[Array, ""]:
    return jnp.floor(length * jnp.asarray(t, jnp.float32)).astype(jnp.int32)
