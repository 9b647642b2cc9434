"""SpecDec++'s drafter in the real loop, its baselines beside it, and the oracle."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inference.drafter import Context, NoDrafter, Target
from inference.drafters.adaptive import AdaptiveDraftModel, AdaptiveParams, Limits
from inference.loop import decode_rounds, propose
from models import acceptance_head, decoder, params
from models.acceptance_head import AcceptanceConfig
from ops.sampling import SamplingParams
from research.speculative.specdec_pp.drafter import RejectionRisk, specdec
from research.speculative.specdec_pp.objective import acceptance_loss
from research.speculative.specdec_pp.oracle import OracleDraftModel
from tests.inference.models import NEW, config, engine, near, prefilled, prompts, weights
from tests.inference.sampled_law import p_value
from tests.inference.test_drafters import SAMPLED, TINY

CFG = config()
HEAD = AcceptanceConfig(num_layers=2)
LENGTH = 6


@functools.cache
def head(scale: float = 3.0) -> acceptance_head.Params:
    """A head with opinions: a trained one's place is taken by random weights."""
    start = params.init(acceptance_head.specs(HEAD, CFG), jax.random.key(7))
    return start.replace(out=jax.tree.map(lambda x: scale * x, start.out))


def drafter(threshold: float, shortest: int = 1, longest: int = LENGTH, sampled: bool = True):
    bounds = Limits.make(threshold, shortest, longest)
    model, learnt = specdec(CFG, near(), CFG, head(), HEAD, bounds, sampled)
    return AdaptiveDraftModel(CFG, LENGTH, sampled, rule=model.rule), learnt


def generate(one: Any, learnt: Any, sampling: SamplingParams, **settings: Any) -> Any:
    eng = engine(drafter=one, drafter_params=learnt)
    return eng.generate(prompts(), NEW, sampling=sampling, **settings)


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_greedy_text_is_that_of_plain_decoding(threshold):
    got = generate(*drafter(threshold), SamplingParams.make())
    plain = engine(drafter=NoDrafter(LENGTH + 1)).generate(prompts(), NEW)
    assert got.tokens == plain.tokens


@pytest.mark.slow
def test_sampled_text_of_a_greedy_draft_is_that_of_plain_sampling():
    got = generate(*drafter(0.4, sampled=False), SAMPLED)
    plain = engine(drafter=NoDrafter(LENGTH + 1)).generate(prompts(), NEW, sampling=SAMPLED)
    assert got.tokens == plain.tokens


def one_draft(learnt: Any, model: AdaptiveDraftModel, done: Any = None, eos: Any = None) -> Any:
    """The first round's draft of all prompts, at temperature 1."""
    sampling = SamplingParams.make(1.0)
    eng = engine(drafter=model, drafter_params=learnt)
    state, seeds = eng.start(prompts(), NEW, sampling)
    context = Context(state.tokens, state.length, seeds, sampling, eos=eos, extent=128, done=done)
    root = jnp.asarray([prompt[-1] for prompt in prompts()], jnp.int32)
    target = Target(eng.params, eng.cfg)
    return _propose(model, learnt, state, target, root, context)


@functools.partial(jax.jit, static_argnames="model")
def _propose(model: Any, learnt: Any, state: Any, target: Any, root: Any, context: Any) -> Any:
    return model.propose(learnt, state.drafter, target, state.cache, root, context)[0]


def counts(learnt: Any, model: AdaptiveDraftModel, **settings: Any) -> np.ndarray:
    return np.asarray(one_draft(learnt, model, **settings).valid.sum(axis=1)) - 1


