"""Medusa: every level of a static tree takes its candidates from one head's single list.

The heads do not see what was guessed before them, so all nodes of a level share one candidate list.
Source: arXiv 2401.10774; the candidates are a fixed set, verified without loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from inference.drafter import (
    Context,
    Draft,
    FixedTree,
    Request,
    Target,
    TargetOutputs,
    committed,
    static_draft,
)
from models import medusa
from models.draft_head import draft_vocabulary, token_ids
from models.drafter_io import load_settings, load_weights
from models.load import Model
from ops.tree import MEDUSA_63, StaticTree, tree_from_paths


@struct.dataclass
class MedusaParams:
    """The heads, and the tokens they may draft (None: all)."""

    heads: Any
    vocabulary: Any = None  # DraftVocabulary


@struct.dataclass
class MedusaState:
    """The target's post-norm hidden state before each row's root."""

    hidden: Any  # (b, width)
    ready: Any  # (b,) bool: False before a text's second token


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(FixedTree):
    """Medusa heads over a static tree; parameters are :class:`MedusaParams`.

    Raises:
        ValueError: the tree is deeper than there are heads.
    """

    cfg: medusa.MedusaConfig
    tree: StaticTree = MEDUSA_63
    needs: frozenset[str] = frozenset({"hidden"})

    def __post_init__(self):
        if self.tree.max_depth > self.cfg.num_heads:
            raise ValueError(
                f"the tree has depth {self.tree.max_depth} but there are {self.cfg.num_heads} "
                f"Medusa heads: prune the tree or train more heads."
            )

    def init(
        self,
        params: MedusaParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> MedusaState:
        """The hidden state before each prompt's last token; none for prompts of one token."""
        medusa.check_vocabulary(self.cfg, params.vocabulary)
        batch = request.lengths.shape[0]
        if prompt.hidden is None:
            width, dtype = target.cfg.hidden_size, target.params.final_norm.scale.dtype
            return MedusaState(jnp.zeros((batch, width), dtype), jnp.zeros((batch,), bool))
        last = jnp.maximum(request.lengths - 2, 0)[:, None, None]
        hidden = jnp.take_along_axis(prompt.hidden, last, axis=1)[:, 0]
        return MedusaState(hidden, request.lengths > 1)

    def propose(
        self,
        params: MedusaParams,
        state: MedusaState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, MedusaState, Any]:
        """The most likely tokens of each head, spread over the tree."""
        logits = medusa.head_logits(
            params.heads, self.cfg, target.params, target.cfg, params.vocabulary, state.hidden
        )
        count = int(self.tree.rank.max()) + 1
        if logits.shape[-1] < count:
            raise ValueError(
                f"the tree takes {count} candidates of a head but {logits.shape[-1]} tokens can be "
                f"drafted: use a narrower tree or a larger draft vocabulary."
            )
        lists = token_ids(params.vocabulary, jax.lax.top_k(logits, count)[1])  # (heads, b, count)
        drafted = lists[self.tree.depth[1:] - 1, :, self.tree.rank[1:]].T
        tokens = jnp.concatenate([root[:, None], drafted], axis=1).astype(jnp.int32)
        valid = state.ready[:, None] | jnp.asarray(np.arange(self.tree.size) == 0)[None]
        return static_draft(self.tree, tokens, valid), state, cache

    def observe(
        self,
        params: MedusaParams,
        state: MedusaState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> MedusaState:
        """The hidden state of the last committed node; finished rows keep theirs."""
        last = jnp.maximum(n - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(committed(outputs.hidden, path), last, axis=1)[:, 0]
        return MedusaState(jnp.where((n > 0)[:, None], hidden, state.hidden), state.ready | (n > 0))


def load(directory: str, model: Model) -> tuple[MedusaDrafter, MedusaParams]:
    """Trained heads for a model, over Medusa's tree as deep as there are heads.

    Raises:
        FileNotFoundError, ValueError: see :mod:`models.drafter_io`.
    """
    settings = load_settings(directory, "medusa", model.cfg)
    cfg = medusa.MedusaConfig(**settings["config"])
    ids = settings["draft_vocabulary"]
    vocabulary = None if ids is None else draft_vocabulary(model.params, model.cfg, ids)
    weights = load_weights(directory, medusa.specs(cfg, model.cfg))
    tree = tree_from_paths(path for path in MEDUSA_63.paths if len(path) <= cfg.num_heads)
    return MedusaDrafter(cfg, tree), MedusaParams(weights, vocabulary)
