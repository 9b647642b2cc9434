"""Training a decoder together with CLEX's ODE."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from models import clex, decoder
from models.attention import AttentionPolicy, Step
from research.context.clex.scheme import CLEX, check_model, describe, draw_scheme
from train.tasks.language_model import LanguageModel

ODE = ".ode"  # its name in CLEXTaskParams


@struct.dataclass
class CLEXTaskParams:
    """The decoder and the ODE."""

    trunk: Any  # decoder.Params
    ode: clex.CLEXParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLEXTask(LanguageModel):
    """A language model trained on rows whose positions span up to ``max_factor`` contexts.

    Each pass draws one factor and one row of positions. Evaluation takes each row's own length.
    The ODE is the optimiser's group ``ode``, and is computed in float32. ``plain_frequencies`` is
    the paper's control: the same positions under the model's own frequencies, whatever the length.

    Raises:
        ValueError: an ODE for other rotations than the model's.
    """

    ode: clex.CLEXConfig
    plain_frequencies: bool = False

    def __post_init__(self):
        check_model(self.model, self.ode)

    def specs(self) -> CLEXTaskParams:
        """The decoder's parameters and the ODE's."""
        return CLEXTaskParams(decoder.specs(self.model), clex.specs(self.ode))

    def trunk(self, params: CLEXTaskParams) -> decoder.Params:
        """See :class:`LanguageModel`."""
        return params.trunk

    def with_trunk(self, params: CLEXTaskParams, trunk: decoder.Params) -> CLEXTaskParams:
        """See :class:`LanguageModel`."""
        return dataclasses.replace(params, trunk=trunk)

    def group(self, name: str) -> str:
        """The ODE may have a learning rate of its own."""
        return "ode" if name.startswith(ODE) else super().group(name)

    def full_precision(self, name: str) -> bool:
        """The ODE."""
        return name.startswith(ODE)

    def positions(self, params: CLEXTaskParams) -> tuple[str, dict[str, Any]] | None:
        """See :class:`LanguageModel`."""
        if self.plain_frequencies:
            return None
        return "clex", describe(params.ode, self.ode)

    def draw(self, key: Array) -> tuple[Array, Array]:
        """The factor of a training pass, and the key of its positions."""
        for_factor, for_positions = jax.random.split(key)
        return clex.draw_factor(for_factor, self.ode), for_positions

    def policy(
        self, params: CLEXTaskParams, step: Step, key: Array | None
    ) -> AttentionPolicy | None:
        """With ``key`` the drawn factor, otherwise that of each row's length."""
        if key is None:
            if self.plain_frequencies:
                return None
            scheme = CLEX(clex.table(params.ode, self.ode), self.ode)
        else:
            t, for_positions = self.draw(key)
            scheme = draw_scheme(params.ode, self.ode, step, t, for_positions)
            if self.plain_frequencies:
                plain = clex.frequencies_at(params.ode, self.ode, jnp.ones_like(t))
                scheme = dataclasses.replace(scheme, inv_freq=plain)
        return decoder.default_policy(self.model, scheme)

    def loss(
        self, params: CLEXTaskParams, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean nats per target token; the metrics tell the factor drawn."""
        value, metrics = super().loss(params, batch, key)
        return value, {**metrics, "factor": self.draw(key)[0]}
