"""Training drafters of a frozen target on its stored hidden states: Clover, Medusa, EAGLE-like.

The target is not run: batches hold its states before the final norm, and what drafters take from
it (final norm, embeddings, head) is frozen. See :mod:`train.data.hidden` for the data.
"""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import grain
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import clover, decoder, eagle, medusa
from models.draft_head import DraftVocabulary, draft_vocabulary, frequent_tokens, head_rows
from models.drafter_io import save_drafter
from models.layers import norm_specs, normalize
from models.load import Model, load
from models.params import Constant, ParamSpec, init
from research.speculative.clover.evaluation import Hits, count_hits, eagle_rollout
from research.speculative.clover.objective import clover_loss, eagle_loss, medusa_loss
from train.data.hidden import HiddenTexts, heldout_batches, make_hidden_dataset, weights_hash
from train.task import BaseTask, Context


@struct.dataclass
class Frozen:
    """What a drafter takes from its target and never changes."""

    final_norm: Any
    embed: Any  # (vocab, width): head rows for Clover, input embeddings for EAGLE, None for Medusa
    rows: Any  # (d, width): the head, or the draft vocabulary's part of it
    row_of: Any  # (vocab,) int32: each token's row, -1 if it is not drafted


@struct.dataclass
class TaskParams:
    """Trained heads and the frozen parts."""

    heads: Any
    frozen: Any  # Frozen


@struct.dataclass
class Examples:
    """A batch as the losses want it: row s pairs state s with token s + 1."""

    pre_norm: Any  # (b, t, width) states s
    hidden: Any  # (b, t, width) the same after the final norm
    target: Any  # (b, t, width) post-norm states s + 1
    next_tokens: Any  # (b, t) tokens s + 1
    labels: Any  # (b, t) tokens s + 2, as rows of the draft head
    mask: Any  # (b, t) whether target s + 1 counts


def examples(frozen: Frozen, cfg: decoder.Config, batch: dict[str, Any]) -> Examples:
    """Inputs and targets from a batch of :class:`train.data.hidden.HiddenWindows`.

    States take the dtype of the frozen parts, which is the one that the loop computes in.
    """
    states = jnp.asarray(batch["pre_norm"]).astype(frozen.rows.dtype)
    tokens = jnp.asarray(batch["tokens"])
    hidden = jax.lax.stop_gradient(normalize(states, frozen.final_norm, cfg.norm_eps))
    return Examples(
        pre_norm=states[:, :-1],
        hidden=hidden[:, :-1],
        target=hidden[:, 1:],
        next_tokens=tokens[:, 1:-1],
        labels=jnp.take(frozen.row_of, tokens[:, 2:]),
        mask=jnp.asarray(batch["mask"])[:, 1:],
    )


