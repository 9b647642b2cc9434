"""CLEX's rotations: the factor of each row's length in inference, a drawn one in training.

Source: arXiv 2310.16450. The ODE itself is in :mod:`models.clex`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from inference.policies.positions_file import read_positions
from models import clex, decoder
from models.attention import DensePolicy, Rope, Step, check_default_rope
from models.params import validate
from models.positions import rope_angles, within_documents

MATRICES = ("w_up", "w_down")


@struct.dataclass
class CLEX:
    """The scheme of inference: row b is rotated by the frequencies of its factor t(n_b).

    n is the row's text length: ``step.lengths``, which while generating is the final length of the
    request, or else the last position and 1. Keys are cached raw and all rotated at each step, so
    that they agree with the queries whatever t is. Lengths beyond the largest factor get its
    frequencies, at positions that go on; an engine refuses them by :attr:`max_length`.
    """

    table: Any  # (max_factor, rotary_dim / 2): frequencies at t = 1, 2, ...
    cfg: clex.CLEXConfig = struct.field(pytree_node=False)

    @property
    def max_length(self) -> int:
        """The longest text that there are frequencies for."""
        return self.cfg.max_length

    def rope(self, cfg: decoder.Config, step: Step, has_cache: bool) -> Rope:
        """See :class:`models.attention.PositionScheme`.

        Raises:
            ValueError: the ODE is of another model.
        """
        check_model(cfg, self.cfg)
        lengths = step.lengths
        if lengths is None:
            lengths = jnp.ceil(jnp.max(step.positions, axis=1)) + 1
        inv_freq = self.table[clex.factor(lengths, self.cfg) - 1]
        q_angles = rope_angles(step.positions, inv_freq)
        q_scale = None
        if self.cfg.log_scale:
            q_scale = clex.length_scale(lengths, self.cfg)[:, None, None, None]
        if not has_cache:
            return Rope(q_angles, q_angles, q_scale)
        slots = step.slot_positions[:, : step.extent]
        k_angles = rope_angles(slots, inv_freq)
        return Rope(q_angles, k_angles, q_scale, rotate_cached_keys=True)


@struct.dataclass
class CLEXDraw:
    """The scheme of one training pass: one factor and its positions for all rows and layers."""

    inv_freq: Any  # (rotary_dim / 2,)
    positions: Any  # (b, t)
    q_scale: Any = None  # scalar

    def rope(self, cfg: decoder.Config, step: Step, has_cache: bool) -> Rope:
        """See :class:`models.attention.PositionScheme`."""
        angles = rope_angles(self.positions, self.inv_freq)
        q_scale = None if self.q_scale is None else self.q_scale.reshape(1, 1, 1, 1)
        return Rope(angles, angles, q_scale)


def make_scheme(params: clex.CLEXParams, cfg: clex.CLEXConfig) -> CLEX:
    """The scheme of trained parameters; solves the ODE once, for all factors."""
    return CLEX(jax.jit(clex.table, static_argnums=1)(params, cfg), cfg)


def draw_scheme(
    params: clex.CLEXParams, cfg: clex.CLEXConfig, step: Step, t: Float[Array, ""], key: Array
) -> CLEXDraw:
    """The scheme of a training pass at factor ``t``, with positions drawn by ``key``.

    Rows share a sorted sample of the window of t contexts; positions count from the start of each
    document of a row, which changes no distance.
    """
    rows, length = step.positions.shape
    row = clex.train_positions(key, length, t, cfg)
    drawn = jnp.broadcast_to(row[None], (rows, length))
    return CLEXDraw(
        inv_freq=clex.frequencies_at(params, cfg, t),
        positions=within_documents(drawn, step.positions),
        q_scale=clex.length_scale(length, cfg) if cfg.log_scale else None,
    )


def check_model(cfg: decoder.Config, ode: clex.CLEXConfig) -> None:
    """Raise ValueError unless the ODE is of this decoder's rotations."""
    check_default_rope(cfg)
    ours = {"head_dim": ode.head_dim, "base": ode.base}
    theirs = {"head_dim": cfg.rotary_dim, "base": cfg.rope_base}
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"CLEX is set up for {name} {value} and the model rotates with {theirs[name]}: "
                f"give the ODE that {name}."
            )


def describe(params: clex.CLEXParams, cfg: clex.CLEXConfig) -> dict[str, Any]:
    """An ODE as JSON values, exactly."""
    matrices = {name: np.asarray(getattr(params, name), np.float64).tolist() for name in MATRICES}
    return {"cfg": dataclasses.asdict(cfg), **matrices}


def load_policy(arguments: list[str], cfg: decoder.Config) -> DensePolicy:
    """The frequencies of an exported run, for ``--policy=clex:DIR``.

    Raises:
        FileNotFoundError, ValueError: see :func:`inference.policies.positions_file.read_positions`,
            or an ODE that is damaged or of another model.
    """
    facts = read_positions(arguments[0], "clex")
    try:
        ode = clex.CLEXConfig(**facts["cfg"])
        params = clex.CLEXParams(*(jnp.asarray(facts[name], jnp.float32) for name in MATRICES))
        validate(params, clex.specs(ode))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{arguments[0]} tells no ODE ({error}): export it again.") from error
    check_model(cfg, ode)
    return decoder.default_policy(cfg, make_scheme(params, ode))
