"""Early exits: exact text at every exit and length, states reused as they are, DEL's choices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Draft, NoDrafter, Request, Target, TargetOutputs
from inference.loop import decode_rounds, propose, score_draft
from models import decoder
from models.readout import likeliest_tokens
from ops.sampling import SamplingParams
from research.speculative.del_exit.drafter import Controls, ExitDrafter, early_exit
from research.speculative.del_exit.statistics import (
    acceptance,
    choose_exit,
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

CFG = config(num_layers=3)
TINY = config(vocab_size=4, num_layers=3, hidden_size=8, init_stddev=0.7, max_length=16)
SAMPLED = SamplingParams.make(0.9, top_k=20, top_p=0.95)
GREEDY = SamplingParams.make()
NO_PROMPT = TargetOutputs(tokens=None)


def request_of(lengths: list[int]) -> Request:
    """What the drafter's state depends on."""
    return Request(None, jnp.asarray(lengths), None, GREEDY)


def drafter_of(cfg: decoder.Config = CFG, controls: Any = None, **settings: Any) -> Any:
    """A drafter of at most six tokens."""
    return early_exit(cfg, controls, **({"max_draft": 6, "context": 4} | settings))


def run(sampling: Any = None, new: int = NEW, controls: Any = None, **settings: Any) -> Any:
    drafter, params = drafter_of(CFG, controls, **settings)
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    return eng.generate(prompts(), new, sampling=sampling)


def test_nothing_is_drawn_where_no_row_samples():
    drafter, params = drafter_of()
    assert_needs_no_laws(engine(CFG, drafter=drafter, drafter_params=params))


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return engine(CFG, drafter=NoDrafter(7)).generate(prompts(), NEW).tokens


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"missing": "half", "mode": "min", "controls": {"always_cut": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"mode": "gamma"}, marks=pytest.mark.slow),
        {"method": "fsm", "controls": {"exit_layer": 1, "gamma": 3}},
        pytest.param(
            {"method": "dv", "controls": {"exit_layer": 2, "threshold": 0.3}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["del", "del, half, min", "del, gamma", "fsm", "dv"],
)
def test_greedy_text_is_that_of_plain_decoding(settings, plain):
    got = run(**settings)
    assert got.tokens == plain
    for prompt, new in zip(prompts(), got.tokens, strict=True):
        assert_greedy(CFG, prompt, new)
    stats = got.stats
    assert np.all(stats.layer_passes >= 3 * stats.rounds)
    assert np.all(stats.emitted <= stats.rounds + stats.accepted)


def test_every_exit_and_length_gives_the_same_text_from_one_program(plain):
    run(method="fixed")
    before = decode_rounds._cache_size()
    for exit_layer in (1, 2):
        for gamma in (0, 1, 6):
            got = run(method="fixed", controls={"exit_layer": exit_layer, "gamma": gamma})
            assert got.tokens == plain
            stats = got.stats
            np.testing.assert_array_equal(
                stats.layer_passes, 3 * stats.rounds + exit_layer * stats.drafted
            )
            if gamma == 0:
                np.testing.assert_array_equal(stats.rounds, [NEW] * 4)
    assert decode_rounds._cache_size() == before


@pytest.mark.slow
def test_a_fixed_set_of_candidates_gives_the_text_of_plain_sampling():
    got = run(SAMPLED, sampled=False)
    want = engine(CFG, drafter=NoDrafter(7)).generate(prompts(), NEW, sampling=SAMPLED)
    assert got.tokens == want.tokens


@pytest.mark.slow
def test_texts_do_not_depend_on_the_batch():
    drafter, params = drafter_of()
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    together = eng.generate(prompts(), NEW, sampling=SAMPLED).tokens
    alone = eng.generate([prompts()[3]], NEW, sampling=SAMPLED, seeds=[3]).tokens
    assert alone[0] == together[3]


@jax.jit
def whole_pass(tokens: Any) -> decoder.Output:
    """The pass over whole texts."""
    return decoder.forward(weights(CFG), CFG, tokens, all_hidden=True)


@jax.jit
def unembed(hidden: Any) -> Any:
    return decoder.unembed(weights(CFG), CFG, hidden)


@jax.jit
def read(states: Any) -> Any:
    return likeliest_tokens(weights(CFG), CFG, states)


# One round by hand.
@pytest.fixture(scope="module")
def one_round():
    """The state before, the draft, the target's pass over it, and the cache that draft left."""
    drafter, params = drafter_of(method="fixed", controls={"exit_layer": 2, "gamma": 3})
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, GREEDY)
    policy = decoder.default_policy(CFG)

    @jax.jit
    def one(weights_: Any, params: Any, state: Any) -> Any:
        draft, _, cache = propose(weights_, CFG, drafter, params, state, seeds, GREEDY, 64, policy)
        after, out = score_draft(
            weights_, CFG, policy, cache, draft, state.limit, 64, frozenset({"hidden_states"})
        )
        return draft, cache, after, out

    return state, *one(eng.params, params, state)


