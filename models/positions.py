"""Rotary position schemes: a registry of frequency transforms, and the rotation itself.

Every scheme is a pure function ``(cfg, dim, base, length) -> (inv_freq, attention_factor)``;
methods add theirs with :func:`register_rope_type`. Notation of this file: ``dim`` rotary width
(even), ``L`` the trained context, ``s`` the scaling factor, ``theta_j = base**(-2j/dim)``.

Sources: position interpolation arXiv 2306.15595; NTK-aware scaling (community, 2023); YaRN
arXiv 2309.00071; the Llama 3.1 release; LongRoPE arXiv 2402.13753; RIFLEx arXiv 2502.15894.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Length = Any
"""None, a Python int, or a traced scalar or per-row array of current lengths."""

RopeFunction = Callable[["RopeScaling", int, float, Length], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Static settings of a rotary scheme; fields that a scheme does not use are ignored.

    ``original_max_position`` is the trained context L; ``factor`` the ratio s of target to trained
    length. ``short_factor`` and ``long_factor`` are LongRoPE's tables of ``dim/2`` numbers.
    ``attention_factor`` overrides the scheme's own. ``truncate`` is YaRN's floor and ceil switch.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    truncate: bool = True


_REGISTRY: dict[str, RopeFunction] = {}


def register_rope_type(name: str, function: RopeFunction) -> None:
    """Add a scheme under ``name``; parameters of its own are bound in ``function`` by closure.

    Raises:
        ValueError: the name is taken by another function.
    """
    if _REGISTRY.get(name, function) is not function:
        raise ValueError(f"rope type {name!r} is already registered: choose another name.")
    _REGISTRY[name] = function


def rope_types() -> list[str]:
    """Names of all registered schemes."""
    return sorted(_REGISTRY)


def rope_frequencies(
    cfg: RopeScaling, dim: int, base: float, length: Length = None
) -> tuple[Float[Array, "*rows half"], Float[Array, ""]]:
    """Inverse frequencies (radians per position) and the factor on cos and sin, both float32.

    Args:
        cfg: the scheme and its settings.
        dim: rotary width, the part of the head that is rotated.
        base: rope theta.
        length: current true (unpadded) length, used by ``dynamic`` and ``longrope``; may be
            traced, and one per row, which gives one row of frequencies per row.

    Raises:
        ValueError: unknown scheme, odd ``dim``, or a setting the scheme needs is missing.
    """
    if dim % 2:
        raise ValueError(f"rotary width must be even, got {dim}.")
    if cfg.rope_type not in _REGISTRY:
        raise ValueError(
            f"unknown rope type {cfg.rope_type!r}: known are {', '.join(rope_types())}."
        )
    inv_freq, factor = _REGISTRY[cfg.rope_type](cfg, dim, base, length)
    if cfg.attention_factor is not None:
        factor = cfg.attention_factor
    return jnp.asarray(inv_freq, jnp.float32), jnp.asarray(factor, jnp.float32)


def rope_theta(dim: int, base: float) -> np.ndarray:
    """The dim/2 default inverse frequencies ``base**(-2j/dim)``, float64 on the host.

    Raises:
        ValueError: ``dim`` is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"rotary width must be even, got {dim}.")
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _trained_length(cfg: RopeScaling) -> int:
    if not cfg.original_max_position:
        raise ValueError(
            f"rope type {cfg.rope_type!r} needs original_max_position, the trained context length."
        )
    return cfg.original_max_position


