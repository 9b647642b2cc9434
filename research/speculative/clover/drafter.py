"""Clover drafters: a static tree filled level by level, or a small budget spent by confidence.

Every node carries its own recurrent state. The augmenting block reads only true hidden states, each
with the token after it; what is guessed passes through the heads alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.drafter import Context, Draft, FixedTree, Request, Target, TargetOutputs
from inference.drafters.levels import check_sampled_tree, draft_levels
from inference.drafters.pairs import PairState, Run, init_pairs, keep_committed, run_pairs
from models import clover
from models.attention import Step
from models.draft_head import (
    draft_logits,
    draft_vocabulary,
    head_rows,
    token_ids,
)
from models.drafter_io import load_settings, load_weights
from models.load import Model
from ops.dynamic_tree import BudgetLevel, budget_level
from ops.tree import EAGLE_25, StaticTree, tree_from_parents, tree_from_paths


@struct.dataclass
class CloverParams:
    """The heads, and the tokens they may draft (None: all)."""

    heads: Any
    vocabulary: Any = None  # DraftVocabulary


class _PairDrafting:
    """What both Clover drafters share: the block over committed pairs, and the heads."""

    cfg: clover.CloverConfig
    max_depth: int

    def init(
        self,
        params: CloverParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> PairState:
        """The block's pass over the prompt's pairs; prompts of one token have none yet."""
        return init_pairs(
            self._run(params, target),
            clover.augment_config(self.cfg, target.cfg),
            request,
            prompt.pre_norm,
            target.cfg.hidden_size,
            self.max_depth,
            capacity,
            target.params.final_norm.scale.dtype,
        )

    def observe(
        self,
        params: CloverParams,
        state: PairState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> PairState:
        """The true hidden states of the committed nodes, for the block's next pass."""
        return keep_committed(state, draft, outputs.pre_norm, path, n, root)

    def _run(self, params: CloverParams, target: Target) -> Run:
        def run(hidden: Array, tokens: Array, step: Step, layers: Any) -> tuple[Array, Any]:
            embeds = head_rows(target.params, target.cfg, tokens)
            return clover.augment(params.heads, self.cfg, target.cfg, hidden, embeds, step, layers)

        return run

    def _score(
        self,
        params: CloverParams,
        target: Target,
        level: int,
        tokens: Int[Array, "b w"],
        states: Float[Array, "b w width"],
    ) -> tuple[Array, Array]:
        """States of nodes with children, and logits of their successors."""
        embeds = head_rows(target.params, target.cfg, tokens)
        states, out = clover.head(params.heads, self.cfg, target.cfg, states, embeds, level)
        return states, draft_logits(target.params, target.cfg, params.vocabulary, out)


@dataclasses.dataclass(frozen=True)
class CloverDrafter(FixedTree, _PairDrafting):
    """Clover over a static tree; parameters are :class:`CloverParams`.

    Attributes:
        sampled: draw each node's children without replacement from its warped law, which is kept
            for the verifier (the official code's probabilities over ten kept logits are not the
            law of anything). A row at temperature 0 among rows that sample has one child per node.
            Otherwise, and where no row samples, children are
            the most likely tokens, a fixed set; both are lossless.

    Raises:
        ValueError: Clover-1 with a tree deeper than its heads, or sampled drafts over a tree with
            gaps in its ranks.
    """

    cfg: clover.CloverConfig
    tree: StaticTree = EAGLE_25
    sampled: bool = False
    needs: frozenset[str] = frozenset({"pre_norm"})

    def __post_init__(self):
        _check_depth(self.cfg, self.tree.max_depth)
        if self.sampled:
            check_sampled_tree(self.tree)

    def propose(
        self,
        params: CloverParams,
        state: PairState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, PairState, Any]:
        """New pairs first, then one head per level on the nodes that have children."""
        state = run_pairs(self._run(params, target), state, context.extent)

        def expand(number: int, tokens: Array, states: Array, carry: None) -> tuple:
            states, logits = self._score(params, target, number, tokens, states)
            return states, logits, carry

        draft, _ = draft_levels(
            self.tree,
            root,
            state.last,
            state.ready,
            expand,
            None,
            params.vocabulary,
            target.cfg,
            context,
            self.sampled,
        )
        return draft, state, cache


