"""EAGLE-2: the feature drafter with a tree that grows where it is sure of itself.

Source: arXiv 2406.16858. A level runs the layer on the best nodes of the level above; of all
nodes made, those of the highest path probability are kept (:func:`ops.dynamic_tree.dynamic_tree`).
The tree depends on the text alone, so its tokens are a fixed set for the verifier.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from inference.drafters.eagle import EagleDrafter, EagleParams
from inference.drafters.eagle import load as load_static
from inference.drafters.pairs import PairState, Run, run_nodes, run_pairs
from models.draft_head import draft_logits, token_ids
from models.load import Model
from ops.dynamic_tree import DynamicTree, Frontier, dynamic_tree
from ops.tree import tree_from_parents


@dataclasses.dataclass(frozen=True)
class EagleTreeDrafter(EagleDrafter):
    """Feature autoregression over EAGLE-2's tree; parameters are :class:`EagleParams`.

    Attributes:
        total: drafted nodes kept; the published "60" counts the root.
        depth: expansions after the first, so nodes lie up to ``depth + 1`` deep.
        top_k: nodes expanded per level, and children of each.
        least: nodes of a path probability below it are left out, 0 keeps ``total``. The drafter's
            own probability estimates that a node is accepted, so what a node must promise is what
            it costs: see :func:`inference.tuning.pass_seconds`.
        widths: passes that trees with fewer nodes take.

    Raises:
        ValueError: sampled drafts, which this tree is not made of, or ``least`` outside [0, 1).
    """

    total: int = 24
    depth: int = 4
    top_k: int = 8
    least: float = 0.0
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        if self.sampled:
            raise ValueError("a dynamic tree is a fixed set of tokens: leave sampled out.")
        if not 0 <= self.least < 1:
            raise ValueError(f"least is a probability below 1, got {self.least}.")

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.total + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return min(self.depth + 1, self.total)

    def init(
        self,
        params: EagleParams,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> PairState:
        """The layer's pass over the prompt's pairs; its cache has room for all expansions."""
        return super().init(params, target, request, prompt, capacity + self.depth * self.top_k)

    def propose(
        self,
        params: EagleParams,
        state: PairState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, PairState, Any]:
        """New pairs first; the tree grows from their last output."""
        run = self._run(params, target)
        state = run_pairs(run, state, context.extent)
        made = self._grow(run, params, state, target, context.extent)
        tokens, tree = prune(made, jnp.log(self.least))
        drafted = token_ids(params.vocabulary, jnp.maximum(tokens, 0))
        first = jnp.arange(self.width)[None] == 0
        valid = tree.valid & (state.ready[:, None] | first)
        draft = Draft(
            tokens=jnp.where(first, root[:, None], jnp.where(valid, drafted, -1)).astype(jnp.int32),
            parent=tree.parent,
            depth=tree.depth,
            mask=tree.mask,
            valid=valid,
            max_depth=self.max_depth if self.max_depth < self.total else None,
        )
        return draft, state, cache

    def _grow(
        self, run: Run, params: EagleParams, state: PairState, target: Target, extent: int | None
    ) -> DynamicTree:
        """The tree, its tokens as indices into the draft vocabulary."""
        slots = None if extent is None else extent + self.depth * self.top_k

        def scores(features: Float[Array, "*b width"]) -> Float[Array, "*b d"]:
            logits = draft_logits(target.params, target.cfg, params.vocabulary, features)
            return jax.nn.log_softmax(logits, axis=-1)

        def step(carry: Any, frontier: Frontier) -> Any:
            features, own = carry
            given = jnp.take_along_axis(features, frontier.source[..., None], axis=1)
            # A node's own pair stands one position before the token it carries.
            at = own.next_position[:, None] + frontier.level
            positions = jnp.broadcast_to(at, frontier.tokens.shape)
            tokens = token_ids(params.vocabulary, frontier.tokens)
            features, own = run_nodes(run, own, given, tokens, positions, frontier.ancestors, slots)
            return scores(features), (features, own)

        # All nodes of the first level continue the last pair's output.
        last = jnp.repeat(state.last[:, None], self.top_k, axis=1)
        made, _ = dynamic_tree(
            step, scores(state.last), (last, state.cache), self.total, self.depth, self.top_k
        )
        return made


def prune(made: DynamicTree, least: Float[Array, ""] | float) -> tuple[Int[Array, "b n"], Any]:
    """Tokens and tree of the nodes that score at least ``least``, moved to the front.

    No child outscores its parent, so what is kept is a tree; the order stays that of creation.
    """
    keep = (made.scores >= least) & made.tree.valid
    order = jnp.argsort(~keep, axis=1, stable=True)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    parent = jnp.take_along_axis(made.tree.parent, order, axis=1)
    moved = jnp.take_along_axis(place, jnp.maximum(parent, 0), axis=1)
    kept = jnp.take_along_axis(keep, order, axis=1)
    tree = tree_from_parents(jnp.where(kept & (parent >= 0), moved, -1))
    return jnp.take_along_axis(made.tokens, order, axis=1), tree


def load(directory: str, model: Model) -> tuple[EagleTreeDrafter, EagleParams]:
    """A trained layer for a model, with EAGLE-2's tree.

    Raises:
        FileNotFoundError, ValueError: see :mod:`models.drafter_io`.
    """
    drafter, params = load_static(directory, model)
    return EagleTreeDrafter(drafter.cfg), params
