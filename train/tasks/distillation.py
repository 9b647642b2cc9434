"""Distilling a draft model: a small decoder learns the laws of a frozen target on its own texts.

The target is not run: batches hold its states before the final norm (:mod:`train.data.hidden`), of
which its laws over the whole vocabulary are made chunk by chunk.
Sources: Hinton et al. arXiv 1503.02531; of draft models, Zhou et al. 2310.08461 (forward KL, on the
target's own texts).
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.draft_head import head_rows
from models.hf import save_hf
from models.layers import norm_specs, normalize
from models.load import Model, load
from models.params import ParamSpec, init
from train.data.hidden import HiddenTexts, heldout_batches, make_hidden_dataset, weights_hash
from train.losses import law_cross_entropy
from train.matrix import wrap_decoder
from train.task import BaseTask, Context


@struct.dataclass
class Laws:
    """What turns the target's states into laws; frozen."""

    final_norm: Any
    rows: Any  # (vocab, width)


@struct.dataclass
class TaskParams:
    """The draft model, and the target's frozen parts."""

    draft: Any  # decoder.Params
    laws: Any  # Laws


@dataclasses.dataclass(frozen=True)
class Distillation(BaseTask):
    """A draft model of config ``model`` for a target with the same tokenizer.

    Attributes:
        model: its config; the vocabulary is the target's.
        target: name of the frozen model (see :func:`models.load.load`), or the model.
        hidden: folder of its hidden states (:func:`train.data.hidden.write_hidden`).
        sequence_length: positions per row; longer texts are cut there and begin anew.

    Raises:
        ValueError: another vocabulary than the target's. When the data is first used: hidden states
            that are damaged or of another target.
        FileNotFoundError: no such target; when the data is first used, no hidden states.
    """

    model: decoder.Config
    target: str | Model
    hidden: str
    sequence_length: int = 256

    @property
    def about(self) -> str:
        """What an exported folder is."""
        return f"A draft model for {self.teacher.name}, distilled from it"

    @functools.cached_property
    def teacher(self) -> Model:
        """The frozen target, float32."""
        found = self.target if isinstance(self.target, Model) else load(self.target)
        if found.cfg.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"the target has {found.cfg.vocab_size} tokens and config.task.model "
                f"{self.model.vocab_size}: a draft model has its target's vocabulary."
            )
        return found

    @functools.cached_property
    def texts(self) -> HiddenTexts:
        """The hidden states, checked."""
        return HiddenTexts(self.hidden, target=weights_hash(self.teacher.params))

    def specs(self) -> TaskParams:
        """The draft model, and the target's final norm and head."""
        cfg = self.teacher.cfg
        rows = ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
        return TaskParams(decoder.specs(self.model), Laws(norm_specs(cfg, cfg.hidden_size), rows))

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> TaskParams:
        """A fresh decoder whose embeddings are the target's, projected to the smaller width."""
        target, cfg = self.teacher.params, self.teacher.cfg
        embed = principal_part(target.embed, self.model.hidden_size)
        draft = dataclasses.replace(init(decoder.specs(self.model), key), embed=embed)
        laws = Laws(target.final_norm, head_rows(target, cfg, jnp.arange(cfg.vocab_size)))
        return context.place(TaskParams(draft, laws), self.specs())

    def partition(self, params: TaskParams) -> tuple[decoder.Params, Laws]:
        """The draft model is trained, the target's parts are not."""
        return params.draft, params.laws

    def combine(self, trained: decoder.Params, rest: Laws) -> TaskParams:
        """The inverse of :meth:`partition`."""
        return TaskParams(trained, rest)

    def data(self, context: Context) -> grain.IterDataset:
        """Training batches."""
        config = context.config
        return make_hidden_dataset(
            self.texts, self.sequence_length, config.batch_size, config.seed,
            context.process_index, context.process_count,
        )  # fmt: skip

    def loss(
        self, params: TaskParams, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean nats of the draft model's laws against the target's, per generated token."""
        mask = jnp.asarray(batch["mask"])
        hidden, head = self._run(params, batch), decoder.head_matrix(params.draft)
        rows = jax.lax.stop_gradient(params.laws.rows)
        nats = law_cross_entropy(hidden, head, self._states(params, batch), rows, mask)
        weight = jnp.sum(mask)
        return nats / jnp.maximum(weight, 1.0), {"weight": weight}

    def evaluate(self, params: TaskParams, context: Context) -> dict[str, float]:
        """How drafts would fare on the held-out texts, by token.

        ``agreement`` is the share of tokens where both models prefer the same; ``acceptance`` the
        mean of ``sum min(p, q)``, the chance that speculative sampling keeps a drafted token;
        ``kl`` the divergence from the target's law to the draft model's, in nats.
        """
        add = jax.jit(self._sums)
        batches = heldout_batches(
            self.texts, self.sequence_length, context.config.batch_size,
            context.process_index, context.process_count,
        )  # fmt: skip
        total = np.zeros(4)
        for batch in batches:
            total += np.asarray(add(params, context.put(batch)))
        agreement, acceptance, kl, count = total.tolist()
        return {"agreement": agreement / count, "acceptance": acceptance / count, "kl": kl / count}

    def save(self, draft: decoder.Params, directory: str | pathlib.Path, dtype: Any) -> None:
        """Write the draft model as a Hugging Face directory with the target's tokenizer."""
        with tempfile.TemporaryDirectory() as files:
            self.teacher.tokenizer.save(files)
            save_hf(directory, draft, self.model, files, dtype)

    def _run(self, params: TaskParams, batch: dict[str, Any]) -> Float[Array, "b t width"]:
        trunk = wrap_decoder(decoder.unstack(params.draft))
        return decoder.forward(trunk, self.model, jnp.asarray(batch["tokens"])[:, :-1]).hidden

    def _states(self, params: TaskParams, batch: dict[str, Any]) -> Float[Array, "b t width"]:
        states = jnp.asarray(batch["pre_norm"]).astype(params.laws.rows.dtype)
        norm = normalize(states, params.laws.final_norm, self.teacher.cfg.norm_eps)
        return jax.lax.stop_gradient(norm)

    def _sums(self, params: TaskParams, batch: dict[str, Any]) -> Float[Array, " 4"]:
        """Sums of the three numbers over a batch's tokens, and how many there are."""

        def row(given: tuple[Array, Array, Array]) -> Float[Array, " 4"]:
            hidden, states, mask = given
            q = jax.nn.log_softmax(hidden @ decoder.head_matrix(params.draft).T)
            p = jax.nn.log_softmax(states @ params.laws.rows.T)
            found = (
                jnp.argmax(p, -1) == jnp.argmax(q, -1),
                jnp.sum(jnp.exp(jnp.minimum(p, q)), -1),
                jnp.sum(jnp.exp(p) * (p - q), -1),
                jnp.ones_like(mask),
            )
            return jnp.stack([jnp.sum(x * mask) for x in found])

        given = self._run(params, batch), self._states(params, batch), jnp.asarray(batch["mask"])
        return jnp.sum(jax.lax.map(row, given), axis=0)


def principal_part(table: Float[Array, "vocab width"], size: int) -> Float[Array, "vocab size"]:
    """The table's coordinates along its ``size`` directions of largest square sum.

    Inner products of rows are then as close to the table's as ``size`` numbers per row allow.

    Raises:
        ValueError: more directions than the table has.
    """
    if size > table.shape[1]:
        raise ValueError(
            f"a draft model of width {size} is wider than its target, {table.shape[1]}."
        )
    table = table.astype(jnp.float32)
    _, directions = jnp.linalg.eigh(table.T @ table)
    return table @ directions[:, ::-1][:, :size]