def test_the_pass_from_the_exit_is_the_whole_models(one_round):
    state, draft, _, after, out = one_round
    lengths = np.asarray(state.length)
    texts = np.zeros((4, 16), np.int32)
    for row, length in enumerate(lengths):
        texts[row, : length - 1] = state.tokens[row, : length - 1]
        texts[row, length - 1 : length + 3] = draft.tokens[row, :4]
    whole = whole_pass(jnp.asarray(texts))
    logits = unembed(out.hidden)
    for row, length in enumerate(lengths):
        drafted = np.asarray(draft.tokens[row])[np.asarray(draft.valid[row])]
        assert len(drafted) == 4
        at = slice(length - 1, length + 3)
        np.testing.assert_allclose(logits[row, :4], unembed(whole.hidden)[row, at], atol=1e-4)
        np.testing.assert_allclose(
            out.hidden_states[3:, row, :4], whole.hidden_states[3:, row, at], atol=1e-4
        )
        np.testing.assert_allclose(
            draft.resume.hidden[row, :4], whole.hidden_states[2, row, at], atol=1e-4
        )
    assert np.asarray(after.scratch).tolist() == [7] * 4
    # Keys and values of all layers, drafted ones too, are those of a pass over the text.
    whole_texts = [[*texts[row, : n + 3].tolist(), 0] for row, n in enumerate(lengths)]
    fresh = prefilled(weights(CFG), CFG, whole_texts)
    for a, b in zip(jax.tree.leaves(after.layers), jax.tree.leaves(fresh.layers), strict=True):
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(a[row, :, : n + 3], b[row, :, : n + 3], atol=1e-4)


def test_what_is_committed_stays_as_it_was(one_round):
    state, _, cache, after, _ = one_round
    for held in (cache, after):
        for a, b in zip(
            jax.tree.leaves(state.cache.layers), jax.tree.leaves(held.layers), strict=True
        ):
            for row, n in enumerate(np.asarray(state.cache.length)):
                np.testing.assert_array_equal(a[row, :, :n], b[row, :, :n])
    # The draft has written its own layers' entries, and those above only in the target's pass.
    for layer, (a, b) in enumerate(zip(state.cache.layers, cache.layers, strict=True)):
        assert bool(jnp.array_equal(a.k, b.k)) == (layer >= 2)


def test_the_draft_is_what_its_exit_reads(one_round):
    _, draft, _, _, _ = one_round
    tokens, confidence = read(draft.resume.hidden)
    for row in range(4):
        np.testing.assert_array_equal(tokens[row, :3], draft.tokens[row, 1:4])
    assert np.all((np.asarray(confidence) > 0) & (np.asarray(confidence) <= 1.0001))
    assert int(draft.resume.layer) == 2 and np.asarray(draft.layer_passes).tolist() == [6] * 4


def test_drafts_end_at_an_end_token_at_the_limit_and_where_unsure():
    free = run(method="fixed", controls={"exit_layer": 1, "gamma": 6}, new=1)
    np.testing.assert_array_equal(free.stats.drafted, [0] * 4)
    two = run(method="fixed", controls={"exit_layer": 1, "gamma": 6}, new=2)
    assert np.all(two.stats.drafted <= two.stats.rounds)
    drafter, params = drafter_of(method="fixed", controls={"exit_layer": 1, "gamma": 6})
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, GREEDY)

    @functools.partial(jax.jit, static_argnums=1)
    def draft(params: Any, drafter: Any, state: Any, eos: Any) -> Any:
        policy = decoder.default_policy(CFG)
        return propose(eng.params, CFG, drafter, params, state, seeds, GREEDY, 64, policy, eos)[0]

    nothing = jnp.asarray([-1])
    whole = draft(params, drafter, state, nothing)
    assert np.asarray(whole.valid).sum(1).tolist() == [7] * 4
    end = int(whole.tokens[0, 2])
    cut = draft(params, drafter, state, jnp.asarray([end]))
    first = int(np.argmax(np.asarray(whole.tokens[0, 1:]) == end)) + 1
    assert np.asarray(cut.valid[0]).sum() == first + 1
    wary, never = drafter_of(method="dv", controls={"exit_layer": 1, "threshold": 1.0})
    state = dataclasses.replace(
        state, drafter=state.drafter.replace(threshold=jnp.ones(4, jnp.float32))
    )
    assert np.asarray(draft(never, wary, state, nothing).valid).sum(1).tolist() == [2] * 4


