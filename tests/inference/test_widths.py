import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import loop
from inference.drafter import NoDrafter, TargetOutputs, narrower_widths, static_draft
from inference.drafters.draft_model import draft_model
from inference.drafters.lookup import LookupDrafter
from inference.widths import check_widths, narrow, needed, run_one, widen
from ops.sampling import SamplingParams
from ops.tree import chain_tree, tree_from_paths
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import (
    NEW,
    ScriptedDrafter,
    assert_greedy,
    config,
    engine,
    prompts,
    weights,
)

BUSHY = tree_from_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_branch_asked_for_runs(index):
    ran: list[int] = []

    def branch(number):
        def run(x):
            jax.debug.callback(lambda: ran.append(number))
            return x * 10 + number

        return run

    run = jax.jit(lambda i, x: run_one(i, [branch(n) for n in range(3)], x))
    assert int(run(index, 4)) == 40 + index
    jax.effects_barrier()
    assert ran == [index]


def test_what_a_draft_needs_is_its_last_valid_node_in_the_row_that_has_most():
    valid = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 0]], bool)
    draft = static_draft(chain_tree(3), jnp.zeros((3, 4), jnp.int32), valid)
    nobody = jnp.zeros((3,), bool)
    assert int(needed(draft, nobody)) == 4
    assert int(needed(draft, nobody.at[1].set(True))) == 2
    assert int(needed(draft, ~nobody)) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_narrow_chain_is_a_chain_and_a_narrow_tree_is_none(width):
    chain = static_draft(chain_tree(5), jnp.zeros((2, 6), jnp.int32))
    tree = static_draft(BUSHY, jnp.zeros((2, 6), jnp.int32))
    assert narrow(chain, width).is_chain
    assert narrow(chain, width).max_depth == width - 1
    assert not narrow(tree, width).is_chain
    assert narrow(tree, 6) is tree
    np.testing.assert_array_equal(narrow(tree, width).mask[0], BUSHY.mask[:width, :width])


def test_outputs_of_a_narrow_pass_are_filled_up():
    out = widen(TargetOutputs(jnp.ones((2, 3), "int32"), hidden_states=jnp.ones((4, 2, 3, 5))), 6)
    assert out.tokens.shape == (2, 6)
    assert out.hidden is None
    assert out.hidden_states.shape == (4, 2, 6, 5)
    assert not out.hidden_states[:, :, 3:].any()


@pytest.mark.parametrize(
    "drafter",
    [LookupDrafter(6, (2, 1)), TokenRecycling(), ScriptedDrafter()],
    ids=["lookup", "recycling", "scripted"],
)
def test_texts_and_counts_are_those_of_the_full_width(drafter):
    rng = np.random.default_rng(5)
    params = jnp.asarray(rng.integers(0, 24, (4, 64)), "int32")
    params = params if isinstance(drafter, ScriptedDrafter) else None
    full = engine(drafter=drafter, drafter_params=params, widths=()).generate(prompts(), NEW)
    some = engine(drafter=drafter, drafter_params=params, widths=(1, 2, 4)).generate(prompts(), NEW)
    for prompt, new in zip(prompts(), some.tokens, strict=True):
        assert_greedy(config(), prompt, new)
    assert some.tokens == full.tokens
    jax.tree.map(np.testing.assert_array_equal, some.stats, full.stats)


def test_sampled_texts_are_those_of_the_full_width():
    sampling = SamplingParams.make(0.9, top_k=20)
    draft = draft_model(config(), weights(config(num_layers=1), 1), config(num_layers=1))
    drafter, params = draft
    made = [
        engine(drafter=drafter, drafter_params=params, widths=widths)
        .generate(prompts(), NEW, sampling=sampling)
        .tokens
        for widths in ((), (1, 2))
    ]
    assert made[0] == made[1]


def test_the_narrowest_pass_that_holds_the_draft_is_taken(monkeypatch):
    seen: list[int] = []
    score = loop.score_draft

    def spy(params, cfg, policy, cache, draft, *rest):
        nodes = draft.tokens.shape[1]
        jax.debug.callback(lambda: seen.append(nodes))
        return score(params, cfg, policy, cache, draft, *rest)

    monkeypatch.setattr(loop, "score_draft", spy)
    # Settings that no other test has: a program compiled without the spy would say nothing.
    drafter = LookupDrafter(7, (2,), widths=(1, 3))
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    engine(drafter=drafter).generate([text], 1)
    jax.effects_barrier()
    assert seen == [1]
    engine(drafter=drafter).generate([[*text, 1, 2]], 1)
    jax.effects_barrier()
    assert seen == [1, 8]


def test_a_drafter_names_its_widths_and_an_engine_may_name_others():
    assert narrower_widths(NoDrafter()) == ()
    assert narrower_widths(LookupDrafter()) == (1,)
    assert check_widths((9, 4, 1, 4), 8) == (1, 4, 8)
    assert check_widths((), 1) == (1,)
    with pytest.raises(ValueError, match="at least one token"):
        check_widths((0, 2), 8)
    assert dataclasses.replace(engine(), widths=(1,)).generate([[1, 2]], 2).tokens
