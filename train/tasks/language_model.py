"""Next-token prediction on packed text."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from models import decoder
from models.attention import AttentionPolicy, Step
from models.load import load
from models.params import cast, validate
from models.tokenizer import Tokenizer, check_vocab
from train.data.pipeline import DataConfig, evaluation_batches, load_tokens, make_dataset
from train.losses import token_cross_entropy
from train.matrix import wrap_decoder
from train.step import DTYPES
from train.task import BaseTask, Context


@dataclasses.dataclass(frozen=True)
class LanguageModel(BaseTask):
    """A decoder trained on a corpus; evaluated in bits per byte of held-out text.

    ``unroll`` compiles each layer on its own instead of scanning them: longer to compile, and
    faster on CPU, where a scan copies what the backward pass needs. ``start_from`` names a model
    (see :func:`models.load.load`) whose weights training begins with. ``whole_documents`` packs
    documents whole instead of cutting them at the ends of rows.
    """

    model: decoder.Config
    corpus: str
    tokenizer: str
    sequence_length: int
    evaluation_split: str = "validation"
    evaluation_rows: int = 16
    unroll: bool = False
    remat: bool = False
    start_from: str | None = None
    whole_documents: bool = False

    def specs(self) -> decoder.Params:
        """The decoder's parameters."""
        return decoder.specs(self.model)

    def init(self, key: Array, data: grain.IterDataset | None, context: Context) -> Any:
        """Fresh values of :meth:`specs`, with the decoder of ``start_from`` if one is named.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: it is of another shape or style, or has another tokenizer.
        """
        params = super().init(key, data, context)
        if self.start_from is None:
            return params
        return self.with_trunk(params, self._pretrained(context))

    def _pretrained(self, context: Context) -> decoder.Params:
        model = load(str(self.start_from), jnp.float32, context.mesh, context.rules)
        theirs, ours = (_comparable(cfg) for cfg in (model.cfg, self.model))
        if odd := sorted(name for name in ours if ours[name] != theirs[name]):
            raise ValueError(
                f"{self.start_from} has {odd[0]} {theirs[odd[0]]!r} and config.task.model has "
                f"{ours[odd[0]]!r}: give the config of the model to start from."
            )
        if Tokenizer.load(self.tokenizer).fingerprint != model.tokenizer.fingerprint:
            raise ValueError(
                f"{self.start_from} has another tokenizer than {self.tokenizer}: set "
                "config.task.tokenizer to the folder of the model to start from."
            )
        validate(model.params, decoder.specs(self.model))
        return model.params

    def data(self, context: Context) -> grain.IterDataset:
        """Packed windows of the training split.

        Raises:
            ValueError: the tokenizer has more ids than the model.
        """
        check_vocab(Tokenizer.load(self.tokenizer), self.model.vocab_size)
        rows = context.config.batch_size
        return make_dataset(self._reading(context, "train", rows), self.beside(context))

    def beside(self, context: Context) -> Callable[[int], dict[str, np.ndarray]] | None:
        """What stands beside the windows in a batch, by the batch's number; None: nothing."""
        return None

    def loss(self, params: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict]:
        """Mean nats per target token."""
        nats, weight = self.nats(params, batch, key)
        mean = nats / jnp.maximum(weight, 1.0)
        return mean, {"weight": weight}

    def trunk(self, params: Any) -> decoder.Params:
        """The decoder within the task's parameters: for tasks that train more than it."""
        return params

    def with_trunk(self, params: Any, trunk: decoder.Params) -> Any:
        """The task's parameters with another decoder: the inverse of :meth:`trunk`."""
        return trunk

    def positions(self, params: Any) -> tuple[Any, ...] | None:
        """The method, the facts and perhaps the weights of a trained position scheme, for export.

        Arguments of :func:`inference.policies.positions_file.write_positions`. None: the decoder's
        config says it all.
        """
        return None

    def policy(self, params: Any, step: Step, key: Array | None) -> AttentionPolicy | None:
        """How queries meet keys in one pass (None: the model's own way).

        ``key`` is for positions drawn at random while training, and None in an evaluation.
        """
        return None

    def nats(
        self,
        params: Any,
        batch: dict[str, Array],
        key: Array | None = None,
        policy: AttentionPolicy | None = None,
    ) -> tuple[Array, Array]:
        """Sum of nats over the targets of a batch, and their number.

        ``policy`` takes the place of the task's own.
        """
        out = self.run(params, batch, key, policy)
        nats = token_cross_entropy(out.hidden, self.head(params), batch["targets"], batch["mask"])
        return nats, jnp.sum(batch["mask"])

    def head(self, params: Any) -> Any:
        """The matrix (vocab, width) that reads tokens out of hidden states."""
        return decoder.head_matrix(self.trunk(params))

    def run(
        self,
        params: Any,
        batch: dict[str, Array],
        key: Array | None = None,
        policy: AttentionPolicy | None = None,
        layers: decoder.LayerChoice | None = None,
        all_hidden: bool = False,
    ) -> decoder.Output:
        """The decoder's pass over a batch, as :meth:`nats` makes it."""
        step = Step(batch["positions"], segments=batch["segments"], causal=self.model.causal)
        policy = self.policy(params, step, key) if policy is None else policy
        trunk = self.trunk(params)
        if self.unroll:
            trunk = decoder.unstack(trunk)
        return decoder.forward(
            wrap_decoder(trunk),
            self.model,
            batch["tokens"],
            step=step,
            policy=policy,
            layers=layers,
            all_hidden=all_hidden,
            remat=self.remat,
        )

    def evaluate(
        self, params: Any, context: Context, policy: AttentionPolicy | None = None
    ) -> dict[str, float]:
        """``bits_per_byte`` and ``nats_per_token`` of the whole evaluation split.

        Each document starts anew and is read in windows without overlap, so this is an upper
        bound on what a longer context would give. ``policy`` takes the place of the task's own;
        other numbers in it are not compiled again. Without a split nothing is measured.
        """
        if not self.evaluation_split:
            return {}
        reading = self._reading(context, self.evaluation_split, self.evaluation_rows)
        add = _evaluation_step(self, DTYPES[context.config.compute_dtype])
        sums = [0.0, 0.0]
        for batch in evaluation_batches(reading):
            parts = add(params, context.put(batch), policy)
            sums = [a + float(b) for a, b in zip(sums, parts, strict=True)]
        nats, count = sums
        return {
            "bits_per_byte": nats / math.log(2) / load_tokens(reading).num_bytes,
            "nats_per_token": nats / count,
        }

    def _reading(self, context: Context, split: str, rows: int) -> DataConfig:
        return DataConfig(
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            split=split,
            sequence_length=self.sequence_length,
            batch_size=rows,
            seed=context.config.seed,
            whole=self.whole_documents,
            process_index=context.process_index,
            process_count=context.process_count,
        )


@functools.cache
def _evaluation_step(task: LanguageModel, dtype: Any) -> Any:
    """The compiled sums of one batch; kept, so that every evaluation of a run shares it."""

    def sums(params: Any, batch: dict[str, Array], policy: Any) -> tuple[Array, Array]:
        return task.nats(cast(params, dtype, task.full_precision), batch, policy=policy)

    return jax.jit(sums)


def _comparable(cfg: decoder.Config) -> dict[str, Any]:
    """What two configs of the same weights have in common.

    Not the context, nor how it is extended, nor the spread of initial values.
    """
    free = ("max_length", "rope", "windows", "init_stddev")
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in free}
