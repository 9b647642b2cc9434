"""SWIFT: exact text whatever is skipped, its draft, its search, and its cache left alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Context, NoDrafter, Request, Target, TargetOutputs
from inference.drafters.scratch import run_scratch
from models import decoder
from models.decoder import LayerChoice
from ops.sampling import SamplingParams
from research.speculative.swift.comb import build_comb, level_widths
from research.speculative.swift.drafter import SwiftDrafter, swift
from research.speculative.swift.matchness import matchness, window_logits
from research.speculative.swift.search import (
    SkipSet,
    uniform_set,
    vector_to_set,
)
from tests.inference.models import (
    NEW,
    assert_greedy,
    assert_needs_no_laws,
    config,
    engine,
    prefilled,
    prompts,
    weights,
)
from tests.inference.sampled_law import p_value

CFG = config(num_layers=5)
TINY = config(vocab_size=4, num_layers=3, hidden_size=8, init_stddev=0.7, max_length=16)
SAMPLED = SamplingParams.make(0.9, top_k=20, top_p=0.95)
GREEDY = SamplingParams.make()
NOTHING = SkipSet(np.zeros(5, bool), np.zeros(5, bool))
SMALL = {"max_steps": 6, "max_nodes": 16, "context_window": 4}


NO_PROMPT = TargetOutputs(tokens=None)
LENGTHS, LIMITS = (3, 5, 4, 9), (64, 64, 7, 64)


def request_of(lengths: Any, memory: Any = None) -> Request:
    """What the drafter's state depends on."""
    return Request(None, jnp.asarray(lengths), None, GREEDY, memory)


def run(sampling: Any = None, state: Any = None, new: int = NEW, **settings: Any) -> Any:
    """Texts of the usual prompts with a small SWIFT drafter."""
    given = {name: settings.pop(name) for name in ("skip", "controls") if name in settings}
    drafter, params = swift(CFG, **given, **(SMALL | settings))
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    return eng.generate(prompts(), new, sampling=sampling, drafter_state=state)


def test_nothing_is_drawn_where_no_row_samples():
    drafter, params = swift(CFG, controls={"stop_threshold": 0.0}, **SMALL)
    assert_needs_no_laws(engine(CFG, drafter=drafter, drafter_params=params))


@pytest.mark.parametrize("nodes", [0, 16], ids=["chain", "comb"])
def test_greedy_text_is_that_of_plain_decoding_while_the_set_changes(nodes):
    got = run(max_nodes=nodes, controls={"stop_threshold": 0.05, "bayes_every": 2, "max_score": 2})
    width = nodes or 7
    assert got.tokens == engine(CFG, drafter=NoDrafter(width)).generate(prompts(), NEW).tokens
    for prompt, new in zip(prompts(), got.tokens, strict=True):
        assert_greedy(CFG, prompt, new)
    search = got.drafter_state.search
    # The longest row needs one round per token at most, and the search starts at six tokens.
    assert int(search.iterations) > 3
    assert np.all(np.asarray(got.stats.layer_passes) > 5 * np.asarray(got.stats.rounds))


def test_text_is_exact_with_everything_left_out_that_may_be():
    inner = np.array([False, True, True, True, False])
    got = run(skip=SkipSet(inner, inner), search=False, controls={"stop_threshold": 0.0})
    assert got.tokens == engine(CFG, drafter=NoDrafter(16)).generate(prompts(), NEW).tokens


@pytest.mark.slow
def test_a_fixed_set_of_candidates_gives_the_text_of_plain_sampling():
    got = run(sampling=SAMPLED, sampled=False, search=False)
    want = engine(CFG, drafter=NoDrafter(16)).generate(prompts(), NEW, sampling=SAMPLED)
    assert got.tokens == want.tokens


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_without_skipping_every_draft_is_accepted(sampling):
    got = run(sampling, skip=NOTHING, search=False, max_nodes=0, controls={"stop_threshold": 0.0})
    np.testing.assert_array_equal(got.stats.discarded, [0] * 4)
    # Six drafted and one more per round, 20 tokens: the last round drafts five of its six.
    np.testing.assert_array_equal(got.stats.rounds, [3] * 4)


