"""Chunked pipelines: schedules worked out by hand, and that equal costs are the best cut."""

import itertools

import numpy as np
import pytest

from research.context.qwen25_1m.pipeline import (
    ChunkCost,
    best_equal,
    equal_chunks,
    even_stages,
    plan_chunks,
    plan_stream,
    simulate,
)

COST = ChunkCost(per_token=1.0, per_pair=2.0)  # a prompt of n tokens takes n + n^2


def test_two_chunks_on_two_stages_by_hand():
    """Stage 1 works 0 to 1 and 1 to 4, stage 2 works 1 to 2, waits, and works 4 to 7."""
    found = simulate(np.array([[1.0, 1.0], [3.0, 3.0]]))
    np.testing.assert_array_equal(found.starts, [[0, 1], [1, 4]])
    np.testing.assert_array_equal(found.ends, [[1, 2], [4, 7]])
    assert found.makespan == 7 and found.bubble == pytest.approx(6 / 14)
    even = simulate(np.full((2, 2), 2.0))
    assert even.makespan == 6 and even.bubble == pytest.approx(4 / 12)


def test_a_chunk_waits_for_its_stage_and_for_its_hand_over():
    found = simulate(np.array([[1.0, 5.0], [2.0, 1.0]]), handover=0.5)
    np.testing.assert_array_equal(found.starts, [[0, 1.5], [1, 6.5]])
    assert found.makespan == 7.5


def test_equal_costs_by_hand():
    """14 + 14^2 = 210 is half of 20 + 20^2 = 420."""
    planned = plan_chunks(20, COST, stages=2, count=2)
    np.testing.assert_array_equal(planned, [14, 6])
    np.testing.assert_array_equal(COST.times(planned), [210, 210])
    np.testing.assert_array_equal(COST.times(equal_chunks(20, 2)), [110, 310])
    dynamic, fixed = (
        simulate(even_stages(COST.times(sizes), 2)) for sizes in (planned, equal_chunks(20, 2))
    )
    assert dynamic.makespan == 315 and fixed.makespan == 365
    assert dynamic.bubble == pytest.approx(1 / 3) and fixed.bubble == pytest.approx(1 - 420 / 730)


def test_the_cost_of_a_chunk_is_that_of_its_tokens_and_of_the_pairs_with_its_prefix():
    cost = ChunkCost(per_token=3.0, per_pair=0.5, fixed=7.0)
    sizes, prefix = np.array([4, 6, 2]), np.array([0, 4, 10])
    want = 7 + 3 * sizes + 0.5 * sizes * (prefix + sizes / 2)
    np.testing.assert_allclose(cost.times(sizes), want)
    np.testing.assert_allclose(cost.reach(np.asarray(cost.work(np.arange(1, 9)))), np.arange(1, 9))


def test_without_attention_equal_costs_are_equal_sizes():
    linear = ChunkCost(per_token=2.0, per_pair=0.0)
    np.testing.assert_array_equal(plan_chunks(1000, linear, 4, 7), equal_chunks(1000, 7))


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_makespan_on_even_stages_is_the_sum_and_the_largest_for_the_other_stages(stages):
    times = np.random.default_rng(0).random(9)
    want = (times.sum() + (stages - 1) * times.max()) / stages
    found = simulate(even_stages(times, stages))
    assert found.makespan == pytest.approx(want)
    assert found.bubble == pytest.approx(1 - times.sum() / stages / want)


def test_no_cut_of_a_prompt_into_as_many_chunks_ends_earlier():
    tokens, count, stages = 40, 4, 3

    def makespan(sizes):
        return simulate(even_stages(COST.times(np.asarray(sizes)), stages)).makespan

    cuts = itertools.combinations(range(1, tokens), count - 1)
    best = min(makespan(np.diff([0, *cut, tokens])) for cut in cuts)
    # Chunks are whole tokens, and the last token of a chunk costs up to 1 + 2 * 40.
    token = (stages - 1) * (1 + 2 * tokens) / 2 / stages
    assert best <= makespan(plan_chunks(tokens, COST, stages, count)) <= best + token
    assert makespan(equal_chunks(tokens, count)) > best + token


@pytest.mark.parametrize("stages", [2, 8])
def test_the_number_of_chunks_is_the_best_one(stages):
    cost = ChunkCost(per_token=1.0, per_pair=0.01, fixed=300.0)

    def makespan(sizes):
        return simulate(even_stages(cost.times(sizes), stages)).makespan

    counts = range(1, 400)
    best = min(makespan(plan_chunks(8192, cost, stages, count)) for count in counts)
    chosen = plan_chunks(8192, cost, stages)
    assert best <= makespan(chosen) < 1.001 * best
    tried = [-(-8192 // count) for count in counts]
    (strongest,) = best_equal([8192], cost, stages, tried)
    assert makespan(strongest) == min(makespan(equal_chunks(8192, -(-8192 // n))) for n in tried)
    assert makespan(chosen) < makespan(strongest)
    assert len(plan_chunks(8192, cost, 1)) == 1  # nothing to overlap


@pytest.mark.parametrize(
    "tokens, count, multiple", [(1000, 7, 64), (64, 64, 1), (129, 3, 64), (100, 60, 1)]
)
def test_sizes_are_whole_blocks_and_make_up_the_prompt(tokens, count, multiple):
    for sizes in (
        plan_chunks(tokens, COST, 2, count, multiple),
        equal_chunks(tokens, count, multiple),
    ):
        assert sizes.sum() == tokens and len(sizes) == count and sizes.min() > 0
        assert not (sizes[:-1] % multiple).any()


def test_a_stream_of_prompts_has_chunks_of_one_cost():
    cost = ChunkCost(per_token=1.0, per_pair=0.01, fixed=300.0)
    lengths = [4000, 16000, 8000]
    plans = plan_stream(lengths, cost, stages=4)
    assert [plan.sum() for plan in plans] == lengths
    times = np.concatenate([cost.times(plan) for plan in plans])
    assert times.max() / times.min() < 1.3
    apart = np.concatenate(
        [cost.times(equal_chunks(n, len(p))) for n, p in zip(lengths, plans, strict=True)]
    )
    assert simulate(even_stages(times, 4)).bubble < simulate(even_stages(apart, 4)).bubble


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ValueError, match=r"5 chunks of 256 tokens in blocks of 64"):
        plan_chunks(256, COST, 2, 5, 64)
    with pytest.raises(ValueError, match="0 chunks of 256 tokens"):
        equal_chunks(256, 0)
    with pytest.raises(ValueError, match="without a fixed cost the more chunks the better"):
        plan_chunks(256, COST, 2)
    with pytest.raises(ValueError, match="0 stages"):
        plan_stream([256], COST, 0)
    with pytest.raises(ValueError, match="a token must cost something"):
        ChunkCost(0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"times of shape \(1, 2\)"):
        simulate(np.array([[1.0, -1.0]]))