@dataclasses.dataclass(frozen=True)
class DrafterTask(BaseTask):
    """What the three tasks share; a subclass says how its heads run and what their loss is.

    Attributes:
        heads: config of the heads, of the subclass's kind.
        target: name of the frozen model (see :func:`models.load.load`), or the model.
        hidden: folder of its hidden states (:func:`train.data.hidden.write_hidden`).
        sequence_length: positions per row.
        draft_vocab: draft only so many of the texts' most frequent tokens; None: all.

    Raises (when the data is first used):
        ValueError, FileNotFoundError: hidden states that are missing, damaged, or of another
            target (see :class:`train.data.hidden.HiddenTexts`).
    """

    heads: Any
    target: str | Model
    hidden: str
    sequence_length: int = 256
    draft_vocab: int | None = None

    kind: ClassVar[str]
    reads_tokens: ClassVar[bool] = True

    @functools.cached_property
    def model(self) -> Model:
        """The frozen model, float32."""
        return self.target if isinstance(self.target, Model) else load(self.target)

    @functools.cached_property
    def texts(self) -> HiddenTexts:
        """The hidden states, checked."""
        return HiddenTexts(self.hidden, target=weights_hash(self.model.params))

    @functools.cached_property
    def vocabulary(self) -> DraftVocabulary | None:
        """The tokens to draft and their rows of the head; None: all."""
        if self.draft_vocab is None:
            return None
        size = self.model.cfg.vocab_size
        ids = frequent_tokens(self.texts.tokens, size, self.draft_vocab)
        return draft_vocabulary(self.model.params, self.model.cfg, ids)

    def head_specs(self) -> Any:
        """Abstract parameters of the heads."""
        raise TypeError(f"{type(self).__name__} must say what its heads are.")

    def init_heads(self, key: jax.Array) -> Any:
        """Initial heads."""
        return init(self.head_specs(), key)

    def embeddings(self) -> Float[Array, "vocab width"]:
        """The frozen token embeddings that the heads read: rows of the target's head."""
        return head_rows(self.model.params, self.model.cfg, jnp.arange(self.model.cfg.vocab_size))

    def outputs(self, params: TaskParams, x: Examples) -> Array:
        """Teacher-forced outputs of all heads, (heads, b, t, width), for the evaluation."""
        raise TypeError(f"{type(self).__name__} must say how its heads run.")

    def matrices(self, params: TaskParams) -> Float[Array, "heads vocab width"]:
        """The matrix of every head, or one for all."""
        return params.frozen.rows[None]

    def specs(self) -> TaskParams:
        """Heads, and the target's parts that they use."""
        cfg = self.model.cfg
        drafted = cfg.vocab_size if self.draft_vocab is None else self.draft_vocab
        table = ParamSpec((cfg.vocab_size, cfg.hidden_size), (None, "embed"))
        return TaskParams(
            self.head_specs(),
            Frozen(
                final_norm=norm_specs(cfg, cfg.hidden_size),
                embed=table if self.reads_tokens else None,
                rows=ParamSpec((drafted, cfg.hidden_size), ("vocab", "embed")),
                row_of=ParamSpec((cfg.vocab_size,), (None,), Constant(0.0), jnp.int32),
            ),
        )

    def init(self, key: jax.Array, data: grain.IterDataset | None, context: Context) -> TaskParams:
        """Initial heads, and the frozen parts from the target, in the context's shardings."""
        target, cfg = self.model.params, self.model.cfg
        all_ids = jnp.arange(cfg.vocab_size, dtype=jnp.int32)
        if self.vocabulary is None:
            rows, row_of = head_rows(target, cfg, all_ids), all_ids
        else:
            ids = self.vocabulary.ids
            rows = self.vocabulary.rows
            row_of = jnp.full(all_ids.shape, -1, jnp.int32).at[ids].set(all_ids[: ids.shape[0]])
        embed = self.embeddings() if self.reads_tokens else None
        params = TaskParams(self.init_heads(key), Frozen(target.final_norm, embed, rows, row_of))
        return context.place(params, self.specs())

    def partition(self, params: TaskParams) -> tuple[Any, Frozen]:
        """The heads are trained, the target's parts are not."""
        return params.heads, params.frozen

    def combine(self, trained: Any, rest: Frozen) -> TaskParams:
        """The inverse of :meth:`partition`."""
        return TaskParams(trained, rest)

    def data(self, context: Context) -> grain.IterDataset:
        """Training batches."""
        config = context.config
        return make_hidden_dataset(
            self.texts,
            self.sequence_length,
            config.batch_size,
            config.seed,
            context.process_index,
            context.process_count,
        )

    def evaluate(self, params: TaskParams, context: Context) -> dict[str, float]:
        """Teacher-forced top-1 and top-3 accuracy per head on the held-out texts."""
        count = jax.jit(self._hits)
        batches = heldout_batches(
            self.texts,
            self.sequence_length,
            context.config.batch_size,
            context.process_index,
            context.process_count,
        )
        total = None
        for batch in batches:
            hits = count(params, context.put(batch))
            total = hits if total is None else total + hits
        return {} if total is None else total.rates()

    def save(self, heads: Any, directory: str | pathlib.Path, dtype: Any) -> None:
        """Write trained heads for use in decoding (see :mod:`models.drafter_io`)."""
        ids = None if self.vocabulary is None else self.vocabulary.ids
        save_drafter(directory, self.kind, self.heads, heads, self.model.cfg, ids, dtype)

    def _hits(self, params: TaskParams, batch: dict[str, Any]) -> Hits:
        x = examples(params.frozen, self.model.cfg, batch)
        return count_hits(self.outputs(params, x), self.matrices(params), x.labels, x.mask)


def _metrics(x: Examples, **parts: Float[Array, " heads"]) -> dict[str, Array]:
    """Each part per head, and how many targets the batch has."""
    values = {f"{name}/head{i + 1}": v for name, vs in parts.items() for i, v in enumerate(vs)}
    return values | {"weight": jnp.sum(x.mask)}