def proposed(threshold: float, **settings: Any) -> tuple[Any, Any, Any]:
    """One draft of every prompt, the cache before and the cache after."""
    drafter, params = swift(CFG, controls={"stop_threshold": threshold}, **(SMALL | settings))
    texts = prompts(*LENGTHS)
    cache = prefilled(weights(CFG), CFG, texts, capacity=64)
    target = Target(weights(CFG), CFG, decoder.default_policy(CFG))

    @jax.jit
    def one(params: Any, cache: Any) -> Any:
        state = drafter.init(params, target, request_of(LENGTHS), NO_PROMPT, 64)
        root = jnp.asarray([text[-1] for text in texts], jnp.int32)
        tokens = jnp.zeros((4, 64), jnp.int32)
        context = Context(tokens, jnp.asarray(LENGTHS), jnp.arange(4), GREEDY, jnp.asarray(LIMITS))
        draft, _, after = drafter.propose(params, state, target, cache, root, context)
        return draft, after

    return one(params, cache)[0], cache, one(params, cache)[1]


def test_drafting_leaves_the_cache_as_it_was():
    _, before, after = proposed(0.0)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_draft_ends_where_it_is_unsure_and_at_the_limit():
    free, _, _ = proposed(0.0, max_nodes=0)
    # Row 2 may add three tokens: one drafted token and the two that follow leave nothing over.
    np.testing.assert_array_equal(free.valid.sum(1) - 1, [6, 6, 2, 6])
    sure, _, _ = proposed(1.0, max_nodes=0)
    np.testing.assert_array_equal(sure.valid.sum(1) - 1, [1, 1, 1, 1])
    np.testing.assert_array_equal(sure.layer_passes, [(5 + 5 - 4) / 2] * 4)
    tree, _, _ = proposed(0.0)
    assert np.all(np.asarray(tree.valid).sum(1) == 16) and int(tree.depth.max()) == 6
    np.testing.assert_array_equal(tree.tokens[:, 1], free.tokens[:, 1])


def test_every_drafted_step_but_the_last_was_sure():
    threshold = 0.15
    draft, before, _ = proposed(threshold, max_nodes=0)
    target, skip = Target(weights(CFG), CFG, decoder.default_policy(CFG)), uniform_set(5)

    @jax.jit
    def laws_of(cache: Any, tokens: Any) -> Any:
        layers = LayerChoice(skip_attention=skip.attention, skip_mlp=skip.mlp)
        out, _ = run_scratch(target, cache, tokens, None, 64, layers)
        return jax.nn.softmax(decoder.unembed(target.params, CFG, out.hidden), -1)

    tokens, counts = np.asarray(draft.tokens), np.asarray(draft.valid).sum(1) - 1
    laws = np.asarray(laws_of(before, jnp.maximum(draft.tokens, 0)))
    for row, count in enumerate(counts):
        # Row 2 ends at its limit.
        np.testing.assert_array_equal(laws[row, :count].argmax(-1), tokens[row, 1 : count + 1])
        sure = laws[row, :count].max(-1)
        assert np.all(sure[:-1] >= threshold)
        assert sure[-1] < threshold or count == 6 or LENGTHS[row] + count + 1 >= LIMITS[row]
    assert len(set(counts.tolist())) > 1


def test_the_comb_loses_leaves_from_below_and_never_its_chain():
    tokens = jnp.broadcast_to(jnp.arange(4), (1, 3, 4))
    there = jnp.ones((1, 3, 4), bool)
    widths = jnp.asarray([[3, 4, 4]])
    for size, levels in ((12, [3, 4, 4]), (9, [3, 4, 1]), (6, [3, 1, 1]), (4, [1, 1, 1])):
        comb = build_comb(tokens, there, widths, jnp.asarray([3]), size)
        parent = np.asarray(comb.parent[0])
        chain = np.asarray(comb.chain[0])
        assert [int((parent == node).sum()) for node in chain] == levels
    # Candidates that do not exist have no node, levels beyond the draft neither.
    comb = build_comb(tokens, there.at[0, 0, 2:].set(False), widths, jnp.asarray([2]), 12)
    assert np.asarray(comb.parent[0]).tolist() == [-1, 0, 0, 1, 1, 1, 1] + [-1] * 5
    assert np.asarray(comb.chain[0]).tolist() == [0, 1, 12]


def test_widths_change_strictly_above_their_thresholds():
    sure = jnp.asarray([0.96, 0.95, 0.81, 0.8, 0.51, 0.5, 0.1])
    found = level_widths(sure, (0.95, 0.8, 0.5), (3, 5, 8, 10))
    assert np.asarray(found).tolist() == [3, 5, 5, 8, 8, 10, 10]


