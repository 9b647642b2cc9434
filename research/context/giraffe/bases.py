"""Giraffe's bases: which angle each pair of channels turns by, and at which positions.

Frequencies are made on the host; the schemes carry them as data, so that another scale, power or
truncation runs in the same program. Source: Giraffe, arXiv 2308.10882, and xPos, arXiv 2212.10554.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from inference.policies.positions_file import read_positions
from models import decoder
from models.attention import (
    DensePolicy,
    Frequencies,
    PositionScheme,
    Rope,
    Step,
    check_default_rope,
)
from models.positions import rope_theta

Number = TypeVar("Number", int, float)

SLOW_BAND = 8
"""Pairs down to this fraction of the cutoff turn slowly when truncated; those below, not at all."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """One of the paper's ways to extend a context, or several of them together.

    Attributes:
        scale: s >= 1, every frequency is divided by it (linear scaling, position interpolation).
        power: k >= 0 of the power basis.
        truncate: N, the trained length, of the truncated basis; 0: not truncated.
        randomize: draw positions at random while training.
        xpos: let logits decay with the distance.

    Raises:
        ValueError: a scale below 1, or a negative power or truncation.
    """

    scale: float = 1.0
    power: float = 0.0
    truncate: int = 0
    randomize: bool = False
    xpos: bool = False

    def __post_init__(self):
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"scale is {self.scale}: give 1 (as trained) or more.")
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power is {self.power}: give 0 (none) or more.")
        if self.truncate < 0:
            raise ValueError(f"truncate is {self.truncate}: give the trained length, or 0 (none).")


def giraffe_inv_freq(
    dim: int, base: float, scale: float = 1.0, power: float = 0.0, truncate: int = 0
) -> np.ndarray:
    """Frequencies of the dim/2 pairs, float64 radians per position; in this order:

    1. scale: ``theta_j / s``;
    2. power: times ``(1 - 2j/dim)**k``, which keeps the fastest pair and slows the slowest most;
    3. truncate: a pair that makes a full turn within N positions is kept, one that makes at least
       an eighth of a turn becomes ``2 pi / (16 N)``, the rest become 0 and carry no position.

    Raises:
        ValueError: an odd ``dim``, or values that :class:`Basis` refuses.
    """
    Basis(scale, power, truncate)
    theta = rope_theta(dim, base) / scale
    theta = theta * (1 - np.arange(0, dim, 2) / dim) ** power
    if truncate == 0:
        return theta
    cutoff = 2 * np.pi / truncate
    slow = np.where(theta >= cutoff / SLOW_BAND, cutoff / (2 * SLOW_BAND), 0.0)
    return np.where(theta >= cutoff, theta, slow)


def positions_of_steps(steps: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Sums of the steps so far; rows that end beyond ``t`` are shrunk to end at ``t``."""
    length = steps.shape[1]
    positions = jnp.cumsum(steps, axis=1)
    return positions * jnp.minimum(1.0, length / positions[:, -1:])


def random_positions(key: Array, batch: int, length: int) -> Float[Array, "b t"]:
    """Strictly increasing positions for training, float32, with steps of 1 on average.

    Steps are uniform in (e, 2 - e), where e, two millionths of the length, is what a float32 sum
    of so many steps may be wrong by; rows are shrunk as in :func:`positions_of_steps`.
    """
    least = length * 2.0**-19
    steps = jax.random.uniform(key, (batch, length), minval=least, maxval=2 - least)
    return positions_of_steps(steps)


def xpos_zeta(dim: int) -> np.ndarray:
    """The dim/2 decay rates of xPos, below 1, slowest last."""
    return (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)


def xpos_scales(
    positions: Any, dim: int, scale_base: Any, center: Any
) -> Float[Array, "*rows t half"]:
    """``zeta_j ** ((p - center) / scale_base)``, float32: queries are multiplied, keys divided.

    Args:
        positions: ``(*rows, t)``.
        scale_base: B; may be traced.
        center: the position whose scale is 1. It cancels in the logits, and is there to keep the
            scales of both ends within the range of the dtype.
    """
    exponent = (jnp.asarray(positions).astype(jnp.float32) - center) / scale_base
    log_zeta = jnp.asarray(np.log(xpos_zeta(dim)), jnp.float32)
    return jnp.exp(exponent[..., None] * log_zeta.reshape((1,) * exponent.ndim + (-1,)))


def xpos_reach(dim: int, scale_base: float, dtype: Any = jnp.float32) -> int:
    """The longest text, centred, whose scaled queries and keys stay normal numbers of ``dtype``.

    That is, no scale is beyond the root of the smallest normal number or its inverse.
    """
    most = -0.5 * math.log(float(jnp.finfo(dtype).tiny))
    return int(2 * scale_base * most / -math.log(xpos_zeta(dim)[0]))