# DEL.
def test_the_first_round_drafts_one_token_and_knows_the_prompt():
    drafter, params = drafter_of()
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, GREEDY)
    found = state.drafter.statistics
    # Rows of 1, 2, 3 and 7 tokens have 0, 1, 2 and 6 positions before the root, 4 of them counted.
    np.testing.assert_array_equal(found.counts[:, :2].sum(-1), [[n] * 2 for n in (0, 1, 2, 4)])
    assert not np.any(found.counts[:, 2])
    prompt = prompts()[3]
    whole = whole_pass(jnp.asarray([prompt + [0] * 9] * 4))
    tokens, sure = read(whole.hidden_states[1:, 0, 2:6])
    hits = np.asarray(tokens[:2] == tokens[2:])
    np.testing.assert_array_equal(found.counts[3, :2, 0], hits.sum(1))
    np.testing.assert_allclose(found.confidences[3, :2, 0], (hits * sure[:2]).sum(1), atol=1e-4)

    after = decode_rounds(
        eng.params, CFG, decoder.default_policy(CFG), drafter, params, state, seeds, GREEDY,
        jnp.zeros((0,), jnp.int32), jnp.asarray(1), extent=64,
    )  # fmt: skip
    np.testing.assert_array_equal(after.stats.drafted, [1] * 4)
    np.testing.assert_array_equal(after.stats.layer_passes, [4] * 4)
    learnt = jax.jit(drafter._learn)(params, after.drafter, _target(eng))
    # Nothing decays in the first round; a wrong first token leaves one position, else two.
    wrong = np.asarray(after.stats.accepted) == 0
    counts = np.asarray(learnt.statistics.counts[:, :2].sum(-1))
    base = np.array([0, 1, 2, 4])
    assert np.all((counts[:, 0] == base + 2) | (wrong & (counts[:, 0] == base + 1)))
    for row in range(4):
        want = choose_exit(acceptance(jax.tree.map(lambda x, r=row: x[r], learnt.statistics)), 3, 6)
        assert [int(learnt.exit_layer[row]), int(learnt.gamma[row])] == [int(x) for x in want]


def _target(eng: Any) -> Any:
    return Target(eng.params, eng.cfg, decoder.default_policy(eng.cfg))


def test_what_is_seen_of_the_exit_in_use_is_its_draft():
    """Shadow tokens of drafted positions, read again from the states that are kept."""
    drafter, params = drafter_of()
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, GREEDY)

    @jax.jit
    def drafted_next(state: Any) -> Any:
        policy = decoder.default_policy(CFG)
        return propose(eng.params, CFG, drafter, params, state, seeds, GREEDY, 64, policy)[0]

    for _ in range(3):
        draft = drafted_next(state)
        state = decode_rounds(
            eng.params, CFG, decoder.default_policy(CFG), drafter, params, state, seeds, GREEDY,
            jnp.zeros((0,), jnp.int32), jnp.asarray(1), extent=64,
        )  # fmt: skip
        tokens, _ = read(state.drafter.last.states)
        drafted = np.asarray(draft.valid).sum(1) - 1
        for row in range(4):
            own = tokens[row, int(state.drafter.exit_layer[row]) - 1]
            n = int(drafted[row])
            np.testing.assert_array_equal(own[:n], draft.tokens[row, 1 : n + 1])
            assert state.stats.emitted[row] >= 1 and n <= 6


def test_a_round_emits_and_teaches_no_more_than_its_draft_and_one():
    """Without decay every position that is learnt from counts once for every exit."""
    drafter, params = drafter_of(controls={"omega": 1.0})
    eng = engine(CFG, drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, GREEDY)
    learn, lengths = jax.jit(lambda params, own: drafter._learn(params, own, _target(eng))), set()

    def seen(own: Any) -> np.ndarray:
        return np.asarray(own.statistics.counts[:, :2].sum(-1))

    for _ in range(3):
        before, drafted = np.asarray(state.length), np.asarray(state.stats.drafted)
        state = decode_rounds(
            eng.params, CFG, decoder.default_policy(CFG), drafter, params, state, seeds, GREEDY,
            jnp.zeros((0,), jnp.int32), jnp.asarray(1), extent=64,
        )  # fmt: skip
        most = np.asarray(state.stats.drafted) - drafted + 1
        emitted = np.asarray(state.length) - before
        assert np.all((emitted >= 1) & (emitted <= most))
        used = seen(learn(params, state.drafter)) - seen(state.drafter)
        assert np.all((used >= 1) & (used <= most[:, None]))
        lengths |= set(most.tolist())
    assert len(lengths) > 1


