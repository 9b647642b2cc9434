"""Training LongSpec's draft layer beside a frozen target that reads the same short rows.

Every update draws how many of the target's newest entries are hidden, and for every row how far all
but its first tokens move: so positions of long texts are learnt on short ones, and the target reads
the rows at the same positions. The loss is that of the next token, without distillation.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.policies.registry import make_policy
from models import decoder, longspec
from models.attention import AttentionPolicy, EmbeddingPolicy, Step
from models.drafter_io import save_drafter
from models.load import Model, load, locate
from models.longspec import LongSpecConfig
from models.params import init
from research.speculative.longspec.drafter import KIND
from research.speculative.longspec.evaluation import (
    STEPS,
    draft_hidden,
    outcomes,
    target_entries,
)
from train.data.pipeline import DataConfig, evaluation_batches, make_dataset
from train.losses import token_cross_entropy
from train.task import BaseTask, Context


@struct.dataclass
class TaskParams:
    """The draft layer, and the target, which is frozen."""

    draft: Any
    target: Any  # decoder.Params


@dataclasses.dataclass(frozen=True)
class LongSpecTask(BaseTask):
    """A draft layer for a target.

    Attributes:
        draft: the layer's config, and what its training draws.
        target: name of the frozen model, with its tokenizer in the same folder.
        corpus: what it is trained on (see :mod:`train.data.corpus`).
        sequence_length: tokens per row.
        policy: how the target attends (see :mod:`inference.policies.registry`), such as
            ``yarn:4`` for longer texts than it was made for.
        evaluation_batches: batches of the validation split that an evaluation reads; 0: all.
    """

    draft: LongSpecConfig
    target: str
    corpus: str
    sequence_length: int = 256
    policy: str = "dense"
    evaluation_batches: int = 0

    @property
    def about(self) -> str:
        """What an exported folder is."""
        name = pathlib.Path(self.target).name
        return f"LongSpec's draft layer for {name} under the policy {self.policy}"

    @functools.cached_property
    def model(self) -> Model:
        """The frozen model, float32."""
        return load(self.target)

    @functools.cached_property
    def attention(self) -> AttentionPolicy:
        """The target's policy."""
        return make_policy(self.policy, self.model.cfg)

    def specs(self) -> TaskParams:
        """The layer and the target.

        Raises:
            ValueError: positions move further than the target has any.
        """
        cfg = self.model.cfg
        most = getattr(self.attention, "max_length", None)
        if cfg.position == "learned" and not isinstance(self.attention, EmbeddingPolicy):
            most = cfg.max_length
        if most is not None and self.draft.reach > most:
            raise ValueError(
                f"training positions go up to {self.draft.reach} and the target's end at {most}: "
                f"set the draft's reach to {most} or less."
            )
        return TaskParams(longspec.specs(self.draft, cfg), decoder.specs(cfg))

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> TaskParams:
        """A fresh layer beside the target, in the context's shardings."""
        specs = self.specs()
        return context.place(TaskParams(init(specs.draft, key), self.model.params), specs)

    def partition(self, params: TaskParams) -> tuple[longspec.Params, decoder.Params]:
        """The layer is trained, the target is not."""
        return params.draft, params.target

    def combine(self, trained: longspec.Params, rest: decoder.Params) -> TaskParams:
        """The inverse of :meth:`partition`."""
        return TaskParams(trained, rest)

    def data(self, context: Context) -> grain.IterDataset:
        """Packed rows of the training split."""
        return make_dataset(self._reading(context, "train"))

    def loss(
        self, params: TaskParams, batch: dict[str, Array], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean nats per target token, with one shift for all and an offset for each row."""
        rows, length = batch["tokens"].shape
        of_shift, of_offset = jax.random.split(key)
        shift = jax.random.randint(of_shift, (), 1, self.draft.max_shift + 1, jnp.int32)
        sink, offset = longspec.draw_anchor_offset(of_offset, self.draft, rows, length)
        positions = longspec.anchor_offset_positions(batch["positions"], sink, offset)
        hidden = self.hidden(params, batch, positions, shift)
        nats = token_cross_entropy(hidden, self._head(params), batch["targets"], batch["mask"])
        weight = jnp.sum(batch["mask"])
        return nats / jnp.maximum(weight, 1.0), {"weight": weight}

    def hidden(
        self,
        params: TaskParams,
        batch: dict[str, Array],
        positions: Int[Array, "b t"],
        shift: Int[Array, ""] | int,
    ) -> Float[Array, "b t width"]:
        """What the head reads, layer and target at the same positions."""
        cfg, target = self.model.cfg, jax.lax.stop_gradient(params.target)
        step = Step(positions, segments=batch["segments"])
        entries = target_entries(target, cfg, self.attention, batch["tokens"], step)
        return draft_hidden(
            params.draft, self.draft, target, cfg, self.attention, batch["tokens"], step, entries,
            shift,
        )  # fmt: skip

    def evaluate(self, params: TaskParams, context: Context) -> dict[str, float]:
        """For every step of a draft: how often its best token is the target's, and its nats.

        Rows stand at their own positions.
        """
        batches = evaluation_batches(self._reading(context, "validation"))
        most = self.evaluation_batches or None
        add, total = jax.jit(self._sums), None
        for batch in itertools.islice(batches, most):
            part = add(params, context.put(batch))
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        if total is None:
            return {}
        hits, nats, count = total
        rates = {f"top1/step{i + 1}": float(hits[i] / count) for i in range(STEPS)}
        return rates | {f"nats/step{i + 1}": float(nats[i] / count) for i in range(STEPS)}

    def save(self, draft: longspec.Params, directory: str | pathlib.Path, dtype: Any) -> None:
        """Write a trained layer for use in decoding (see :mod:`models.drafter_io`)."""
        save_drafter(directory, KIND, self.draft, draft, self.model.cfg, None, dtype)

    def _head(self, params: TaskParams) -> Float[Array, "vocab width"]:
        target = params.target
        return jax.lax.stop_gradient(decoder.head_matrix(target))

    def _sums(
        self, params: TaskParams, batch: dict[str, Array]
    ) -> tuple[Float[Array, " steps"], Float[Array, " steps"], Float[Array, ""]]:
        step = Step(batch["positions"], segments=batch["segments"])
        found = outcomes(
            params.draft, self.draft, params.target, self.model.cfg, self.attention,
            batch["tokens"], batch["targets"], step,
        )  # fmt: skip
        mask = batch["mask"]
        hits, nats = (jnp.sum(x * mask[None], axis=(1, 2)) for x in (found.hits, found.nats))
        return hits, nats, jnp.sum(mask)

    def _reading(self, context: Context, split: str) -> DataConfig:
        return DataConfig(
            corpus=self.corpus,
            tokenizer=str(locate(self.target)),
            split=split,
            sequence_length=self.sequence_length,
            batch_size=context.config.batch_size,
            seed=context.config.seed,
            process_index=context.process_index,
            process_count=context.process_count,
        )
