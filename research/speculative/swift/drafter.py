"""SWIFT: the target drafts for itself with some of its sub-layers left out.

Source: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
arXiv 2410.06916. Which sub-layers is searched while serving (:mod:`.search`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.cache import Cache, check_capacity
from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from inference.drafters.scratch import run_scratch
from inference.engine import bucket
from models import decoder
from models.decoder import LayerChoice
from ops.sampling import Use, request_key, sample_without_replacement
from ops.tree import tree_from_parents
from research.speculative.swift.comb import build_comb, level_widths
from research.speculative.swift.matchness import matchness
from research.speculative.swift.search import (
    Search,
    SkipSet,
    candidates,
    checked_set,
    num_skipped,
    propose_bayes,
    propose_random,
    start_search,
    uniform_set,
    update_search,
)

Number = Any
CONTEXTS = ("first", "last")


@struct.dataclass
class Controls:
    """The numbers that steer drafting and search; all are data. Made by :func:`swift`."""

    stop_threshold: Number = 0.8  # draft on while the last token was at least so likely
    width_thresholds: Any = (0.95, 0.8, 0.5)
    skip_ratio: Number = 0.45
    search_every: Number = 1  # rounds
    bayes_every: Number = 25  # iterations
    max_tolerance: Number = 300
    max_score: Number = 0.95
    score_decay: Number = 1.0  # of the best score at a new call
    kappa: Number = 2.5
    noise: Number = 1e-2
    seed: Number = 2024
    skip: SkipSet | None = None  # in place of every second layer


@struct.dataclass
class SwiftState:
    """The search, which all rows and calls share, and the rounds of this call."""

    search: Search
    rounds: Any  # int32, of this call


@dataclasses.dataclass(frozen=True)
class SwiftDrafter:
    """Drafts a chain, or a comb tree around it, with the target's own layers. Its params are
    :class:`Controls`.

    Attributes:
        max_steps: longest chain.
        max_nodes: nodes of the tree, the root included; 0 drafts the chain alone. Leaves that do
            not fit are dropped from the deepest level upwards.
        sampled: draw the candidates of rows that sample from the draft's warped law, and verify
            them as drawn without replacement. Otherwise they are the most likely ones, a fixed
            set, and the text is that of plain sampling with the same seed.
        greedy_widths, sampling_widths: children by confidence, from sure to unsure.
        search: whether to look for a better set at all.
        context_window: tokens that a set is judged by, less one.
        context: judge by the ``first`` new tokens of a text (as the authors' code) or its ``last``.
        max_iterations: sets to try at most, and one.
        reset_on_new_prompt: begin each call with nothing tried.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown context.
    """

    max_steps: int = 25
    max_nodes: int = 64
    sampled: bool = True
    greedy_widths: tuple[int, ...] = (3, 5, 8, 10)
    sampling_widths: tuple[int, ...] = (1, 3, 5, 10)
    search: bool = True
    context_window: int = 32
    context: str = "first"
    max_iterations: int = 1000
    reset_on_new_prompt: bool = False
    needs: frozenset[str] = frozenset()
    shared_state: bool = True

    def __post_init__(self):
        if min(self.max_steps, self.context_window, self.max_iterations) < 1:
            raise ValueError("max_steps, context_window and max_iterations must be 1 or more.")
        if self.max_nodes and self.max_nodes < self.max_steps + 1:
            raise ValueError(
                f"a tree of {self.max_nodes} nodes cannot hold a chain of {self.max_steps} tokens "
                f"and the root: give max_nodes of {self.max_steps + 1} or more, or 0 for a chain."
            )
        for widths in (self.greedy_widths, self.sampling_widths):
            if len(widths) != 4 or min(widths) < 1:
                raise ValueError(f"widths are four numbers of 1 or more, got {widths}.")
        if self.context not in CONTEXTS:
            raise ValueError(
                f"unknown context {self.context!r}: choose one of {', '.join(CONTEXTS)}."
            )

    @property
    def width(self) -> int:
        """Nodes of every draft, the root included."""
        return self.max_nodes or self.max_steps + 1

    @property
    def max_depth(self) -> int:
        """Most drafted tokens that one round can accept."""
        return self.max_steps

    def init(
        self,
        params: Controls,
        target: Target,
        request: Request,
        prompt: TargetOutputs,
        capacity: int,
    ) -> SwiftState:
        """The search of the earlier call, or a new one."""
        check_capacity(self.width, capacity, "a draft")
        layers = target.cfg.num_layers
        search = None if request.memory is None else request.memory.search
        if search is None or self.reset_on_new_prompt:
            skip = uniform_set(layers) if params.skip is None else params.skip
            skip = jax.tree.map(jnp.array, skip)  # a copy, because the loop donates its state
            search = start_search(skip, self.max_iterations)
        else:
            best = search.best_score * jnp.asarray(params.score_decay, jnp.float32)
            search = dataclasses.replace(search, best_score=best)
        if search.points.shape != (self.max_iterations + 1, candidates(layers)):
            raise ValueError(
                f"the search had {search.points.shape} points and this model and drafter have "
                f"{(self.max_iterations + 1, candidates(layers))}: start without its state."
            )
        return SwiftState(search, jnp.zeros((), jnp.int32))

    def propose(
        self,
        params: Controls,
        state: SwiftState,
        target: Target,
        cache: Any,
        root: Int[Array, " b"],
        context: Context,
    ) -> tuple[Draft, SwiftState, Any]:
        """A chain until the draft is unsure, and the tree around it. The cache stays as it was."""
        skip = state.search.skip
        chain = self._draft_chain(params, skip, target, cache, root, context)
        hot = _sampling(context, root.shape[0])[:, None] & self._draws(context)
        widths = jnp.ones_like(chain.confidence, jnp.int32)
        if self.max_nodes:
            given = (params.width_thresholds, self.greedy_widths)
            drawn = (params.width_thresholds, self.sampling_widths)
            widths = jnp.where(
                hot, level_widths(chain.confidence, *drawn), level_widths(chain.confidence, *given)
            )
        comb = build_comb(chain.tokens, chain.there, widths, chain.steps, self.width)
        tree = tree_from_parents(comb.parent)
        probs = None
        if self._draws(context):
            shape = (root.shape[0], self.width, target.cfg.vocab_size)
            probs = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(
                jnp.zeros(shape, jnp.float32), comb.chain, chain.laws
            )
        kept = jnp.sum(~skip.attention) + jnp.sum(~skip.mlp)
        draft = Draft(
            tokens=comb.tokens.at[:, 0].set(root),
            parent=tree.parent,
            depth=tree.depth,
            mask=tree.mask,
            valid=tree.valid,
            probs=probs,
            layer_passes=chain.steps * (kept / 2).astype(jnp.float32),
            mode="swor" if self.sampled else "deterministic",
            max_depth=self.max_steps,
        )
        return draft, state, cache

    def observe(
        self,
        params: Controls,
        state: SwiftState,
        draft: Draft,
        outputs: TargetOutputs,
        path: Int[Array, "b d"],
        n: Int[Array, " b"],
        root: Int[Array, " b"],
    ) -> SwiftState:
        """Only count: what the search learns from is the text."""
        return dataclasses.replace(state, rounds=state.rounds + 1)

    def rounds_to_tuning(self, params: Controls, state: SwiftState) -> int:
        """See :class:`inference.drafter.Tuned`."""
        if not (self.search and bool(state.search.active)):
            return 0
        return 1 + -int(state.rounds) % int(params.search_every)

    def tune(
        self, params: Controls, state: SwiftState, target: Target, cache: Any, context: Context
    ) -> SwiftState:
        """One iteration of the search, if the round is one for it and a text is long enough.

        Rows with enough new tokens judge the set together, by the mean of their scores.
        """
        length, prompt = np.asarray(context.length), np.asarray(context.begin)
        counted = length - prompt > self.context_window + 1
        due = (int(state.rounds) - 1) % int(params.search_every) == 0
        if not (due and counted.any() and bool(state.search.active)):
            return state
        window = self.context_window + 1
        begin = prompt if self.context == "first" else length - window
        begin = np.where(counted, begin, 1).astype(np.int32)
        proposal = self._propose_set(params, state.search)
        scores = matchness(
            target,
            cache,
            context.tokens,
            jnp.asarray(begin),
            context.limit,
            proposal.skip,
            window,
            min(bucket(int(begin.max()) + window), cache.capacity),
        )
        score = np.asarray(scores)[counted].mean()
        search = update_search(
            state.search, proposal, score, params.max_score, params.max_tolerance
        )
        return dataclasses.replace(state, search=search)

    def _propose_set(self, params: Controls, search: Search) -> Any:
        layers = search.skip.attention.shape[0]
        skipped = num_skipped(layers, float(params.skip_ratio))
        iteration = int(search.iterations)
        rng = np.random.default_rng((int(params.seed), iteration))
        if (iteration + 1) % int(params.bayes_every) == 0:
            return propose_bayes(rng, search, skipped, float(params.kappa), float(params.noise))
        return propose_random(rng, candidates(layers), skipped)

    def _draft_chain(
        self,
        params: Controls,
        skip: SkipSet,
        target: Target,
        cache: Cache,
        root: Int[Array, " b"],
        context: Context,
    ) -> "_Chain":
        batch, vocab = root.shape[0], target.cfg.vocab_size
        k = min(max(*self.greedy_widths, *self.sampling_widths) if self.max_nodes else 1, vocab)
        layers = LayerChoice(skip_attention=skip.attention, skip_mlp=skip.mlp)

        def step(carry: tuple) -> tuple:
            i, token, open_, cache, chain = carry
            out, cache = run_scratch(
                target, cache, token[:, None], context.limit, context.extent, layers
            )
            logits = decoder.unembed(target.params, target.cfg, out.hidden[:, 0])
            tokens, there, laws = self._candidates(logits, context, i, k)
            raw = jax.nn.softmax(logits, axis=-1)
            confidence = jnp.take_along_axis(raw, tokens[:, :1], axis=1)[:, 0]
            chain = chain.write(i, open_, tokens, there, confidence, laws)
            more = confidence >= jnp.asarray(params.stop_threshold, jnp.float32)
            if context.limit is not None:
                more &= context.length + i + 2 < context.limit
            return i + 1, tokens[:, 0], open_ & more, cache, chain

        def going(carry: tuple) -> Array:
            return (carry[0] < self.max_steps) & jnp.any(carry[2])

        empty = _Chain(
            tokens=jnp.zeros((batch, self.max_steps, k), jnp.int32),
            there=jnp.zeros((batch, self.max_steps, k), bool),
            confidence=jnp.zeros((batch, self.max_steps), jnp.float32),
            steps=jnp.zeros((batch,), jnp.int32),
            laws=jnp.zeros((batch, self.max_steps, vocab), jnp.float32)
            if self._draws(context)
            else None,
        )
        start = (jnp.zeros((), jnp.int32), root, jnp.ones((batch,), bool), cache, empty)
        # The written slots stay scratch of the loop alone: the target's pass takes them again.
        return jax.lax.while_loop(going, step, start)[4]

    def _draws(self, context: Context) -> bool:
        """Whether any row may draw its candidates from laws, which the verifier then needs."""
        return self.sampled and not context.greedy

    def _candidates(
        self, logits: Float[Array, "b v"], context: Context, i: Array, k: int
    ) -> tuple[Int[Array, "b k"], Bool[Array, "b k"], Any]:
        """Tokens in the order to try, which exist, and the law they come from, if any."""
        best = jax.lax.top_k(logits, k)[1].astype(jnp.int32)
        everywhere = jnp.ones(best.shape, bool)
        if not self._draws(context):
            return best, everywhere, None
        hot = _sampling(context, logits.shape[0])[:, None]
        law = context.sampling.per_row(logits.shape[0]).warp(logits)
        # Greedy rows are verified alike whatever law is named, if it has all candidates.
        law = jnp.where(hot, law, 1.0 / logits.shape[-1])

        def draw(seed: Array, at: Array, law: Array) -> tuple[Array, Array]:
            # Depth as sibling: draws that were not decided on may have changed how many leaves
            # fit, so the same index needs a fresh draw in a later round.
            return sample_without_replacement(request_key(seed, at + i, Use.DRAFT, i), law, k)

        drawn, there = jax.vmap(draw)(context.seeds, context.length, law)
        drawn = jnp.maximum(drawn, 0)
        return jnp.where(hot, drawn, best), jnp.where(hot, there, everywhere), law


@struct.dataclass
class _Chain:
    """What was drafted step by step, up to each row's own end."""

    tokens: Any  # (b, s, k), the chain's first
    there: Any
    confidence: Any  # (b, s)
    steps: Any  # (b,)
    laws: Any = None  # (b, s, v)

    def write(
        self, i: Array, open_: Array, tokens: Array, there: Array, confidence: Array, laws: Any
    ) -> "_Chain":
        """With step ``i`` of the rows that still draft."""
        return _Chain(
            tokens=self.tokens.at[:, i].set(tokens),
            there=self.there.at[:, i].set(there),
            confidence=self.confidence.at[:, i].set(confidence),
            steps=self.steps + open_,
            laws=None if laws is None else self.laws.at[:, i].set(laws),
        )


def _sampling(context: Context, batch: int) -> Bool[Array, " b"]:
    """Which rows sample."""
    return context.sampling.per_row(batch).temperature > 0


def swift(
    cfg: decoder.Config, skip: SkipSet | None = None, controls: Any = None, **settings: Any
) -> tuple[SwiftDrafter, Controls]:
    """The drafter and its controls for a model.

    Args:
        skip: the set to begin with (attention and MLP vectors); default every second layer.
        controls: fields of :class:`Controls` that are not the default's, by name.
        settings: fields of :class:`SwiftDrafter`.

    Raises:
        ValueError: a model with nothing to skip, a set that skips the first or the last layer, or
            numbers out of their range.
    """
    made = Controls(**(controls or {}))
    candidates(cfg.num_layers)
    if skip is not None:
        made = dataclasses.replace(made, skip=checked_set(cfg.num_layers, skip.attention, skip.mlp))
    drafter = SwiftDrafter(**settings)
    if drafter.search:
        num_skipped(cfg.num_layers, made.skip_ratio)
    if not 0 <= made.stop_threshold <= 1 or min(made.search_every, made.bayes_every) < 1:
        raise ValueError(
            f"stop_threshold {made.stop_threshold} must be a probability, and search_every "
            f"{made.search_every} and bayes_every {made.bayes_every} 1 or more."
        )
    if len(made.width_thresholds) != 3:
        raise ValueError(f"there are three thresholds of widths, got {made.width_thresholds}.")
    return drafter, made


def load(argument: str, model: Any) -> tuple[SwiftDrafter, Controls]:
    """The drafter with its usual settings, or a chain of at most ``argument`` tokens.

    Raises:
        ValueError: an argument that is no number of tokens.
    """
    if not argument:
        return swift(model.cfg)
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"SWIFT drafts a chain of 1 or more tokens, got {argument!r}: swift:4.")
    return swift(model.cfg, max_steps=int(argument), max_nodes=0)