@dataclasses.dataclass(frozen=True)
class CloverTask(DrafterTask):
    """Clover-2 or Clover-1."""

    heads: clover.CloverConfig

    kind = "clover"

    def head_specs(self) -> clover.Params:
        """See :class:`DrafterTask`."""
        return clover.specs(self.heads, self.model.cfg)

    def init_heads(self, key: jax.Array) -> clover.Params:
        """Layers and norms from the target, the rest near the identity."""
        return clover.init_from_target(self.model.params, self.model.cfg, self.heads, key)

    def outputs(self, params: TaskParams, x: Examples) -> Float[Array, "heads b t width"]:
        """See :class:`DrafterTask`."""
        embeds = jnp.take(jax.lax.stop_gradient(params.frozen.embed), x.next_tokens, axis=0)
        return clover.head_hidden(
            params.heads, self.heads, self.model.cfg, x.pre_norm, embeds.astype(x.pre_norm.dtype)
        )

    def loss(
        self, params: TaskParams, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Clover's loss; see :func:`research.speculative.clover.objective.clover_loss`."""
        x = examples(params.frozen, self.model.cfg, batch)
        rows = jax.lax.stop_gradient(params.frozen.rows)
        out = self.outputs(params, x)
        total, parts = clover_loss(self.heads, out, x.target, x.labels, rows, x.mask)
        return total, _metrics(x, regression=parts[:, 0], cross_entropy=parts[:, 1])


@dataclasses.dataclass(frozen=True)
class MedusaTask(DrafterTask):
    """Medusa-1; labels are the text's tokens.

    Heads with matrices of their own over a draft vocabulary need ``heads.draft_vocab`` equal to
    ``draft_vocab``.
    """

    heads: medusa.MedusaConfig

    kind = "medusa"
    reads_tokens = False

    def head_specs(self) -> medusa.Params:
        """See :class:`DrafterTask`."""
        return medusa.specs(self.heads, self.model.cfg)

    def init_heads(self, key: jax.Array) -> medusa.Params:
        """Blocks that do nothing; matrices copied from the target's head."""
        return medusa.init_from_target(
            self.model.params, self.model.cfg, self.heads, key, self.vocabulary
        )

    def outputs(self, params: TaskParams, x: Examples) -> Float[Array, "heads b t width"]:
        """See :class:`DrafterTask`."""
        return medusa.head_hidden(params.heads, self.heads, x.hidden)

    def matrices(self, params: TaskParams) -> Float[Array, "heads vocab width"]:
        """Own matrices, or the frozen head."""
        own = params.heads.matrices
        return params.frozen.rows[None] if own is None else own

    def loss(
        self, params: TaskParams, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Medusa's loss; see :func:`research.speculative.clover.objective.medusa_loss`."""
        x = examples(params.frozen, self.model.cfg, batch)
        rows = jax.lax.stop_gradient(params.frozen.rows)
        out = self.outputs(params, x)
        total, parts = medusa_loss(self.heads, params.heads, out, x.labels, rows, x.mask)
        return total, _metrics(x, cross_entropy=parts)


@dataclasses.dataclass(frozen=True)
class EagleTask(DrafterTask):
    """The EAGLE-like drafter, rolled out for ``eval_heads`` steps when it is evaluated."""

    heads: eagle.EagleConfig
    eval_heads: int = 5

    kind = "eagle"

    def head_specs(self) -> eagle.Params:
        """See :class:`DrafterTask`."""
        return eagle.specs(self.heads, self.model.cfg)

    def embeddings(self) -> Float[Array, "vocab width"]:
        """The target's input embeddings."""
        return self.model.params.embed

    def outputs(self, params: TaskParams, x: Examples) -> Float[Array, "heads b t width"]:
        """Successive predictions from every position, each fed with those before it."""
        embeds = self._embeds(params, x)
        return eagle_rollout(params.heads, self.model.cfg, x.hidden, embeds, self.eval_heads)

    def loss(
        self, params: TaskParams, batch: dict[str, Any], key: jax.Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """EAGLE's loss, with uniform noise on the input features."""
        x = examples(params.frozen, self.model.cfg, batch)
        width = self.heads.noise * 512.0 / x.hidden.shape[1]
        noise = jax.random.uniform(key, x.hidden.shape, x.hidden.dtype, -width, width)
        rows = jax.lax.stop_gradient(params.frozen.rows)
        out, _ = eagle.forward(
            params.heads, self.model.cfg, x.hidden + noise, self._embeds(params, x)
        )
        total, parts = eagle_loss(self.heads, out, x.target, rows, x.mask)
        return total, _metrics(x, regression=parts[:1], cross_entropy=parts[1:])

    def _embeds(self, params: TaskParams, x: Examples) -> Float[Array, "b t width"]:
        table = jax.lax.stop_gradient(params.frozen.embed)
        return jnp.take(table, x.next_tokens, axis=0).astype(x.hidden.dtype)