def test_lengths_and_thresholds_of_the_static_methods_move():
    drafter, params = drafter_of(method="fsm", controls={"exit_layer": 2, "gamma": 1})
    state = drafter.init(params, _target(engine(CFG)), request_of([1] * 3), NO_PROMPT, 64)
    valid = jnp.asarray([[1, 1, 1, 0]] * 3, bool)
    draft = Draft(valid, valid, valid, valid, valid)

    def observed(drafter: ExitDrafter, params: Controls, state: Any, n: list[int]) -> Any:
        numbers = jnp.asarray(n)
        path = jnp.zeros((3, 4), jnp.int32)
        return drafter.observe(params, state, draft, NO_PROMPT, path, numbers, numbers)

    state = state.replace(gamma=jnp.asarray([2, 2, 2]))
    assert np.asarray(observed(drafter, params, state, [3, 2, 0]).gamma).tolist() == [3, 1, 2]
    state = state.replace(gamma=jnp.asarray([6, 1, 1]))
    assert np.asarray(observed(drafter, params, state, [3, 1, 0]).gamma).tolist() == [6, 1, 1]
    drafter, params = drafter_of(method="dv", controls={"threshold": 0.5, "target_rate": 0.6})
    state = drafter.init(params, _target(engine(CFG)), request_of([1] * 3), NO_PROMPT, 64)
    after = observed(drafter, params, state, [3, 2, 0])
    np.testing.assert_allclose(after.rate, [0.8, 0.55, 0.6], rtol=1e-6)
    np.testing.assert_allclose(after.threshold, [0.499, 0.501, 0.5], rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_blocked_readout_is_that_of_all_logits(tied):
    cfg = dataclasses.replace(CFG, tied=tied)
    params = weights(cfg)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 16)), jnp.float32)
    hidden = decoder.normalize(states, params.final_norm, cfg.norm_eps)
    logits = decoder.unembed(params, cfg, hidden)
    for block in (5, 24, 1024):
        tokens, confidence = likeliest_tokens(params, cfg, states, block)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        np.testing.assert_allclose(confidence, jax.nn.softmax(logits).max(-1), rtol=1e-5)


# The law of sampled text.
@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        pytest.param(
            SamplingParams.make(1.0),
            {"method": "fixed", "controls": {"exit_layer": 1, "gamma": 2}},
            marks=pytest.mark.slow,
        ),
        (SamplingParams.make(0.7, top_p=0.85), {}),
    ],
    ids=["fixed", "del, warped"],
)
def test_sampled_text_has_the_targets_law(sampling, settings):
    drafter, params = drafter_of(TINY, **({"max_draft": 2} | settings))
    assert p_value(TINY, drafter, params, sampling) > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: early_exit(config(num_layers=1)), "a model of one layer has no exit"),
        (lambda: early_exit(CFG, {"exit_layer": 3}), "exit 3 is beyond a model of 3 layers"),
        (lambda: early_exit(CFG, {"exit_layer": 0}), "exit 0 is beyond"),
        (
            lambda: early_exit(CFG, {"gamma": 19}, method="fixed"),
            "drafts of 19 tokens do not fit max_draft 18",
        ),
        (lambda: early_exit(CFG, {"omega": 1.5}), "lie within 0 and 1"),
        (lambda: early_exit(CFG, method="best"), "unknown method 'best'"),
        (lambda: early_exit(CFG, mode="max"), "unknown mode 'max'"),
        (lambda: early_exit(CFG, missing="zero"), "unknown missing 'zero'"),
        (lambda: early_exit(CFG, max_draft=0), "must be 1 or more"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_draft_longer_than_the_cache_is_refused():
    drafter, params = early_exit(CFG)
    with pytest.raises(ValueError, match="a draft needs 19 cache slots but there are 16"):
        drafter.init(params, _target(engine(CFG)), request_of([1]), NO_PROMPT, 16)
