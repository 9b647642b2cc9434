import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Draft, NoDrafter
from inference.drafters.draft_model import draft_model
from inference.drafters.lookup import LookupDrafter
from inference.loop import decode_rounds, prefill_chunk, score_draft
from models import decoder
from models.positions import RopeScaling
from ops.sampling import SamplingParams
from ops.tree import tree_from_parents
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import (
    NEW,
    PROMPT_LENGTHS,
    ROUNDING,
    VOCAB,
    ScriptedDrafter,
    assert_greedy,
    config,
    engine,
    forward_logits,
    near,
    prefilled,
    prompts,
    script,
    weights,
)

WINDOWS = (4, None)
DYNAMIC = RopeScaling("dynamic", factor=4.0, original_max_position=8)


@pytest.mark.parametrize("windows", [None, WINDOWS], ids=["full", "window"])
def test_a_tree_pass_equals_a_pass_over_every_path(windows):
    cfg, texts = config(windows=windows), prompts(1, 5, 9)
    parent = np.array([-1, 0, 0, 1, 2, 2, 4, 3, 0, 6], np.int32)
    tree = tree_from_parents(jnp.asarray(parent))
    nodes = np.random.default_rng(1).integers(0, VOCAB, (3, len(parent))).astype(np.int32)
    nodes[:, 0] = [text[-1] for text in texts]

    def rows(x):
        return jnp.broadcast_to(x[None], (3, *x.shape))

    draft = Draft(
        jnp.asarray(nodes), rows(tree.parent), rows(tree.depth), rows(tree.mask), rows(tree.valid)
    )
    p, policy, lengths = weights(cfg), decoder.default_policy(cfg), jnp.full((3,), 32, jnp.int32)

    @jax.jit
    def score(cache, draft):
        _, out = score_draft(p, cfg, policy, cache, draft, lengths, 64, frozenset())
        return decoder.unembed(p, cfg, out.hidden)

    got = np.asarray(score(prefilled(weights(cfg), cfg, texts, capacity=64), draft))
    for row, text in enumerate(texts):
        for node in range(len(parent)):
            path = nodes[row, np.flatnonzero(tree.mask[node])].tolist()
            want = forward_logits(cfg, text[:-1] + path)[-1]
            np.testing.assert_allclose(got[row, node], want, atol=ROUNDING)


def one_round_at_a_time(eng, texts, new, after_round, extent=128):
    """Decode greedily, showing the state after every round."""
    greedy, cfg = SamplingParams.make(), eng.cfg
    state, seeds = eng.start(texts, new, greedy)
    while not bool(state.done.all()):
        state = decode_rounds(
            eng.params, cfg, decoder.default_policy(cfg), eng.drafter, eng.drafter_params, state,
            seeds, greedy, jnp.zeros((0,), jnp.int32), jnp.asarray(1, jnp.int32), extent=extent,
        )  # fmt: skip
        after_round(jax.tree.map(np.asarray, state))
    return state


@pytest.mark.parametrize("kind", ["tree", "chain"])
def test_the_cache_after_every_round_equals_one_recomputed(kind):
    """Paths of a tree are gathered, a chain's first entries stay where they are."""
    cfg, texts = config(), prompts()
    drafter, params = TokenRecycling(), None
    if kind == "chain":
        drafter, params = draft_model(cfg, near(), cfg, length=3, sampled=False)
    compared = []

    def compare(state):
        rows = [row[:n].tolist() for row, n in zip(state.tokens, state.length, strict=True)]
        fresh = prefilled(weights(cfg), cfg, rows)
        np.testing.assert_array_equal(state.cache.length, fresh.length)
        np.testing.assert_array_equal(state.cache.next_position, fresh.next_position)
        for row, n in enumerate(state.cache.length):
            np.testing.assert_array_equal(state.cache.positions[row, :n], np.arange(n))
            for a, b in zip(
                jax.tree.leaves(state.cache.layers), jax.tree.leaves(fresh.layers), strict=True
            ):
                np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], atol=1e-5)
        compared.append(state.stats.accepted.sum())

    state = one_round_at_a_time(engine(drafter=drafter, drafter_params=params), texts, NEW, compare)
    # Nothing would be shown if no draft were accepted, or all of them.
    assert compared[-1] > 10 and int(state.stats.discarded.sum()) > 10


