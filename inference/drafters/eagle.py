"""An EAGLE-like drafter: one layer that continues the target's features, over a static tree.

Sources: arXiv 2401.15077 (feature autoregression, static tree). Each level runs the layer on the
nodes that have children; their keys and values are scratch and are dropped after drafting.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from inference.drafter import Context, Draft, FixedTree, Request, Target, TargetOutputs
from inference.drafters.levels import check_sampled_tree, draft_levels
from inference.drafters.pairs import (
    PairState,
    Run,
    init_pairs,
    keep_committed,
    run_nodes,
    run_pairs,
)
from models import eagle
from models.attention import Step
from models.draft_head import draft_logits, draft_vocabulary
from models.drafter_io import load_settings, load_weights
from models.load import Model
from ops.tree import EAGLE_25, StaticTree
from ops.weights import take


@struct.dataclass
class EagleParams:
    """The layer, and the tokens it may draft (None: all)."""

    layer: Any
    vocabulary: Any = None  # DraftVocabulary


@dataclasses.dataclass(frozen=True)
class EagleDrafter(FixedTree):
    """Feature autoregression over a static tree; parameters are :class:`EagleParams`.

    Attributes:
        sampled: draw children without replacement from the drafter's warped law (for temperatures
            above 0) instead of taking its most likely tokens.

    Raises:
        ValueError: sampled drafts over a tree with gaps in its ranks.
    """

    cfg: eagle.EagleConfig
    tree: StaticTree = EAGLE_25
    sampled: bool = False
    needs: frozenset[str] = frozenset({"hidden"})

    def __post_init__(self):
        if self.sampled:
            check_sampled_tree(self.tree)

    def init(
        self,
        params: EagleParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> PairState:
        """The layer's pass over the prompt's pairs."""
        return init_pairs(
            self._run(params, target),
            eagle.layer_config(target.cfg),
            request,
            prompt.hidden,
            target.cfg.hidden_size,
            self.max_depth,
            capacity,
            target.params.final_norm.scale.dtype,
        )

    def propose(
        self,
        params: EagleParams,
        state: PairState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, PairState, Any]:
        """New pairs first; their last output drafts level 1, expanded nodes the deeper ones."""
        run = self._run(params, target)
        state = run_pairs(run, state, context.extent)

        def expand(number: int, tokens: Array, features: Array, own: Any) -> tuple:
            if number > 1:
                features, own = self._run_level(run, number, tokens, features, own, context.extent)
            logits = draft_logits(target.params, target.cfg, params.vocabulary, features)
            return features, logits, own

        draft, _ = draft_levels(
            self.tree,
            root,
            state.last,
            state.ready,
            expand,
            state.cache,
            params.vocabulary,
            target.cfg,
            context,
            self.sampled,
        )
        # Guessed entries of the layer's cache are forgotten by keeping the cache from before.
        return draft, state, cache

    def observe(
        self,
        params: EagleParams,
        state: PairState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> PairState:
        """The true features of the committed nodes, for the next round."""
        return keep_committed(state, draft, outputs.hidden, path, n, root)

    def _run(self, params: EagleParams, target: Target) -> Run:
        def run(features: Array, tokens: Array, step: Step, layers: Any) -> tuple[Array, Any]:
            embeds = take(target.params.embed, tokens)
            return eagle.forward(params.layer, target.cfg, features, embeds, step, layers)

        return run

    def _run_level(
        self,
        run: Run,
        number: int,
        tokens: Array,
        features: Array,
        own: Any,
        extent: int | None,
    ) -> tuple[Array, Any]:
        """The layer on the nodes that level ``number`` expands, seeing their own ancestors."""
        before = [level.expanded for level in self.tree.levels[1 : number - 1]]
        nodes = self.tree.levels[number - 1].expanded
        slots = np.concatenate([*before, nodes])  # the node in each scratch slot
        batch = tokens.shape[0]
        mask = jnp.asarray(self.tree.mask[np.ix_(nodes, slots)])
        # A node's own pair stands one position before the token it carries.
        positions = own.next_position[:, None] + jnp.asarray(self.tree.depth[nodes] - 1)[None]
        tree = jnp.broadcast_to(mask[None], (batch, *mask.shape))
        return run_nodes(run, own, features, tokens, positions, tree, extent)


def load(directory: str, model: Model) -> tuple[EagleDrafter, EagleParams]:
    """A trained layer for a model, over EAGLE's static tree.

    Raises:
        FileNotFoundError, ValueError: see :mod:`models.drafter_io`.
    """
    settings = load_settings(directory, "eagle", model.cfg)
    cfg = eagle.EagleConfig(**settings["config"])
    ids = settings["draft_vocabulary"]
    vocabulary = None if ids is None else draft_vocabulary(model.params, model.cfg, ids)
    weights = load_weights(directory, eagle.specs(cfg, model.cfg))
    return EagleDrafter(cfg), EagleParams(weights, vocabulary)
