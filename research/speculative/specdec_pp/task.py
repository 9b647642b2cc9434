"""Training SpecDec++'s head on the frozen draft model's stored states.

Neither model is run: batches hold the draft model's states of drafted tokens before its final norm
and their labels (:mod:`research.speculative.specdec_pp.dataset`). Only the head is trained.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import acceptance_head
from models.acceptance_head import AcceptanceConfig
from models.drafter_io import save_drafter
from models.layers import norm_specs, normalize
from models.load import Model, load
from models.params import init
from research.speculative.specdec_pp.dataset import AcceptanceWindows
from research.speculative.specdec_pp.evaluation import Scores, score, summarise
from research.speculative.specdec_pp.objective import acceptance_loss
from train.data.hidden import HiddenTexts, batches_in_order, shuffled_batches, weights_hash
from train.task import BaseTask, Context

KIND = "specdec"


@struct.dataclass
class TaskParams:
    """The head, and the draft model's final norm, which is frozen."""

    head: Any
    final_norm: Any


@dataclasses.dataclass(frozen=True)
class AcceptanceTask(BaseTask):
    """An acceptance head for a pair of models.

    Attributes:
        head: its config.
        draft: name of the frozen draft model (see :func:`models.load.load`), or the model.
        examples: folder of labelled states
            (:func:`research.speculative.specdec_pp.dataset.write_acceptance`).
        sequence_length: positions per row.

    Raises (when the data is first used):
        ValueError, FileNotFoundError: a folder that is missing, damaged, without labels, or of
            another draft model.
    """

    head: AcceptanceConfig
    draft: str | Model
    examples: str
    sequence_length: int = 256

    @property
    def about(self) -> str:
        """What an exported folder is."""
        name = self.draft.name if isinstance(self.draft, Model) else self.draft
        return f"An acceptance head (SpecDec++) for the draft model {pathlib.Path(name).name}"

    @functools.cached_property
    def model(self) -> Model:
        """The frozen draft model, float32."""
        return self.draft if isinstance(self.draft, Model) else load(self.draft)

    @functools.cached_property
    def texts(self) -> HiddenTexts:
        """The labelled states, checked."""
        return HiddenTexts(self.examples, target=weights_hash(self.model.params))

    def specs(self) -> TaskParams:
        """The head and the norm before it."""
        cfg = self.model.cfg
        return TaskParams(acceptance_head.specs(self.head, cfg), norm_specs(cfg, cfg.hidden_size))

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> TaskParams:
        """A fresh head beside the draft model's norm, in the context's shardings."""
        head = init(self.specs().head, key)
        return context.place(TaskParams(head, self.model.params.final_norm), self.specs())

    def partition(self, params: TaskParams) -> tuple[Any, Any]:
        """The head is trained, the norm is not."""
        return params.head, params.final_norm

    def combine(self, trained: Any, rest: Any) -> TaskParams:
        """The inverse of :meth:`partition`."""
        return TaskParams(trained, rest)

    def data(self, context: Context) -> grain.IterDataset:
        """Training batches."""
        config = context.config
        windows = AcceptanceWindows(self.texts, "train", self.sequence_length)
        return shuffled_batches(
            windows, config.batch_size, config.seed, context.process_index, context.process_count
        )

    def loss(
        self, params: TaskParams, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted cross-entropy; microbatches count alike, each with its own normaliser."""
        labels = jnp.asarray(batch["labels"])
        return acceptance_loss(self._logits(params, batch), labels, self.head.rejection_weight), {
            "positions": jnp.sum((labels >= 0).astype(jnp.float32))
        }

    def evaluate(self, params: TaskParams, context: Context) -> dict[str, float]:
        """Ranking, calibration and divergence on the held-out texts."""
        rows, windows = context.config.batch_size, "heldout"
        add = jax.jit(self._score)
        source = AcceptanceWindows(self.texts, windows, self.sequence_length, multiple=rows)
        total = None
        for batch in batches_in_order(source, rows, context.process_index, context.process_count):
            part = add(params, context.put(batch))
            total = part if total is None else total + part
        return {} if total is None else summarise(total, self.head.rejection_weight)

    def save(self, head: Any, directory: str | pathlib.Path, dtype: Any) -> None:
        """Write a trained head for use in decoding (see :mod:`models.drafter_io`)."""
        save_drafter(directory, KIND, self.head, head, self.model.cfg, None, dtype)

    def _logits(self, params: TaskParams, batch: dict[str, Any]) -> Float[Array, "b t 2"]:
        states = jnp.asarray(batch["pre_norm"]).astype(jnp.float32)
        norm = jax.lax.stop_gradient(params.final_norm)
        hidden = normalize(states, norm, self.model.cfg.norm_eps)
        return acceptance_head.logits(params.head, self.head, hidden)

    def _score(self, params: TaskParams, batch: dict[str, Any]) -> Scores:
        return score(self._logits(params, batch), jnp.asarray(batch["labels"]))
