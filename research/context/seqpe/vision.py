"""Training a vision transformer with SeqPE as its only position signal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from models import seqpe, vit
from models.params import Normal, ParamSpec
from research.context.seqpe.policy import SeqPEPolicy
from research.context.seqpe.regulariser import ENCODER, GROUP, Regulariser
from train.task import Context
from train.tasks.image_classification import ImageClassification, Told, cross_entropy


@struct.dataclass
class SeqPEVisionParams:
    """The model, the encoder of positions, the class token's own vector, and the projection."""

    model: vit.Params
    encoder: seqpe.Params
    class_vector: Any  # (width of u,), in place of a position
    projection: Any = None  # Linear, stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqPEVision(ImageClassification):
    """A vision transformer whose patches' rows and columns are read by a trained encoder.

    Raises:
        ValueError: an encoder, an injection or a sampler that does not fit the model or its grid.
    """

    encoder: seqpe.Config
    injection: seqpe.Injection = seqpe.Injection("attn_mul", "multi")
    regulariser: Regulariser = Regulariser()

    def __post_init__(self):
        if self.model.position != "none":
            raise ValueError(
                f"SeqPE is the only position signal and the model has {self.model.position!r}: set "
                "its position to 'none'."
            )
        seqpe.check_injection(self.injection, self.encoder.out, self.model.trunk)
        self.regulariser.check(self.encoder, self.model.grid)

    def specs(self) -> SeqPEVisionParams:
        """All parameters."""
        out = self.encoder.out
        return SeqPEVisionParams(
            model=vit.specs(self.model),
            encoder=seqpe.specs(self.encoder),
            class_vector=ParamSpec((out,), (None,), Normal(0.02)),
            projection=seqpe.projection_specs(self.injection, out, self.model.trunk),
        )

    def vision(self, params: SeqPEVisionParams) -> vit.Params:
        """See :class:`ImageClassification`."""
        return params.model

    def group(self, name: str) -> str:
        """The encoder is clipped, and may be trained, by itself."""
        return GROUP if name.startswith(ENCODER) else super().group(name)

    def beside(self, context: Context) -> Callable[[int], dict[str, np.ndarray]]:
        """The pivots of the contrastive loss."""
        return self.regulariser.beside(self.encoder, context)

    def told(self, params: SeqPEVisionParams, grid: tuple[int, int]) -> Told:
        """The vectors of the grid from the origin.

        Raises:
            ValueError: a grid beyond the encoder's digits.
        """
        table = seqpe.extend_table(params.encoder, self.encoder, grid)
        return self._told(params, table[None])

    def _told(self, params: SeqPEVisionParams, vectors: Float[Array, "rows patches out"]) -> Told:
        """Tables of patches with the class token's vector before them."""
        first = jnp.broadcast_to(
            params.class_vector[None, None], (vectors.shape[0], 1, vectors.shape[2])
        )
        table = jnp.concatenate([first.astype(vectors.dtype), vectors], axis=1)
        if self.injection.method == "input_add":
            return Told(added=table)
        return Told(SeqPEPolicy(table, params.projection, self.injection))

    def loss(
        self, params: SeqPEVisionParams, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean cross-entropy in nats, and the losses of the encoder."""
        out = self.regulariser.run(
            params.encoder,
            self.encoder,
            self.model.grid,
            batch["pivots"],
            batch["images"].shape[0],
            key,
        )
        logits = self.logits(params, batch["images"], self._told(params, out.window))
        nats, metrics = cross_entropy(logits, batch["labels"])
        added = out.penalty(self.regulariser.weights)
        return nats + added, {**metrics, "nats": nats, **out.metrics()}