def _default(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    return rope_theta(dim, base), 1.0


def _linear(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    return rope_theta(dim, base) / cfg.factor, 1.0


def ntk_base(base: float, scale: Any, dim: int) -> Any:
    """The NTK-aware base: the last of the dim/2 frequencies is divided by exactly ``scale``."""
    return base * scale ** (dim / (dim - 2))


def _ntk(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    return rope_theta(dim, ntk_base(base, cfg.factor, dim)), 1.0


def _dynamic(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    trained = _trained_length(cfg)
    if length is None or isinstance(length, int):
        n = max(length or trained, trained)
        return rope_theta(
            dim, ntk_base(base, cfg.factor * n / trained - (cfg.factor - 1), dim)
        ), 1.0
    n = jnp.maximum(jnp.asarray(length, jnp.float32), trained)[..., None]
    scale = cfg.factor * n / trained - (cfg.factor - 1)
    # theta_j * scale**(-2j/(dim-2)): the changed base to the same exponent, kept apart so that a
    # length within the trained one gives the default frequencies exactly.
    exponents = np.arange(0, dim, 2, dtype=np.float64) / (dim - 2)
    theta = jnp.asarray(rope_theta(dim, base), jnp.float32)
    shape = (1,) * (scale.ndim - 1) + (dim // 2,)
    return theta.reshape(shape) * scale ** jnp.asarray(-exponents, jnp.float32).reshape(shape), 1.0


def _yarn_temperature(scale: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0


def _yarn(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    trained = _trained_length(cfg)

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = pair_with_turns(cfg.beta_fast), pair_with_turns(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper clip is dim - 1, not dim/2 - 1, as in every released implementation.
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    theta = rope_theta(dim, base)
    if cfg.mscale and cfg.mscale_all_dim:
        factor = _yarn_temperature(cfg.factor, cfg.mscale) / _yarn_temperature(
            cfg.factor, cfg.mscale_all_dim
        )
    else:
        factor = _yarn_temperature(cfg.factor)
    return theta * (1 - ramp) + theta / cfg.factor * ramp, factor


def _llama3(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    trained = _trained_length(cfg)
    theta = rope_theta(dim, base)
    wavelength = 2 * np.pi / theta
    low, high = cfg.low_freq_factor, cfg.high_freq_factor
    weight = (trained / wavelength - low) / (high - low)
    mixed = (1 - weight) * theta / cfg.factor + weight * theta
    slow = wavelength > trained / low
    fast = wavelength < trained / high
    return np.where(fast, theta, np.where(slow, theta / cfg.factor, mixed)), 1.0


def _longrope(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
    trained = _trained_length(cfg)
    if cfg.short_factor is None or cfg.long_factor is None:
        raise ValueError("rope type 'longrope' needs short_factor and long_factor tables.")
    for name, table in (("short_factor", cfg.short_factor), ("long_factor", cfg.long_factor)):
        if len(table) != dim // 2:
            raise ValueError(
                f"longrope's {name} has {len(table)} entries but the rotary width "
                f"{dim} needs {dim // 2}."
            )
    theta = rope_theta(dim, base)
    short, long = theta / np.asarray(cfg.short_factor), theta / np.asarray(cfg.long_factor)
    factor = math.sqrt(1 + math.log(cfg.factor) / math.log(trained)) if cfg.factor > 1 else 1.0
    if length is None or isinstance(length, int):
        return (long if length is not None and length > trained else short), factor
    is_long = jnp.asarray(length)[..., None] > trained
    shape = (1,) * (is_long.ndim - 1) + (dim // 2,)
    short, long = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (short, long))
    return jnp.where(is_long, long, short), factor


def riflex(period_pair: int, test_length: int) -> RopeFunction:
    """RIFLEx: only the pair that repeats within ``test_length`` is slowed, to 0.9 of one turn.

    Args:
        period_pair: k, counted from 1: the pair whose period is nearest to the repetition seen.
        test_length: the length to reach.
    """

    def function(cfg: RopeScaling, dim: int, base: float, length: Length) -> tuple[Any, Any]:
        theta = rope_theta(dim, base)
        if test_length > 2 * np.pi / theta[period_pair - 1]:
            theta[period_pair - 1] = 0.9 * 2 * np.pi / test_length
        return theta, 1.0

    return function


for _name, _function in {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}.items():
    register_rope_type(_name, _function)


def rope_angles(
    positions: Any,
    inv_freq: Float[Array, "..."],
    attention_factor: Any = 1.0,
    interleaved: bool = False,
) -> tuple[Float[Array, "*rows t dim"], Float[Array, "*rows t dim"]]:
    """Tables of cos and sin, float32, with the attention factor multiplied in.

    Args:
        positions: ``(*rows, t)``, integers or reals. The product with the frequency is float32:
            about 6e-8 of the angle is lost, 0.06 rad at a position of 1e6.
        inv_freq: ``(half,)``, or ``(*rows, half)`` for frequencies per row.
        attention_factor: multiplies both tables, so logits get its square.
        interleaved: repeat each angle (pairs 2j, 2j+1) instead of concatenating two halves.
    """
    positions = jnp.asarray(positions).astype(jnp.float32)[..., None]
    if inv_freq.ndim == 1:
        inv_freq = inv_freq.reshape((1,) * (positions.ndim - 1) + (-1,))
    else:
        inv_freq = inv_freq[..., None, :]
    angles = positions * inv_freq
    angles = jnp.repeat(angles, 2, -1) if interleaved else jnp.concatenate([angles, angles], -1)
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(
    x: Float[Array, "*rows t heads width"],
    cos: Float[Array, "*#rows t dim"],
    sin: Float[Array, "*#rows t dim"],
    interleaved: bool = False,
) -> Float[Array, "*rows t heads width"]:
    """Rotate the first ``dim`` channels of every head; the rest pass through (partial rotary).

    The rotation is computed in float32 and returned in the dtype of ``x``.
    """
    dim = cos.shape[-1]
    rotary = x[..., :dim].astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    lead = (1,) * (rotary.ndim - cos.ndim)
    cos, sin = cos.reshape(lead + cos.shape), sin.reshape(lead + sin.shape)
    if interleaved:
        pairs = rotary.reshape(*rotary.shape[:-1], dim // 2, 2)
        turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(rotary.shape)
    else:
        first, second = jnp.split(rotary, 2, -1)
        turned = jnp.concatenate([-second, first], -1)
    rotated = (rotary * cos + turned * sin).astype(x.dtype)
    return rotated if dim == x.shape[-1] else jnp.concatenate([rotated, x[..., dim:]], -1)


def within_documents(
    drawn: Float[Array, "b t"], positions: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Drawn positions of whole rows, counted from the start of each token's document.

    ``positions`` are those in the documents: 0, 1, ... from the start of each.
    """
    first = jnp.arange(positions.shape[1])[None] - positions
    return drawn - jnp.take_along_axis(drawn, jnp.maximum(first, 0), axis=1)
