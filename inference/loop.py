"""Draft, verify, commit: the one decoding loop, compiled whole.

Plain decoding is this loop with :class:`~inference.drafter.NoDrafter`. All control values are
data; what is static is the drafter's settings, the sampling kind, and ``extent``, the power-of-two
bucket of cache slots that attention reads. The loop leaves for the host when the longest row
outgrows the bucket, when all rows are done, or after ``max_rounds`` rounds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.cache import Cache
from inference.drafter import Context, Draft, Target, TargetOutputs, on_path
from inference.widths import check_widths, narrow, needed, run_one, widen
from models import decoder
from models.attention import Step
from ops.sampling import SamplingParams
from ops.verify import Verdict, emitted_tokens, verify


@struct.dataclass
class Stats:
    """Counters per row. In every round: drafted = emitted - 1 + discarded."""

    rounds: Any  # (b,) int32
    drafted: Any  # (b,) int32, proposed tokens, the root not counted
    accepted: Any  # (b,) int32, proposed tokens that were right, before any truncation
    emitted: Any  # (b,) int32, tokens added to the text
    by_depth: Any  # (b, d) int32, rounds in which more than d drafted tokens were accepted
    by_node: Any  # (b, n) int32, rounds in which the draft's node was right, the root always
    layer_passes: Any  # (b,) float32, layers of the target run in turn, drafting included

    @property
    def discarded(self) -> Int[Array | np.ndarray, " b"]:
        """Proposed tokens that were wrong."""
        return self.drafted - self.accepted


@struct.dataclass
class State:
    """Everything that changes from round to round.

    Each row's last token (the root) is in ``tokens`` but not yet in the cache.
    """

    tokens: Any  # (b, l) int32
    begin: Any  # (b,) int32, length of the prompt
    length: Any  # (b,) int32
    limit: Any  # (b,) int32, final length at most
    done: Any  # (b,) bool
    cache: Cache
    drafter: Any
    stats: Stats


def init_stats(batch: int, depth: int, nodes: int) -> Stats:
    """All zero, each field a buffer of its own so that it can be donated.

    Args:
        depth, nodes: most drafted tokens that a round accepts, and nodes of a draft with its root.
    """

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.int32)

    return Stats(
        *(zeros(batch) for _ in range(4)),
        by_depth=zeros(batch, depth),
        by_node=zeros(batch, nodes),
        layer_passes=jnp.zeros(batch, jnp.float32),
    )


@functools.partial(
    jax.jit, static_argnames=("cfg", "extent", "outputs"), donate_argnames=("cache",)
)
def prefill_chunk(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    tokens: Int[Array, "b t"],
    counts: Int[Array, " b"],
    lengths: Int[Array, " b"] | None,
    extent: int,
    outputs: frozenset[str],
    prompt_lengths: Int[Array, " b"] | None = None,
) -> tuple[Cache, TargetOutputs]:
    """Run the first ``counts`` tokens of each row's chunk and commit them.

    Args:
        tokens: the chunk, anything beyond ``counts``.
        lengths: final text length of each row, for length-dependent rotations; None takes the
            length so far.
        extent: slots that attention reads.
        outputs: which fields of ``TargetOutputs`` to return.
        prompt_lengths: length of each whole prompt, for policies that depend on it.
    """
    t = tokens.shape[1]
    positions = cache.next_position[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        counts=counts,
        extent=extent,
        mode="prefill",
    )
    safe = jnp.clip(tokens, 0, cfg.vocab_size - 1)
    out = decoder.forward(
        params,
        cfg,
        safe,
        step=step,
        policy=policy,
        cache=cache.layers,
        all_hidden="hidden_states" in outputs,
    )
    cache = dataclasses.replace(cache, layers=out.cache).commit(None, counts)
    return cache, _select(params, cfg, out, tokens, outputs)


def _select(
    params: Any, cfg: decoder.Config, out: decoder.Output, tokens: Array, needs: frozenset[str]
) -> TargetOutputs:
    return TargetOutputs(
        tokens=tokens,
        pre_norm=out.pre_norm if "pre_norm" in needs else None,
        hidden=out.hidden if "hidden" in needs else None,
        hidden_states=out.hidden_states if "hidden_states" in needs else None,
        logits=decoder.unembed(params, cfg, out.hidden) if "logits" in needs else None,
    )


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "drafter", "extent", "rule", "widths"),
    donate_argnames=("state",),
)
def decode_rounds(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    drafter: Any,
    drafter_params: Any,
    state: State,
    seeds: Int[Array, " b"],
    sampling: SamplingParams,
    eos: Int[Array, " e"],
    max_rounds: Int[Array, ""],
    extent: int,
    rule: str | None = None,
    widths: tuple[int, ...] = (),
) -> State:
    """Rounds until every row is done, ``max_rounds`` have run, or ``extent`` is outgrown.

    Args:
        seeds: one per row; every random draw is keyed by it and by the token's index alone.
        eos: token ids that end a row (may be empty).
        extent: slots that attention reads; a round needs ``drafter.width`` free ones in it.
        rule: verification rule in place of the draft's own: ``greedy`` when it is known that no
            row samples, ``typical`` (lossy).
        widths: of passes that may be narrower than the drafter's.
    """

    def more(carry: tuple[State, Array]) -> Array:
        state, rounds = carry
        room = jnp.max(jnp.where(state.done, 0, state.cache.length)) + drafter.width <= extent
        return jnp.any(~state.done) & (rounds < max_rounds) & room

    def one(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, rounds = carry
        new = decode_round(
            params, cfg, policy, drafter, drafter_params, state, seeds, sampling, eos, extent, rule,
            widths,
        )  # fmt: skip
        return new, rounds + 1

    return jax.lax.while_loop(more, one, (state, jnp.zeros((), jnp.int32)))[0]


def decode_round(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    drafter: Any,
    drafter_params: Any,
    state: State,
    seeds: Int[Array, " b"],
    sampling: SamplingParams,
    eos: Int[Array, " e"],
    extent: int | None,
    rule: str | None,
    widths: tuple[int, ...] = (),
) -> State:
    """One round: draft, one target pass, verify, commit, observe.

    The pass has the first of ``widths`` that holds the draft; see :mod:`inference.widths`.
    """
    draft, drafter_state, cache = propose(
        params, cfg, drafter, drafter_params, state, seeds, sampling, extent, policy, eos,
        greedy=rule == "greedy",
    )  # fmt: skip
    state = dataclasses.replace(state, drafter=drafter_state, cache=cache)
    sizes = check_widths(widths, draft.tokens.shape[1])

    def at_width(width: int) -> Callable[[State], State]:
        def run(state: State) -> State:
            scored = narrow(draft, width)
            logits, outputs, cache = _score(
                params, cfg, policy, state, scored, extent, drafter.needs
            )
            verdict = verify(
                rule or draft.mode,
                tokens=scored.tokens,
                parent=scored.parent,
                valid=scored.valid,
                target_logits=logits,
                params=sampling,
                seeds=seeds,
                index=state.length,
                draft_probs=scored.probs if rule in (None, draft.mode) else None,
                max_depth=scored.max_depth,
                transfer=draft.transfer if rule in (None, draft.mode) else None,
            )
            state = dataclasses.replace(state, cache=cache)
            return _commit(
                drafter, drafter_params, state, draft, verdict, outputs, eos, cfg.num_layers
            )

        return run

    index = jnp.searchsorted(jnp.asarray(sizes), needed(draft, state.done))
    return run_one(index, [at_width(width) for width in sizes], state)


def _score(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    state: State,
    draft: Draft,
    extent: int | None,
    needs: frozenset[str],
) -> tuple[Float[Array, "b n v"], TargetOutputs, Cache]:
    """Logits of a draft's nodes, what the drafter needs of the pass, and the cache after it."""
    cache, out = score_draft(params, cfg, policy, state.cache, draft, state.limit, extent, needs)
    logits = decoder.unembed(params, cfg, out.hidden)
    outputs = _select(params, cfg, out, draft.tokens, needs - {"logits"})
    return logits, dataclasses.replace(outputs, logits=logits if "logits" in needs else None), cache