def test_drafts_grow_with_the_threshold_and_keep_to_their_bounds():
    model, learnt = drafter(0.0)
    lengths, drawn = [], []
    for threshold in (-1.0, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        bound = learnt.replace(limits=Limits.make(threshold, 1, LENGTH))
        draft = one_draft(bound, model)
        lengths.append(np.asarray(draft.valid.sum(axis=1)) - 1)
        drawn.append(np.asarray(draft.tokens))
    lengths = np.array(lengths)
    assert np.all(np.diff(lengths, axis=0) >= 0)
    np.testing.assert_array_equal(lengths[0], 1)
    np.testing.assert_array_equal(lengths[-1], LENGTH)
    assert len(set(lengths.ravel().tolist())) > 3
    for tokens, length in zip(drawn, lengths, strict=True):  # the same numbers are drawn
        kept = np.arange(LENGTH + 1)[None] <= length[:, None]
        np.testing.assert_array_equal(tokens, np.where(kept, drawn[-1], -1))
    for shortest, longest in ((2, 4), (3, 3)):
        bound = learnt.replace(limits=Limits.make(0.3, shortest, longest))
        np.testing.assert_array_equal(counts(bound, model), np.clip(lengths[3], shortest, longest))


def test_the_risk_is_the_product_of_the_heads_acceptances():
    """Lengths again by hand: a pass over text and draft, the head on it, the rule in words."""
    model, learnt = drafter(1.0)
    whole = np.asarray(one_draft(learnt, model).tokens)[:, 1:]
    for threshold in (0.3, 0.6):
        bound = learnt.replace(limits=Limits.make(threshold, 1, LENGTH))
        got = counts(bound, model)
        for row, prompt in enumerate(prompts()):
            text = np.zeros((1, 32), np.int32)
            text[0, : len(prompt) + LENGTH] = [*prompt, *whole[row]]
            p = _accepted(near(), head(), jnp.asarray(text))[0, len(prompt) :]
            joint = np.cumprod(np.asarray(p)[: LENGTH - 1])
            # After token s (from 1) the states of s - 1 drafted tokens are known.
            stops = [s for s in range(2, LENGTH + 1) if 1 - joint[s - 2] > threshold]
            assert got[row] == (stops[0] if stops else LENGTH)


@jax.jit
def _accepted(draft: Any, head: Any, tokens: Any) -> Any:
    return acceptance_head.acceptance(head, HEAD, decoder.forward(draft, CFG, tokens).hidden)


def test_a_draft_ends_with_an_end_token_and_finished_rows_do_not_draft():
    model, learnt = drafter(1.0)
    whole = np.asarray(one_draft(learnt, model).tokens)[:, 1:]
    end = int(whole[2, 1])
    got = counts(learnt, model, eos=jnp.asarray([end], jnp.int32))
    for row, tokens in enumerate(whole.tolist()):
        assert got[row] == (tokens.index(end) + 1 if end in tokens else LENGTH)
    assert got[2] <= 2
    done = jnp.asarray([False, True, False, True])
    np.testing.assert_array_equal(counts(learnt, model, done=done), [LENGTH, 0, LENGTH, 0])


def test_every_drafted_token_is_accounted_for():
    """Drafted = emitted - rounds + discarded, counted from drafts and texts, and by the loop."""
    model, learnt = drafter(0.5)
    sampling, policy = SamplingParams.make(1.0), decoder.default_policy(CFG)
    eng = engine(drafter=model, drafter_params=learnt)
    state, seeds = eng.start(prompts(), 40, sampling)  # so that no limit cuts a round
    begin, drafted, discarded = np.asarray(state.length), np.zeros(4, int), np.zeros(4, int)

    @jax.jit
    def draft_of(state: Any) -> Any:
        return propose(eng.params, CFG, model, learnt, state, seeds, sampling, 128, policy)[0]

    rounds = 4
    for _ in range(rounds):
        draft, before = jax.tree.map(np.asarray, draft_of(state)), np.asarray(state.length)
        state = decode_rounds(
            eng.params, CFG, policy, model, learnt, state, seeds, sampling,
            jnp.zeros((0,), jnp.int32), jnp.asarray(1, jnp.int32), extent=128,
        )  # fmt: skip
        for row, text in enumerate(np.asarray(state.tokens)):
            new = text[before[row] : int(state.length[row])]
            count = int(draft.valid[row].sum()) - 1
            # A token that is rejected cannot be drawn in its own place.
            kept = 0
            while kept < count and draft.tokens[row, kept + 1] == new[kept]:
                kept += 1
            assert len(new) == kept + 1
            drafted[row] += count
            discarded[row] += count - kept
    emitted = np.asarray(state.length) - begin
    np.testing.assert_array_equal(drafted, emitted - rounds + discarded)
    np.testing.assert_array_equal(state.stats.drafted, drafted)
    np.testing.assert_array_equal(state.stats.discarded, discarded)
    np.testing.assert_array_equal(state.stats.emitted, emitted)
    assert 0 < discarded.sum() < drafted.sum() < LENGTH * rounds * 4


def test_a_rows_draft_does_not_depend_on_its_batch_mates():
    model, learnt = drafter(0.4)
    together = generate(model, learnt, SamplingParams.make(1.0), seeds=[3, 4, 5, 6])
    eng = engine(drafter=model, drafter_params=learnt)
    for row, prompt in enumerate(prompts()):
        alone = eng.generate(
            [prompt] * 4, NEW, sampling=SamplingParams.make(1.0), seeds=[3 + row] * 4
        )
        assert alone.tokens[0] == together.tokens[row]
        assert alone.stats.drafted[0] == together.stats.drafted[row]


def test_the_draft_models_cache_is_the_one_recomputed():
    model, learnt = drafter(0.5)
    sampling, rounds = SamplingParams.make(1.0), 0
    eng = engine(drafter=model, drafter_params=learnt)
    state, seeds = eng.start(prompts(), NEW, sampling)
    lags = set()
    while not bool(state.done.all()):
        state = decode_rounds(
            eng.params, CFG, decoder.default_policy(CFG), model, learnt, state, seeds, sampling,
            jnp.zeros((0,), jnp.int32), jnp.asarray(1, jnp.int32), extent=128,
        )  # fmt: skip
        rounds += 1
        cache = state.drafter.cache
        lags |= set(np.asarray(state.length - cache.length).tolist())
        if rounds % 3 != 1:
            continue
        texts = [np.asarray(state.tokens[row, : n + 1]) for row, n in enumerate(cache.length)]
        fresh = prefilled(near(), CFG, [text.tolist() for text in texts])
        for row, n in enumerate(np.asarray(cache.length)):
            for a, b in zip(
                jax.tree.leaves(cache.layers), jax.tree.leaves(fresh.layers), strict=True
            ):
                np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], atol=1e-5)
    assert lags == {1, 2}


