"""Drafts that end by a rule without training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import NoDrafter
from inference.drafters.adaptive import (
    AdaptiveDraftModel,
    AdaptiveParams,
    Confidence,
    Entropy,
    Fixed,
    Heuristic,
    Limits,
    Rule,
    draft_until,
)
from inference.drafters.draft_model import DraftModel
from inference.loop import decode_rounds
from models import decoder
from ops.sampling import SamplingParams
from tests.inference.models import NEW, assert_needs_no_laws, config, engine, near, prompts

CFG, LENGTH = config(), 5
SAMPLED = SamplingParams.make(1.0)


def generate(rule: Rule, limits: Limits, sampling: SamplingParams = SAMPLED, **settings: Any):
    drafter = AdaptiveDraftModel(CFG, LENGTH, rule=rule, **settings)
    eng = engine(drafter=drafter, drafter_params=AdaptiveParams(near(), limits))
    return eng.generate(prompts(), NEW, sampling=sampling)


def test_nothing_is_drawn_where_no_row_samples():
    drafter = AdaptiveDraftModel(CFG, LENGTH, rule=Fixed())
    params = AdaptiveParams(near(), Limits.make(longest=LENGTH))
    assert_needs_no_laws(engine(drafter=drafter, drafter_params=params))


def test_a_fixed_length_is_the_plain_draft_model():
    got = generate(Fixed(), Limits.make(longest=LENGTH))
    plain = engine(drafter=DraftModel(CFG, LENGTH), drafter_params=near()).generate(
        prompts(), NEW, sampling=SAMPLED
    )
    assert got.tokens == plain.tokens
    jax.tree.map(np.testing.assert_array_equal, got.stats, plain.stats)
    # Lengths are data: no other program.
    compiled = decode_rounds._cache_size()
    for longest in (1, 3):
        stats = generate(Fixed(), Limits.make(longest=longest)).stats
        np.testing.assert_array_equal(stats.drafted, longest * stats.rounds)
    assert decode_rounds._cache_size() == compiled


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [
        pytest.param(Confidence(), 0.6, id="confidence"),
        pytest.param(Entropy(), 2.4, id="entropy", marks=pytest.mark.slow),
    ],
)
def test_greedy_text_is_exact_and_drafts_are_shorter_when_unsure(rule, threshold):
    got = generate(rule, Limits.make(threshold, longest=LENGTH), SamplingParams.make())
    plain = engine(drafter=NoDrafter(LENGTH + 1)).generate(prompts(), NEW)
    assert got.tokens == plain.tokens
    stats = got.stats
    assert np.all(stats.drafted >= stats.rounds)
    assert stats.rounds.sum() < stats.drafted.sum() < LENGTH * stats.rounds.sum()


def test_risks_are_those_of_the_laws():
    logits = jnp.log(jnp.asarray([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]))
    count, hidden = jnp.asarray(0), jnp.zeros((2, 4))
    risk, _ = Confidence().risk(None, None, count, hidden, logits)
    np.testing.assert_allclose(risk, [0.3, 0.6], atol=1e-6)
    risk, _ = Entropy().risk(None, None, count, hidden, 5.0 + logits)
    law = np.exp(np.asarray(logits))
    np.testing.assert_allclose(risk, -(law * np.log(law)).sum(1), atol=1e-6)
    risk, _ = Fixed().risk(None, None, count, hidden, logits)
    np.testing.assert_array_equal(risk, [0.0, 0.0])


def test_the_heuristic_follows_what_was_accepted():
    """Two more after a whole draft, one less otherwise, round by round in the real loop."""
    drafter = AdaptiveDraftModel(CFG, LENGTH, rule=Heuristic(), first_length=2)
    params = AdaptiveParams(near(), Limits.make(longest=LENGTH))
    eng = engine(drafter=drafter, drafter_params=params)
    state, seeds = eng.start(prompts(), NEW, SAMPLED)
    allowed, before, seen = np.full(4, 2), np.zeros((2, 4), int), set()
    while not bool(state.done.all()):
        live = ~np.asarray(state.done)
        state = decode_rounds(
            eng.params, CFG, decoder.default_policy(CFG), drafter, params, state, seeds, SAMPLED,
            jnp.zeros((0,), jnp.int32), jnp.asarray(1, jnp.int32), extent=128,
        )  # fmt: skip
        now = np.stack([state.stats.drafted, state.stats.accepted])
        drafted, accepted = now - before
        before = now
        np.testing.assert_array_equal(drafted[live], allowed[live])
        step = np.where(accepted >= drafted, allowed + 2, np.maximum(allowed - 1, 1))
        going = live & ~np.asarray(state.done)
        allowed = np.where(live, np.minimum(step, LENGTH), allowed)
        np.testing.assert_array_equal(np.asarray(state.drafter.allowed)[going], allowed[going])
        seen |= set(drafted[live].tolist())
    assert len(seen) > 2


def test_rows_stop_one_by_one_and_bounds_come_first():
    risks = jnp.asarray([[0.0, 0.9, 0.0, 0.0], [0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ended = jnp.asarray([[False] * 4, [False] * 4, [False, False, True, False]])

    @jax.jit
    def run(going: Any, limits: Limits, most: Any) -> Any:
        def step(count: Any, calls: Any) -> Any:
            return risks[:, count], ended[:, count], calls + 1

        first = (risks[:, 0], ended[:, 0], jnp.asarray(1))
        return draft_until(step, first, going, limits, most)

    def lengths(limits: Limits, going: Any = (True,) * 3, most: Any = (4,) * 3) -> Any:
        length, calls = run(jnp.asarray(going), limits, jnp.asarray(most))
        return length.tolist(), int(calls)

    assert lengths(Limits.make(0.5, 1, 4)) == ([2, 1, 3], 3)
    assert lengths(Limits.make(0.5, 2, 4)) == ([2, 4, 3], 4)
    assert lengths(Limits.make(0.5, 1, 2)) == ([2, 1, 2], 2)
    assert lengths(Limits.make(1.0, 1, 4), most=(1, 4, 2)) == ([1, 4, 2], 4)
    assert lengths(Limits.make(0.5, 1, 4), going=(False, True, False)) == ([0, 1, 0], 1)
    assert lengths(Limits.make(-1.0, 1, 4)) == ([1, 1, 1], 1)
