"""Training a language model under one of Giraffe's bases."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from models import decoder
from models.attention import AttentionPolicy, Step, check_default_rope
from models.params import Constant, ParamSpec, path_name
from models.positions import within_documents
from research.context.giraffe.bases import (
    Basis,
    check_xpos,
    make_scheme,
    random_positions,
)
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.tasks.language_model import LanguageModel

SCALE_BASE = ".scale_base"  # its name in GiraffeParams


@struct.dataclass
class GiraffeParams:
    """The decoder, and where the slide of xPos stands (None without xPos)."""

    trunk: Any  # decoder.Params
    scale_base: Any = None  # float32 scalar


@dataclasses.dataclass(frozen=True)
class Slide:
    """How the B of xPos falls: from ``start`` by ``step`` after every update, down to ``end``.

    Raises:
        ValueError: not ``start >= end > 0`` and ``step >= 0``.
    """

    start: float = 8192.0
    end: float = 128.0
    step: float = 8.0

    def __post_init__(self):
        if not (self.start >= self.end > 0 and self.step >= 0):
            raise ValueError(
                f"the slide of xpos goes from {self.start} to {self.end} by {self.step}: give "
                "start >= end > 0 and step >= 0."
            )


@dataclasses.dataclass(frozen=True)
class GiraffeTask(LanguageModel):
    """A language model whose rotations are those of ``basis``; plain RoPE by default.

    Positions are drawn at random for each batch while training, and count 0, 1, ... in evaluation.
    B of xPos is part of the parameters: an evaluation or a run that goes on has the B that was
    reached. ``slide`` is used with ``basis.xpos`` only.

    Raises:
        ValueError: a basis for a model with a rope type of its own, or a slide that ends where the
            scales of the sequence length are no numbers any more.
    """

    basis: Basis = Basis()
    slide: Slide = Slide()

    def __post_init__(self):
        if self.basis != Basis():
            check_default_rope(self.model)
        if self.basis.xpos:
            check_xpos(self.model.rotary_dim, self.slide.end, self.sequence_length)

    def specs(self) -> GiraffeParams:
        """The decoder's parameters, and B."""
        scale_base = ParamSpec((), (), Constant(self.slide.start)) if self.basis.xpos else None
        return GiraffeParams(decoder.specs(self.model), scale_base)

    def trunk(self, params: GiraffeParams) -> decoder.Params:
        """See :class:`LanguageModel`."""
        return params.trunk

    def with_trunk(self, params: GiraffeParams, trunk: decoder.Params) -> GiraffeParams:
        """See :class:`LanguageModel`."""
        return dataclasses.replace(params, trunk=trunk)

    def positions(self, params: GiraffeParams) -> tuple[str, dict[str, Any]]:
        """See :class:`LanguageModel`."""
        reached = None if params.scale_base is None else float(params.scale_base)
        facts = {"basis": dataclasses.asdict(self.basis), "scale_base": reached}
        return "giraffe", {**facts, "length": self.sequence_length}

    def full_precision(self, name: str) -> bool:
        """B: bfloat16 has no 8184."""
        return name == SCALE_BASE

    def policy(
        self, params: GiraffeParams, step: Step, key: Array | None
    ) -> AttentionPolicy | None:
        """The basis; with ``key``, at positions drawn for this batch if it randomises them."""
        if self.basis == Basis():
            return None  # the config's own, YaRN and others among them
        positions = None
        if self.basis.randomize and key is not None:
            drawn = random_positions(key, *step.positions.shape)
            positions = within_documents(drawn, step.positions)
        scheme = make_scheme(
            self.model,
            self.basis,
            # Not learned: the optimiser has a rule of its own for it.
            scale_base=jax.lax.stop_gradient(params.scale_base),
            length=self.sequence_length,
            positions=positions,
        )
        return decoder.default_policy(self.model, scheme)

    def loss(
        self, params: GiraffeParams, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean nats per target token; the metrics tell B."""
        value, metrics = super().loss(params, batch, key)
        if params.scale_base is not None:
            metrics = {**metrics, "scale_base": params.scale_base}
        return value, metrics

    def optimizer(self, config: TrainConfig, specs: GiraffeParams) -> optax.GradientTransformation:
        """The config's optimiser for the decoder; the slide for B."""
        learned = make_optimizer(config, specs, self.group)
        if specs.scale_base is None:
            return learned
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "slide" if path_name(path) == SCALE_BASE else "learned", specs
        )
        return optax.multi_transform({"learned": learned, "slide": sliding(self.slide)}, labels)


def sliding(slide: Slide) -> optax.GradientTransformation:
    """Moves each parameter down by ``slide.step``, not below ``slide.end``, whatever its slope."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda b: -jnp.minimum(slide.step, b - slide.end), params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