@struct.dataclass
class XPos:
    """The scheme of xPos: logits of distance d are those of RoPE, pair j by ``zeta_j**(d/B)``.

    A key's scale depends on its own position alone, so cached keys stay right as a text grows.
    Scales are multiplied into the float32 tables of cos and sin, so that each channel is rounded
    once. Pairs are those of split halves; the paper's are neighbours, which is the same model up to
    a fixed order of channels.
    """

    inv_freq: Any  # (rotary_dim / 2,)
    scale_base: Any  # B
    center: Any  # position whose scale is 1
    positions: Any = None  # (b, t) in place of the step's

    def rope(self, cfg: decoder.Config, step: Step, has_cache: bool) -> Rope:
        """See :class:`models.attention.PositionScheme`.

        Raises:
            ValueError: another number of frequencies than the model has pairs of channels.
        """
        plain = Frequencies(self.inv_freq, positions=self.positions).rope(cfg, step, has_cache)
        positions = step.positions if self.positions is None else self.positions
        half = xpos_scales(positions, cfg.rotary_dim, self.scale_base, self.center)
        scales = jnp.concatenate([half, half], -1)
        cos, sin = plain.q_angles
        return Rope(q_angles=(cos * scales, sin * scales), k_angles=(cos / scales, sin / scales))


def make_scheme(
    cfg: decoder.Config,
    basis: Basis,
    *,
    scale_base: Any = None,
    length: int | None = None,
    dtype: Any = jnp.float32,
    positions: Any = None,
) -> PositionScheme:
    """The scheme of a basis for a decoder.

    Args:
        scale_base: B of xPos: for a trained model the value that its training ended with.
        length: xPos only: the longest text (default: ``cfg.max_length``). Longer ones work as long
            as the scales of their last positions are numbers.
        dtype: xPos only: what attention computes in.
        positions: in place of the step's, while training.

    Raises:
        ValueError: xPos without ``scale_base``, or with one too small for the length and dtype
            (checked if it is a plain number and no array).
    """
    check_default_rope(cfg)
    inv_freq = jnp.asarray(
        giraffe_inv_freq(cfg.rotary_dim, cfg.rope_base, basis.scale, basis.power, basis.truncate),
        jnp.float32,
    )
    if not basis.xpos:
        return Frequencies(inv_freq, positions=positions)
    if scale_base is None:
        raise ValueError("xpos needs scale_base: give the value that training ended with.")
    length = cfg.max_length if length is None else length
    if isinstance(scale_base, numbers.Real):
        check_xpos(cfg.rotary_dim, float(scale_base), length, dtype)
    center = jnp.asarray(length / 2, jnp.float32)
    return XPos(inv_freq, jnp.asarray(scale_base, jnp.float32), center, positions)


def check_xpos(dim: int, scale_base: float, length: int, dtype: Any = jnp.float32) -> None:
    """Raise ValueError if xPos scales of so long a text leave the range of the dtype."""
    if not scale_base > 0:
        raise ValueError(f"scale_base is {scale_base}: give a positive number.")
    if length > (reach := xpos_reach(dim, scale_base, dtype)):
        raise ValueError(
            f"xpos with scale_base {scale_base:g} reaches {reach} tokens in "
            f"{jnp.dtype(dtype).name}, and the length is {length}: raise scale_base, shorten the "
            "text or compute in another dtype."
        )


def load_power(arguments: list[str], cfg: decoder.Config) -> DensePolicy:
    """The power basis, for ``--policy=power:K``."""
    basis = Basis(power=_parsed(float, "power", arguments[0]))
    return decoder.default_policy(cfg, make_scheme(cfg, basis))


def load_truncated(arguments: list[str], cfg: decoder.Config) -> DensePolicy:
    """The truncated basis, for ``--policy=truncated:N``."""
    basis = Basis(truncate=_parsed(int, "truncated", arguments[0]))
    return decoder.default_policy(cfg, make_scheme(cfg, basis))


def _parsed(kind: Callable[[str], Number], name: str, text: str) -> Number:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} takes a number, got {text!r}: as in power:0.5.") from error


def load_policy(arguments: list[str], cfg: decoder.Config) -> DensePolicy:
    """The basis of an exported run, for ``--policy=giraffe:DIR``.

    Raises:
        FileNotFoundError, ValueError: see :func:`inference.policies.positions_file.read_positions`,
            or a basis that does not go with the model.
    """
    facts = read_positions(arguments[0], "giraffe")
    try:
        basis, scale_base = Basis(**facts["basis"]), facts["scale_base"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{arguments[0]} tells no basis ({error}): export it again.") from error
    # While the text is read: beyond the trained length the centre stays where it was in training.
    scheme = make_scheme(cfg, basis, scale_base=scale_base, length=facts["length"])
    return decoder.default_policy(cfg, scheme)