def _commit(
    drafter: Any,
    drafter_params: Any,
    state: State,
    draft: Draft,
    verdict: Verdict,
    outputs: TargetOutputs,
    eos: Int[Array, " e"],
    layers: int,
) -> State:
    """Add what was accepted to the text and the cache, and let the drafter learn from it."""
    nodes = draft.tokens.shape[1]
    depth = nodes if draft.max_depth is None else min(draft.max_depth + 1, nodes)
    path = _fill(verdict.path, depth)
    text = emitted_tokens(draft.tokens, dataclasses.replace(verdict, path=path))
    n_emit, ended = _kept(text, verdict.num_accepted, state, eos)
    tokens = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
        state.tokens, text, state.length
    )
    length = state.length + n_emit
    cache = state.cache.commit(None if draft.is_chain else verdict.path, n_emit)
    root = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
    drafter_state = drafter.observe(
        drafter_params, state.drafter, draft, widen(outputs, nodes), path, n_emit, root
    )
    return dataclasses.replace(
        state,
        tokens=tokens,
        length=length,
        done=state.done | ended | (length >= state.limit),
        cache=cache,
        drafter=drafter_state,
        stats=_count(state, draft, verdict.num_accepted, path, n_emit, layers),
    )


def _fill(path: Int[Array, "b d"], width: int) -> Int[Array, "b w"]:
    """A path padded with -1."""
    return jnp.pad(path, ((0, 0), (0, width - path.shape[1])), constant_values=-1)


