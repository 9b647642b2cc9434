"""Generation for a batch of prompts: prefill in chunks, then the compiled loop.

The host only chooses static shapes (cache capacity, prefill chunk, the bucket of slots that
attention reads), all powers of two, so that programs are few and reused.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.cache import Cache, check_capacity, init_cache
from inference.checks import check_context, check_drafts, check_prompts, check_reach
from inference.drafter import (
    Context,
    Drafter,
    DraftPrompts,
    NoDrafter,
    Request,
    Target,
    TargetOutputs,
    Tuned,
    narrower_widths,
    prompt_needs,
    shares_state,
)
from inference.loop import State, Stats, decode_rounds, init_stats, prefill_chunk
from models import decoder
from ops.sampling import SamplingParams

SMALLEST_BUCKET = 128


def bucket(n: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The smallest power of two that is at least ``n`` and ``smallest``."""
    return max(smallest, 1 << max(0, n - 1).bit_length())


def as_ids(eos: Sequence[int]) -> jax.Array:
    """Token ids as an int32 array, also if there are none."""
    return jnp.asarray(np.asarray(eos, np.int32).reshape(-1))


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated: new tokens per prompt (prompt not included) and the loop's counters.

    ``drafter_state`` is what a drafter with shared state remembers, for the next call.
    """

    tokens: list[list[int]]
    stats: Stats
    drafter_state: Any = None

    @property
    def tokens_per_pass(self) -> float:
        """Emitted tokens per target pass, over all rows."""
        return float(np.sum(self.stats.emitted) / max(1, np.sum(self.stats.rounds)))


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model ready to decode.

    Attributes:
        params: the model's weights, unstacked (:func:`make_engine` does it).
        cfg: the model's config.
        drafter, drafter_params: how tokens are proposed; default: not at all.
        policy: attention policy; default dense with the config's windows.
        widths: passes narrower than the drafter's, for drafts that do not fill it; default: those
            that the drafter asks for. Each is one more copy of the layers to compile.
        rule: verification rule in place of the drafter's own (``typical`` is lossy).
        prefill_size: tokens per prefill chunk.
        context_limit: longest text; default the config's ``max_length``, or the policy's own if
            that is less. More than the policy's is refused.
    """

    params: Any
    cfg: decoder.Config
    drafter: Drafter = NoDrafter()
    drafter_params: Any = None
    policy: Any = None
    widths: tuple[int, ...] | None = None
    rule: str | None = None
    prefill_size: int = 512
    context_limit: int | None = None

    @property
    def policy_in_force(self) -> Any:
        """The attention policy, or the model's own."""
        return decoder.default_policy(self.cfg) if self.policy is None else self.policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
        eos: Sequence[int] = (),
        rounds_per_call: int | None = None,
        on_progress: Callable[[list[list[int]]], None] | None = None,
        drafter_state: Any = None,
        draft_prompts: Sequence[Sequence[int]] | None = None,
    ) -> Generation:
        """Continue each prompt by up to ``max_new_tokens`` tokens, each row as if it were alone.

        Args:
            prompts: token ids; lengths may differ.
            sampling: default greedy.
            seeds: one per prompt (default 0, 1, ...); with the index of a token they fix its draw.
            eos: ids that end a row; the end token is kept.
            rounds_per_call: return to the host every so many rounds.
            on_progress: called then with the new tokens so far.
            drafter_state: ``Generation.drafter_state`` of an earlier call, to go on from there.
            draft_prompts: what the drafter reads in place of each prompt, for drafters with a
                context of their own; each must end with its prompt's last token.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, a text beyond the context,
                or a drafter state or draft prompts given to a drafter that has no use for them.
        """
        self.check(prompts, max_new_tokens, seeds)
        if drafter_state is not None and not shares_state(self.drafter):
            raise ValueError(
                f"{type(self.drafter).__name__} keeps no state between calls: "
                "leave drafter_state out."
            )
        if draft_prompts is not None:
            check_drafts(self.drafter, prompts, draft_prompts, max_new_tokens, self.cfg.vocab_size)
        sampling = SamplingParams.make() if sampling is None else sampling
        state, seeds_array = self.start(
            prompts, max_new_tokens, sampling, seeds, drafter_state, draft_prompts=draft_prompts
        )
        state = self.run(
            state,
            seeds_array,
            sampling,
            eos,
            rounds_per_call,
            lambda s: on_progress(generated(s, prompts)) if on_progress else None,
        )
        return Generation(
            generated(state, prompts),
            jax.tree.map(np.asarray, state.stats),
            state.drafter if shares_state(self.drafter) else None,
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,
        drafter_state: Any = None,
        capacity: int | None = None,
        draft_prompts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[State, jax.Array]:
        """Prefill: the loop's state before the first round, and the seeds as an array.

        Args:
            max_new_tokens: one number, or one per prompt.
            capacity: slots per row; default: as many as these prompts need.

        Raises:
            ValueError: prompts that do not fit ``capacity`` with their new tokens and a draft.
        """
        batch, longest = len(prompts), max(len(p) for p in prompts)
        lengths = np.array([len(p) for p in prompts], np.int32)
        limits = lengths + np.asarray(max_new_tokens, np.int32)
        chunk = min(self.prefill_size, bucket(longest, 16))
        chunks = -(-(longest - 1) // chunk)
        needed = max(chunks * chunk, int(limits.max())) + self.drafter.width
        if capacity is None:
            capacity = bucket(needed + chunk)
        check_capacity(needed, capacity, "the longest text with its draft")
        tokens = np.full((batch, capacity), -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        limit = jnp.asarray(limits)
        seeds_array = jnp.asarray(
            np.arange(batch) if seeds is None else np.asarray(seeds), jnp.int32
        )
        policy = self.policy_in_force
        dtype = self.params.final_norm.scale.dtype
        cache = self._empty_cache(batch, capacity, dtype, policy.key_width(self.cfg))
        cache, outputs = self._prefill(cache, policy, tokens, lengths, limit, chunk, chunks)
        request = Request(
            tokens=jnp.asarray(tokens[:, : bucket(longest, 16)]),
            lengths=jnp.asarray(lengths),
            seeds=seeds_array,
            sampling=sampling,
            # A copy, because the loop donates its state.
            memory=jax.tree.map(jnp.array, drafter_state),
            draft=self._draft_prompts(draft_prompts, int(np.max(max_new_tokens))),
        )
        drafter_state = _init_drafter(
            self.drafter,
            self.drafter_params,
            Target(self.params, self.cfg, policy),
            request,
            outputs,
            capacity,
        )
        state = State(
            tokens=jnp.asarray(tokens),
            begin=jnp.asarray(lengths),
            length=jnp.array(lengths),
            limit=limit,
            done=jnp.asarray(limits == lengths),
            cache=cache,
            drafter=drafter_state,
            stats=init_stats(batch, self.drafter.max_depth, self.drafter.width),
        )
        return state, seeds_array

    def run(
        self,
        state: State,
        seeds: jax.Array,
        sampling: SamplingParams,
        eos: Sequence[int],
        rounds_per_call: int | None = None,
        after_call: Callable[[State], None] | None = None,
    ) -> State:
        """Rounds until every row is done; the bucket grows with the longest row.

        A drafter that is tuned on the host gets its turn between calls of the compiled loop.
        """
        policy = self.policy_in_force
        # Greedy rows need no random numbers; leaving them out is a different program.
        rule = self.verification(bool(np.any(np.asarray(sampling.temperature) > 0)))
        rounds = rounds_per_call or np.iinfo(np.int32).max
        eos_array = as_ids(eos)
        while True:
            done, length = (np.asarray(x) for x in (state.done, state.cache.length))
            if done.all():
                return state
            needed = int(length[~done].max()) + self.drafter.width
            untuned = self.rounds_to_tuning(state)
            state = decode_rounds(
                self.params,
                self.cfg,
                policy,
                self.drafter,
                self.drafter_params,
                state,
                seeds,
                sampling,
                eos_array,
                jnp.asarray(min(rounds, untuned or rounds), jnp.int32),
                extent=self.extent(needed, state.cache.capacity),
                rule=rule,
                widths=self.narrower(),
            )
            if untuned:
                state = self.tuned(state, seeds, sampling, eos_array)
            if after_call is not None:
                after_call(state)

    def _draft_prompts(
        self, drafts: Sequence[Sequence[int]] | None, new: int
    ) -> DraftPrompts | None:
        if drafts is None:
            return None
        longest = max(len(draft) for draft in drafts)
        tokens = np.full((len(drafts), bucket(longest, 16)), -1, np.int32)
        for row, draft in zip(tokens, drafts, strict=True):
            row[: len(draft)] = draft
        capacity = bucket(max(tokens.shape[1], longest + new) + self.drafter.width + 1, 16)
        lengths = jnp.asarray([len(draft) for draft in drafts], jnp.int32)
        return DraftPrompts(jnp.asarray(tokens), lengths, capacity)

    def rounds_to_tuning(self, state: State) -> int:
        """See :class:`inference.drafter.Tuned`; 0 for a drafter that is not tuned."""
        drafter = self.drafter
        if not isinstance(drafter, Tuned):
            return 0
        return drafter.rounds_to_tuning(self.drafter_params, state.drafter)

    def tuned(
        self, state: State, seeds: jax.Array, sampling: SamplingParams, eos: jax.Array
    ) -> State:
        """The state after the drafter's turn on the host, for a drafter that is tuned."""
        drafter: Any = self.drafter
        context = Context(
            state.tokens, state.length, seeds, sampling, state.limit, eos, done=state.done,
            begin=state.begin,
        )  # fmt: skip
        target = Target(self.params, self.cfg, self.policy_in_force)
        tuned = drafter.tune(self.drafter_params, state.drafter, target, state.cache, context)
        return dataclasses.replace(state, drafter=tuned)

    def _prefill(
        self,
        cache: Cache,
        policy: Any,
        tokens: np.ndarray,
        lengths: np.ndarray,
        limit: Any,
        chunk: int,
        chunks: int,
    ) -> tuple[Cache, TargetOutputs]:
        needs = prompt_needs(self.drafter)
        parts = []
        for i in range(chunks):
            counts = np.clip(lengths - 1 - i * chunk, 0, chunk).astype(np.int32)
            piece = tokens[:, i * chunk : (i + 1) * chunk]
            cache, part = prefill_chunk(
                self.params,
                self.cfg,
                policy,
                cache,
                jnp.asarray(piece),
                jnp.asarray(counts),
                limit,
                extent=self.extent((i + 1) * chunk, cache.capacity),
                outputs=needs,
                prompt_lengths=jnp.asarray(lengths),
            )
            parts.append(part)
        cache = cache.end_prefill()
        if not parts:
            return cache, TargetOutputs(tokens=jnp.zeros((len(lengths), 0), jnp.int32))
        return cache, _concatenate(parts)

    def _empty_cache(self, batch: int, capacity: int, dtype: Any, key_width: int) -> Cache:
        return init_cache(self.cfg, batch, capacity, dtype, key_width)

    def verification(self, sampled: bool) -> str | None:
        """The rule in place of the drafts' own; ``sampled``: whether any row has a temperature."""
        return self.rule or getattr(self.drafter, "verification", None if sampled else "greedy")

    def narrower(self) -> tuple[int, ...]:
        """The passes narrower than the drafter's that the loop holds."""
        return narrower_widths(self.drafter) if self.widths is None else self.widths

    def extent(self, needed: int, capacity: int) -> int:
        """The slots that attention reads if ``needed`` are filled."""
        return min(bucket(needed), capacity)

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Raise ValueError for what :meth:`generate` would refuse."""
        limit = self.context_limit
        if limit is None:
            own = getattr(self.policy, "max_length", None)
            limit = self.cfg.max_length if own is None else min(own, self.cfg.max_length)
        check_reach(self.policy, limit, "context_limit")
        check_prompts(prompts, max_new_tokens, seeds, self.cfg.vocab_size, limit)


def make_engine(params: decoder.Params, cfg: decoder.Config, **settings: Any) -> Engine:
    """An :class:`Engine` from stacked or unstacked weights; ``settings`` are its other fields."""
    return Engine(params=decoder.unstack(params), cfg=cfg, **settings)


@functools.partial(jax.jit, static_argnames=("drafter", "capacity"))
def _init_drafter(
    drafter: Drafter,
    params: Any,
    target: Target,
    request: Request,
    prompt: TargetOutputs,
    capacity: int,
) -> Any:
    return drafter.init(params, target, request, prompt, capacity)


def _concatenate(parts: list[TargetOutputs]) -> TargetOutputs:
    """The prompt's outputs from those of its chunks."""

    def join(name: str, axis: int) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else jnp.concatenate(values, axis=axis)

    return TargetOutputs(
        tokens=join("tokens", 1),
        pre_norm=join("pre_norm", 1),
        hidden=join("hidden", 1),
        hidden_states=join("hidden_states", 2),
        logits=join("logits", 1),
    )


def generated(state: State, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that each row of the loop's state has after its prompt."""
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    return [tokens[i, len(p) : length[i]].tolist() for i, p in enumerate(prompts)]


__all__ = [
    "Engine",
    "Generation",
    "as_ids",
    "bucket",
    "check_capacity",
    "check_context",
    "generated",
    "make_engine",
]
