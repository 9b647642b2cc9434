"""Training a language model from scratch with SeqPE as its only position signal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from models import decoder, seqpe
from models.attention import AttentionPolicy, Step
from research.context.seqpe.policy import SeqPEPolicy, describe
from research.context.seqpe.regulariser import ENCODER, GROUP, Regulariser
from train.task import Context
from train.tasks.language_model import LanguageModel


@struct.dataclass
class SeqPEParams:
    """The decoder, the encoder of positions, and what projects its vectors (None without)."""

    trunk: Any  # decoder.Params
    encoder: seqpe.Params
    projection: Any = None  # Linear, stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqPETask(LanguageModel):
    """A language model whose positions are read by a trained encoder.

    Most steps read positions 0, 1, ... in place, some read them shifted; evaluation does not shift.
    The encoder is the optimiser's group ``encoder``.

    Raises:
        ValueError: an encoder, an injection or a sampler that does not fit the model or the length.
    """

    encoder: seqpe.Config
    injection: seqpe.Injection = seqpe.Injection()
    regulariser: Regulariser = Regulariser()

    def __post_init__(self):
        seqpe.check_injection(self.injection, self.encoder.out, self.model)
        self.regulariser.check(self.encoder, (self.sequence_length,))

    def specs(self) -> SeqPEParams:
        """All parameters."""
        return SeqPEParams(
            trunk=decoder.specs(self.model),
            encoder=seqpe.specs(self.encoder),
            projection=seqpe.projection_specs(self.injection, self.encoder.out, self.model),
        )

    def trunk(self, params: SeqPEParams) -> decoder.Params:
        """See :class:`LanguageModel`."""
        return params.trunk

    def with_trunk(self, params: SeqPEParams, trunk: decoder.Params) -> SeqPEParams:
        """See :class:`LanguageModel`."""
        return dataclasses.replace(params, trunk=trunk)

    def group(self, name: str) -> str:
        """The encoder is clipped, and may be trained, by itself."""
        return GROUP if name.startswith(ENCODER) else super().group(name)

    def beside(self, context: Context) -> Callable[[int], dict[str, np.ndarray]]:
        """The pivots of the contrastive loss."""
        return self.regulariser.beside(self.encoder, context)

    def positions(self, params: SeqPEParams) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """See :class:`LanguageModel`."""
        weights = {"encoder": params.encoder, "projection": params.projection}
        return "seqpe", describe(self.encoder, self.injection), weights

    def policy(self, params: SeqPEParams, step: Step, key: Array | None) -> AttentionPolicy:
        """The vectors of positions from 0 on; a training pass draws its own, see :meth:`loss`."""
        table = seqpe.extend_table(params.encoder, self.encoder, (self.sequence_length,))
        return SeqPEPolicy(table[None], params.projection, self.injection)

    def loss(
        self, params: SeqPEParams, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean nats per target token, and the losses of the encoder."""
        out = self.regulariser.run(
            params.encoder,
            self.encoder,
            (self.sequence_length,),
            batch["pivots"],
            batch["tokens"].shape[0],
            key,
        )
        policy = SeqPEPolicy(out.window, params.projection, self.injection)
        nats, weight = self.nats(params, batch, policy=policy)
        mean = nats / jnp.maximum(weight, 1.0)
        metrics = {"weight": weight, "nats_per_token": mean, **out.metrics()}
        return mean + out.penalty(self.regulariser.weights), metrics