def test_counters_add_up_in_every_round():
    drafter = TokenRecycling()
    before = {"emitted": 0, "rounds": 0}

    def check(state):
        stats = state.stats
        emitted, rounds = stats.emitted.sum(), stats.rounds.sum()
        assert 0 < emitted - before["emitted"] <= (rounds - before["rounds"]) * 7
        np.testing.assert_array_equal(stats.drafted, stats.rounds * 80)
        np.testing.assert_array_equal(stats.accepted + stats.discarded, stats.drafted)
        np.testing.assert_array_equal(stats.by_depth.sum(axis=1), stats.accepted)
        np.testing.assert_array_equal(stats.by_node[:, 0], stats.rounds)
        # One node per level is right at most, and its parent with it.
        levels = [stats.by_node[:, drafter.tree.depth == d + 1].sum(axis=1) for d in range(6)]
        np.testing.assert_array_equal(np.stack(levels, 1), stats.by_depth)
        assert np.all(stats.by_node[:, 1:] <= stats.by_node[:, drafter.tree.parent[1:]])
        # Rows that reached the limit inside a path emitted less than they accepted.
        assert np.all(stats.emitted <= stats.accepted + stats.rounds)
        going = ~state.done
        np.testing.assert_array_equal(stats.emitted[going], (stats.accepted + stats.rounds)[going])
        before.update(emitted=emitted, rounds=rounds)

    state = one_round_at_a_time(engine(drafter=drafter), prompts(), NEW, check)
    np.testing.assert_array_equal(state.stats.emitted, [NEW] * 4)


@pytest.mark.parametrize("drafter", [NoDrafter(), LookupDrafter()], ids=["plain", "lookup"])
def test_results_do_not_depend_on_how_often_the_host_looks(drafter):
    eng, seen = engine(drafter=drafter), []
    whole = eng.generate(prompts(), NEW)
    parts = eng.generate(prompts(), NEW, rounds_per_call=3, on_progress=seen.append)
    assert parts.tokens == whole.tokens
    jax.tree.map(np.testing.assert_array_equal, parts.stats, whole.stats)
    assert seen[-1] == whole.tokens and len(seen) >= 3
    for early, late in itertools.pairwise(seen):
        assert all(row == after[: len(row)] for row, after in zip(early, late, strict=True))


def programs(function: Any) -> int:
    """How many programs a jitted function has been compiled to."""
    return function._cache_size()


def test_changing_values_does_not_compile_again():
    eng = engine(drafter=ScriptedDrafter(), drafter_params=script([[]] * 4))

    def run(temperature, top_p, new, seed, eos):
        sampling = SamplingParams.make(temperature, top_p=top_p)
        texts = prompts(*(length + seed for length in PROMPT_LENGTHS), seed=seed)
        eng.generate(texts, new, sampling=sampling, seeds=[seed] * 4, eos=[eos])

    run(0.5, 0.9, 3, 0, 1)
    compiled = programs(decode_rounds), programs(prefill_chunk)
    for i in range(1, 4):
        run(0.5 + 0.3 * i, 0.9 - 0.1 * i, 3 + 2 * i, i, i)
    assert (programs(decode_rounds), programs(prefill_chunk)) == compiled


def test_the_loop_takes_the_buffers_of_its_state():
    """Not even the keys and values are copied: what goes in is gone, what comes out lies there."""
    eng, greedy = engine(), SamplingParams.make()
    state, seeds = eng.start(prompts(), NEW, greedy)
    before = jax.tree.leaves(state.cache.layers)
    places = {leaf.unsafe_buffer_pointer() for leaf in before}
    after = jax.tree.leaves(eng.run(state, seeds, greedy, ()).cache.layers)
    assert all(leaf.is_deleted() for leaf in before)
    assert {leaf.unsafe_buffer_pointer() for leaf in after} == places


@pytest.mark.parametrize("drafter", [NoDrafter(), TokenRecycling()], ids=["plain", "tree"])
@pytest.mark.parametrize(
    "changes", [{"windows": WINDOWS}, {"rope": DYNAMIC}], ids=["window", "dynamic"]
)
def test_windows_and_length_dependent_rotations_with_a_cache(changes, drafter):
    cfg, texts = config(**changes), prompts()
    got = engine(cfg, drafter=drafter).generate(texts, NEW).tokens
    for prompt, new in zip(texts, got, strict=True):
        assert len(new) == NEW
        assert_greedy(cfg, prompt, new, len(prompt) + NEW)
    # The feature matters: the plain model says something else.
    assert got != engine().generate(texts, NEW).tokens


def test_the_bucket_of_slots_grows_with_the_text():
    cfg, texts = config(), prompts(4, 90)
    got = engine().generate(texts, 60)
    for prompt, new in zip(texts, got.tokens, strict=True):
        assert len(new) == 60
        assert_greedy(cfg, prompt, new)