@dataclasses.dataclass(frozen=True)
class CloverBudgetDrafter(_PairDrafting):
    """Clover-1's drafting for small budgets; parameters are :class:`CloverParams`.

    Each level keeps its likely tokens, the best by joint probability, until the budget is spent
    (:func:`ops.dynamic_tree.budget_level`). The tree depends on the text alone: a fixed set.

    Attributes:
        budget: drafted tokens of the whole tree (the authors' 4 at large batch, 20 elsewhere).
        depth: most levels; None takes one per trained head.
        top_p: of each node, tokens until this cumulative probability is exceeded.
        ratio: drop tokens below this share of the node's best.

    Raises:
        ValueError: a budget or depth below 1, or Clover-1 with more levels than heads.
    """

    cfg: clover.CloverConfig
    budget: int = 20
    depth: int | None = None
    top_p: float = 0.95
    ratio: float = 0.25
    needs: frozenset[str] = frozenset({"pre_norm"})

    def __post_init__(self):
        if self.budget < 1 or self.max_depth < 1:
            raise ValueError(
                f"drafting needs a budget and depth of at least 1, got {self.budget} and "
                f"{self.max_depth}."
            )
        _check_depth(self.cfg, self.max_depth)

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.budget + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return min(self.budget, self.cfg.num_heads if self.depth is None else self.depth)

    def propose(
        self,
        params: CloverParams,
        state: PairState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, PairState, Any]:
        """New pairs first, then levels until the budget is spent."""
        state = run_pairs(self._run(params, target), state, context.extent)
        batch = root.shape[0]
        width = self.width
        levels = _Levels(
            tokens=root.astype(jnp.int32)[:, None],
            states=state.last[:, None],
            joint=jnp.ones((batch, 1), jnp.float32),
            valid=state.ready[:, None],
            node=jnp.zeros((batch, 1), jnp.int32),
            budget=jnp.full((batch,), self.budget, jnp.int32),
            all_tokens=jnp.full((batch, width), -1, jnp.int32).at[:, 0].set(root),
            all_parents=jnp.full((batch, width), -1, jnp.int32),
        )
        for number in range(1, self.max_depth + 1):
            levels = self._level(params, target, number, levels)
        tree = tree_from_parents(levels.all_parents)
        draft = Draft(
            tokens=levels.all_tokens,
            parent=tree.parent,
            depth=tree.depth,
            mask=tree.mask,
            valid=tree.valid,
            max_depth=self.max_depth,
        )
        return draft, state, cache

    def _level(
        self, params: CloverParams, target: Target, number: int, levels: "_Levels"
    ) -> "_Levels":
        states, logits = self._score(
            params, target, number, jnp.maximum(levels.tokens, 0), levels.states
        )
        probs = jax.nn.softmax(logits, axis=-1)

        def keep(probs: Array, joint: Array, valid: Array, budget: Array) -> BudgetLevel:
            return budget_level(
                probs, joint, valid, budget, self.budget, top_p=self.top_p, ratio=self.ratio
            )

        kept = jax.vmap(keep)(probs, levels.joint, levels.valid, levels.budget)
        source = jnp.maximum(kept.source, 0)
        used = self.budget - levels.budget
        node = 1 + used[:, None] + jnp.arange(self.budget, dtype=jnp.int32)[None]
        node = jnp.where(kept.valid, node, self.width)  # beyond the end: dropped
        parent = jnp.take_along_axis(levels.node, source, axis=1)
        tokens = token_ids(params.vocabulary, jnp.maximum(kept.tokens, 0)).astype(jnp.int32)
        row = jnp.arange(node.shape[0])[:, None]
        return _Levels(
            tokens=tokens,
            states=jnp.take_along_axis(states, source[:, :, None], axis=1),
            joint=kept.joint,
            valid=kept.valid,
            node=node,
            budget=kept.budget,
            all_tokens=levels.all_tokens.at[row, node].set(tokens, mode="drop"),
            all_parents=levels.all_parents.at[row, node].set(parent, mode="drop"),
        )


@struct.dataclass
class _Levels:
    """The newest level of a growing tree, and the tree so far."""

    tokens: Any  # (b, w)
    states: Any  # (b, w, width), the parents' states
    joint: Any  # (b, w)
    valid: Any  # (b, w)
    node: Any  # (b, w) number in the tree
    budget: Any  # (b,)
    all_tokens: Any  # (b, n)
    all_parents: Any  # (b, n)


def _check_depth(cfg: clover.CloverConfig, depth: int) -> None:
    if cfg.variant == "clover1" and depth > cfg.num_heads:
        raise ValueError(
            f"the tree has depth {depth} but this Clover-1 has {cfg.num_heads} heads of its own "
            f"weights: prune the tree or train more heads."
        )


def load(directory: str, model: Model) -> tuple[CloverDrafter, CloverParams]:
    """Trained heads for a model, over EAGLE's static tree; Clover-1's as deep as it has heads.

    Raises:
        FileNotFoundError, ValueError: see :mod:`models.drafter_io`.
    """
    settings = load_settings(directory, "clover", model.cfg)
    cfg = clover.CloverConfig(**settings["config"])
    ids = settings["draft_vocabulary"]
    vocabulary = None if ids is None else draft_vocabulary(model.params, model.cfg, ids)
    weights = load_weights(directory, clover.specs(cfg, model.cfg))
    depth = cfg.num_heads if cfg.variant == "clover1" else EAGLE_25.max_depth
    tree = tree_from_paths(path for path in EAGLE_25.paths if len(path) <= depth)
    return CloverDrafter(cfg, tree), CloverParams(weights, vocabulary)