# Matchness.
def text_and_cache() -> tuple[Any, Any, Any]:
    texts = [prompt + new for prompt, new in zip(prompts(), engine(CFG).generate(
        prompts(), NEW).tokens, strict=True)]  # fmt: skip
    tokens = np.zeros((4, 64), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    cache = prefilled(weights(CFG), CFG, texts, capacity=64)
    return jnp.asarray(tokens), cache, jnp.asarray([len(p) for p in prompts()])


def test_matchness_is_that_of_the_skipped_model_token_by_token():
    tokens, cache, begin = text_and_cache()
    target = Target(weights(CFG), CFG, decoder.default_policy(CFG))
    limit, window = jnp.full((4,), 64), 9
    full = SkipSet(jnp.zeros(5, bool), jnp.zeros(5, bool))
    np.testing.assert_array_equal(
        matchness(target, cache, tokens, begin, limit, full, window, 64), [1] * 4
    )
    rng = np.random.default_rng(0)
    before = jax.tree.map(np.array, cache)
    step = jax.jit(
        lambda cache, token, skip: run_scratch(
            target, cache, token, limit, 64,
            LayerChoice(skip_attention=skip.attention, skip_mlp=skip.mlp),
        )
    )  # fmt: skip
    for _ in range(3):
        skip = vector_to_set(rng.random(6).astype(np.float32), 3)
        parallel = window_logits(target, cache, tokens, begin, limit, skip, window, 64)
        one_by_one, view = [], cache.up_to(begin)
        for j in range(window):
            token = jnp.take_along_axis(tokens, begin[:, None] + j, axis=1)
            out, view = step(view, token, skip)
            one_by_one.append(decoder.unembed(target.params, CFG, out.hidden[:, 0]))
        np.testing.assert_allclose(parallel, jnp.stack(one_by_one, 1), atol=1e-4)
        found = matchness(target, cache, tokens, begin, limit, skip, window, 64)
        hits = np.asarray(parallel).argmax(-1)[:, :-1] == [
            np.asarray(tokens)[row, at + 1 : at + window] for row, at in enumerate(begin.tolist())
        ]
        np.testing.assert_allclose(found, hits.mean(1), atol=1e-6)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("context", ["first", "last"])
def test_a_search_step_judges_the_window_it_should(context, monkeypatch):
    drafter, params = swift(CFG, **(SMALL | {"context": context}))
    tokens, cache, prompt = text_and_cache()
    state = drafter.init(params, Target(weights(CFG), CFG), request_of(prompt), NO_PROMPT, 64)
    seen = {}
    monkeypatch.setattr(
        "research.speculative.swift.drafter.matchness",
        lambda *args: seen.update(begin=np.asarray(args[3])) or jnp.asarray([0.5, 0.25, 1, 1]),
    )
    length = prompt + jnp.asarray([6, 9, 5, 1])  # rows 2 and 3 have not more than five
    context_ = Context(tokens, length, prompt, GREEDY, prompt + NEW, begin=prompt)
    target = Target(weights(CFG), CFG, None)
    state = dataclasses.replace(state, rounds=jnp.asarray(1))
    after = drafter.tune(params, state, target, cache, context_)
    assert float(after.search.best_score) == 0.375 and int(after.search.iterations) == 1
    want = prompt[:2] if context == "first" else length[:2] - 5
    np.testing.assert_array_equal(seen["begin"][:2], want)
    short = dataclasses.replace(context_, length=prompt + 5)
    assert drafter.tune(params, state, target, cache, short) is state


def test_the_search_runs_at_its_rounds_and_ends_for_good():
    drafter, params = swift(CFG, controls={"search_every": 3}, **SMALL)
    state = drafter.init(params, Target(weights(CFG), CFG), request_of([1]), NO_PROMPT, 64)
    due = []
    for rounds in range(8):
        at = dataclasses.replace(state, rounds=jnp.asarray(rounds))
        due.append(rounds + drafter.rounds_to_tuning(params, at))
    assert due == [1, 4, 4, 4, 7, 7, 7, 10]
    ended = dataclasses.replace(state.search, active=jnp.asarray(False))
    assert drafter.rounds_to_tuning(params, dataclasses.replace(state, search=ended)) == 0


def test_what_was_found_goes_on_to_the_next_call_or_is_forgotten():
    first = run(new=12)
    tried = int(first.drafter_state.search.iterations)
    assert tried > 0
    again = run(new=1, state=first.drafter_state)
    assert int(again.drafter_state.search.iterations) == tried
    np.testing.assert_array_equal(
        again.drafter_state.search.skip.attention, first.drafter_state.search.skip.attention
    )
    halved = run(new=1, state=first.drafter_state, controls={"score_decay": 0.5})
    np.testing.assert_allclose(
        halved.drafter_state.search.best_score, first.drafter_state.search.best_score / 2
    )
    forgotten = run(new=1, state=first.drafter_state, reset_on_new_prompt=True)
    assert int(forgotten.drafter_state.search.iterations) == 0


def test_a_changed_set_or_threshold_does_not_compile_again():
    from inference.loop import decode_rounds

    run(new=12)
    before = decode_rounds._cache_size()
    found = run(new=12, controls={"stop_threshold": 0.2}, skip=NOTHING)
    assert int(found.drafter_state.search.iterations) > 1
    # A set given takes a program of its own shape of params, and serves every other set.
    middle = decode_rounds._cache_size()
    assert middle <= before + 1
    run(new=12, controls={"stop_threshold": 0.5, "max_score": 0.1}, skip=uniform_set(5))
    assert decode_rounds._cache_size() == middle


# The law of sampled text.
@pytest.mark.parametrize(
    ("sampling", "nodes"),
    [
        pytest.param(SamplingParams.make(1.0), 0, marks=pytest.mark.slow),
        (SamplingParams.make(0.7, top_p=0.85), 8),
    ],
    ids=["chain", "comb, warped"],
)
def test_sampled_text_has_the_targets_law(sampling, nodes):
    drafter, params = swift(
        TINY, max_steps=2, max_nodes=nodes, search=False,
        sampling_widths=(1, 2, 3, 4), controls={"stop_threshold": 0.3},
    )  # fmt: skip
    assert p_value(TINY, drafter, params, sampling) > 1e-4


@dataclasses.dataclass(frozen=True)
class Lying(SwiftDrafter):
    """States a flat law for tokens that it drew from another."""

    def propose(self, *args: Any):
        draft, state, cache = super().propose(*args)
        return draft.replace(probs=jnp.full_like(draft.probs, 0.25)), state, cache


@pytest.mark.slow
def test_the_statistics_reject_a_wrong_law():
    _, params = swift(TINY, search=False, controls={"stop_threshold": 0.3})
    lying = Lying(max_steps=2, max_nodes=8, search=False, sampling_widths=(1, 2, 3, 4))
    assert p_value(TINY, lying, params, SamplingParams.make(1.0)) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: swift(config(num_layers=2)), "a model of 2 layers has nothing to skip"),
        (lambda: swift(CFG, skip=SkipSet([True] * 5, [True] * 5)), "the first or the last layer"),
        (lambda: swift(CFG, skip=SkipSet([1, 0, 0, 0, 0], [0] * 5)), "skips the attention of the"),
        (lambda: swift(CFG, skip=SkipSet([0] * 4, [0] * 5)), "shape \\(4,\\) for 5 layers"),
        (lambda: swift(CFG, controls={"skip_ratio": 0.1}), "leaves out 0 of 6 sub-layers"),
        (lambda: swift(CFG, controls={"skip_ratio": 1.2}), "leaves out 7 of 6 sub-layers"),
        (lambda: swift(CFG, controls={"stop_threshold": 2.0}), "must be a probability"),
        (lambda: swift(CFG, controls={"width_thresholds": (0.5,)}), "three thresholds"),
        (lambda: swift(CFG, max_nodes=10), "cannot hold a chain of 25 tokens"),
        (lambda: swift(CFG, max_steps=0), "must be 1 or more"),
        (lambda: swift(CFG, context="middle"), "unknown context 'middle'"),
        (lambda: swift(CFG, greedy_widths=(1, 2)), "widths are four numbers"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_drafts_beyond_the_cache_and_other_models_searches_are_refused():
    drafter, params = swift(CFG)
    target = Target(weights(CFG), CFG)
    with pytest.raises(ValueError, match="a draft needs 64 cache slots but there are 32"):
        drafter.init(params, target, request_of([1]), NO_PROMPT, 32)
    state = drafter.init(params, target, request_of([1]), NO_PROMPT, 64)
    other, params = swift(config(num_layers=4))
    with pytest.raises(ValueError, match="start without its state"):
        other.init(
            params, Target(None, config(num_layers=4)), request_of([1], state), NO_PROMPT, 64
        )