def propose(
    params: Any,
    cfg: decoder.Config,
    drafter: Any,
    drafter_params: Any,
    state: State,
    seeds: Int[Array, " b"],
    sampling: SamplingParams,
    extent: int | None,
    policy: Any = None,
    eos: Int[Array, " e"] | None = None,
    greedy: bool = False,
) -> tuple[Draft, Any, Cache]:
    """The first step of a round: the draft, the drafter's new state, the target's cache.

    ``greedy``: it is known that no row samples.
    """
    root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    context = Context(
        state.tokens, state.length, seeds, sampling, state.limit, eos, extent, state.done,
        state.begin, greedy,
    )  # fmt: skip
    return drafter.propose(
        drafter_params, state.drafter, Target(params, cfg, policy), state.cache, root, context
    )


def score_draft(
    params: Any,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    draft: Draft,
    lengths: Int[Array, " b"],
    extent: int | None,
    needs: frozenset[str],
) -> tuple[Cache, decoder.Output]:
    """The target's pass over a draft: its nodes become scratch entries under the tree mask.

    Where the draft says from which layer to resume, the layers below have run.
    """
    positions = cache.next_position[:, None] + draft.depth
    tree_start = cache.length + cache.scratch
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        lengths=lengths,
        tree=None if draft.tokens.shape[1] == 1 else draft.mask,
        tree_start=tree_start,
        extent=extent,
        mode="decode",
    )
    source: dict[str, Any] = {"tokens": jnp.maximum(draft.tokens, 0)}
    if draft.resume is not None:
        layers = decoder.LayerChoice(start=draft.resume.layer)
        source = {"embeds": draft.resume.hidden, "layers": layers}
    out = decoder.forward(
        params,
        cfg,
        **source,
        step=step,
        policy=policy,
        cache=cache.layers,
        all_hidden="hidden_states" in needs,
    )
    return dataclasses.replace(cache, layers=out.cache), out


def _kept(
    text: Int[Array, "b d"], accepted: Int[Array, " b"], state: State, eos: Int[Array, " e"]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """How much of the round's text counts, and whether an end token is in that part."""
    count = jnp.minimum(accepted + 1, state.limit - state.length)
    index = jnp.arange(text.shape[1])[None]
    is_eos = jnp.any(text[:, :, None] == eos[None, None, :], axis=-1) & (index < count[:, None])
    ended = jnp.any(is_eos, axis=1)
    count = jnp.where(ended, jnp.argmax(is_eos, axis=1) + 1, count)
    return jnp.where(state.done, 0, count).astype(jnp.int32), ended


def _count(
    state: State,
    draft: Draft,
    accepted: Int[Array, " b"],
    path: Int[Array, "b d"],
    n_emit: Int[Array, " b"],
    layers: int,
) -> Stats:
    live = (~state.done).astype(jnp.int32)
    stats = state.stats
    right = on_path(path, accepted + 1, stats.by_node.shape[1])
    depth = jnp.arange(stats.by_depth.shape[1])[None]
    drafting = 0.0 if draft.layer_passes is None else draft.layer_passes
    return Stats(
        rounds=stats.rounds + live,
        drafted=stats.drafted + live * (jnp.sum(draft.valid, axis=1) - 1),
        accepted=stats.accepted + live * accepted,
        emitted=stats.emitted + n_emit,
        by_depth=stats.by_depth + live[:, None] * (accepted[:, None] > depth),
        by_node=stats.by_node + live[:, None] * right,
        layer_passes=stats.layer_passes + live * (layers + drafting),
    )