def test_a_head_trained_on_its_own_target_drives_rounds_to_the_longest():
    """Labels of a model that drafts for itself are all 1: the head learns never to stop."""
    tokens = jnp.asarray([prompt * 5 for prompt in prompts(*[4] * 16)], jnp.int32)
    hidden = jax.jit(lambda p: decoder.forward(p, CFG, tokens).hidden)(weights(CFG))
    labels = jnp.ones(tokens.shape)
    optimizer = optax.adam(0.03)

    def step(carry: Any, _: Any) -> Any:
        learnt, state = carry
        slopes = jax.grad(
            lambda p: acceptance_loss(acceptance_head.logits(p, HEAD, hidden), labels, 6.0)
        )(learnt)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(learnt, updates), state), None

    start = params.init(acceptance_head.specs(HEAD, CFG), jax.random.key(7))
    train = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=60)[0][0])
    bounds = Limits.make(0.1, 1, LENGTH)
    model, learnt = specdec(CFG, weights(CFG), CFG, train(start), HEAD, bounds)
    model = AdaptiveDraftModel(CFG, LENGTH, rule=model.rule)
    got = generate(model, learnt, SamplingParams.make(1.0))
    np.testing.assert_array_equal(got.stats.discarded, 0)
    np.testing.assert_array_equal(got.stats.drafted, LENGTH * got.stats.rounds)
    before = generate(model, learnt.replace(rule=start), SamplingParams.make(1.0)).stats
    assert before.drafted.sum() < LENGTH * before.rounds.sum()


@pytest.mark.parametrize("rule", ["head", pytest.param("oracle", marks=pytest.mark.slow)])
def test_the_emitted_law_is_the_targets(rule):
    """Three sampled tokens over round boundaries, against exact enumeration."""
    start = params.init(acceptance_head.specs(HEAD, TINY), jax.random.key(1))
    learnt = start.replace(out=jax.tree.map(lambda x: 4.0 * x, start.out))
    make = AdaptiveDraftModel if rule == "head" else OracleDraftModel
    model = make(TINY, 3, rule=RejectionRisk(HEAD))
    bounds = Limits.make(0.4 if rule == "head" else 1.0, 1, 3)
    given = adaptive(weights(TINY, 9), bounds, learnt)
    assert p_value(TINY, model, given, SamplingParams.make(1.0)) > 1e-4


def adaptive(model: Any, bounds: Limits, learnt: Any) -> Any:
    return AdaptiveParams(model, bounds, learnt)


@pytest.mark.slow
def test_the_oracle_discards_one_token_per_round_at_most():
    model = OracleDraftModel(CFG, LENGTH)
    got = generate(model, adaptive(near(), Limits.make(1.0, 1, LENGTH), None), SAMPLED)
    fixed = generate(
        AdaptiveDraftModel(CFG, LENGTH),
        adaptive(near(), Limits.make(1.0, 1, LENGTH), None),
        SAMPLED,
    )
    assert got.tokens == fixed.tokens
    np.testing.assert_array_equal(got.stats.rounds, fixed.stats.rounds)
    assert np.all(got.stats.discarded <= got.stats.rounds)
    assert got.stats.discarded.sum() < fixed.stats.discarded.sum()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        Limits.make(0.5, 3, 2)
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        Limits.make(0.5, 0, 2)
    few = config(vocab_size=8)
    with pytest.raises(ValueError, match="draft model has 8 tokens and the target 24"):
        specdec(CFG, weights(few), few, head(), HEAD)
    with pytest.raises(ValueError, match=r"\.blocks\.w has shape \(2, 16, 16\)"):
        specdec(CFG, near(), CFG, head(), AcceptanceConfig(num_layers=3))
    wide = config(hidden_size=32)
    with pytest.raises(ValueError, match="load it with the config it was saved with"):
        specdec(CFG, weights(wide), wide, head(), HEAD)
