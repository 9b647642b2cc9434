"""Batched speculation says what single decoding says; its usual mistakes are caught."""

import functools
from typing import Any

import numpy as np
import pytest

from inference.batching import Batching, Job
from inference.drafters.draft_model import DraftModel, draft_model
from inference.engine import Engine
from inference.scheduler import SameLength
from ops.sampling import SamplingParams
from research.speculative.batch_spec.equivalence import (
    Outcome,
    Reference,
    check_batches,
    check_permutation,
    check_poison,
    compare,
    poison,
    reference,
)
from research.speculative.batch_spec.padded import PaddedDecoder, mask_positions, realign_padding
from research.speculative.batch_spec.pool import SequencePool
from tests.inference.models import VOCAB, config, engine, near, prompts, weights
from tests.inference.test_drafters import TINY

CFG, NEW, K = config(), 14, 3
PROMPTS = prompts(1, 2, 3, 7, 9, 4)


@functools.cache
def end() -> int:
    """A token that ends some of the texts."""
    return engine().generate(PROMPTS, NEW).tokens[3][5]


def speculative() -> Engine:
    drafter, params = draft_model(CFG, near(), CFG, length=K, sampled=False)
    return engine(drafter=drafter, drafter_params=params)


@pytest.fixture(scope="module")
def want() -> Reference:
    return reference(engine(), PROMPTS, NEW, [end()])


def together(given: Any) -> list[list[int]]:
    return speculative().generate(given, NEW, eos=[end()]).tokens


def pooled(given: Any) -> list[list[int]]:
    one = Batching(
        speculative(), 4, 128, SameLength(batch=2, window=4), eos=[end()], rounds_per_call=1
    )
    return [result.tokens for result in one.generate([Job(p, NEW) for p in given])]


def padded(fault: Any = None, **settings: Any) -> PaddedDecoder:
    return PaddedDecoder(weights(CFG), CFG, near(), CFG, k=K, eos=end(), fault=fault, **settings)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_every_batch_size_says_the_same(want, batch):
    assert check_batches(together, PROMPTS, want, batch) == Outcome(exact=6)
    assert want.least_margin > 1e-4


@pytest.mark.parametrize("run", [together, pooled], ids=["eqspec", "exspec"])
def test_permuted_prompts_give_permuted_texts(want, run):
    assert check_permutation(run, PROMPTS, want, seed=1) == Outcome(exact=6)


def test_garbage_in_stale_slots_changes_nothing(want):
    assert check_poison(speculative(), PROMPTS, want, NEW, [end()]) == Outcome(exact=6)
    state, _ = speculative().start(PROMPTS, NEW, SamplingParams.make())
    filled = poison(state)
    for cache in (filled.cache, filled.drafter.cache):
        for row, length in enumerate(np.asarray(cache.length)):
            assert np.all(np.asarray(cache.layers[0].v)[row, :, length:] == 1e4)
            assert np.all(np.abs(np.asarray(cache.layers[0].v)[row, :, :length]) < 1e3)


@pytest.mark.parametrize("cap", [False, True], ids=["k + 1", "official cap"])
def test_the_padded_form_says_the_same(want, cap):
    texts, rounds = padded(official_cap=cap).generate(PROMPTS, NEW)
    assert compare(want, texts) == Outcome(exact=6)
    most = K if cap else K + 1
    for one in rounds:
        before, after = one.padding
        added = np.array([len(c) for c in one.committed]) + (np.diff(
            np.stack([one.length[0] - before, one.length[1] - after]), axis=0)[0] > 0)  # fmt: skip
        grown = (one.length[1] - after) - (one.length[0] - before)
        np.testing.assert_array_equal(added, grown)
        assert np.all((grown >= 0) & (grown <= most))
        np.testing.assert_array_equal(after - before, one.length[1] - one.length[0] - grown)
        assert np.all(np.diff(one.positions, axis=1) == 1)
    accepted = np.concatenate([one.accepted for one in rounds])
    assert {0, K} <= set(accepted.tolist())


@pytest.mark.parametrize("fault", ["positions", "cache", "bonus", "growth"])
def test_usual_mistakes_are_caught(want, fault):
    texts, _ = padded(fault).generate(PROMPTS, NEW)
    assert compare(want, texts).wrong > 0


def test_one_row_has_nothing_to_realign():
    _, rounds = padded().generate(PROMPTS[4:5], NEW)
    for one in rounds:
        np.testing.assert_array_equal(one.padding[0], one.padding[1])


def test_bytes_of_a_realignment():
    one = padded()
    batch = one.begin(PROMPTS, NEW)
    layer = batch.cache.layers[0]
    slots = batch.cache.capacity
    held = CFG.num_layers * (layer.k.nbytes + layer.v.nbytes)
    assert one.bytes_per_realignment(len(PROMPTS), slots) == held


def test_rows_that_differ_are_told_from_near_ties():
    right = Reference([[1, 2, 3]] * 4, [np.array([1.0, 2e-5, 1.0])] * 4)
    got = [[1, 2, 3], [1, 9, 9], [9, 2, 3], [1, 2]]
    assert compare(right, got) == Outcome(exact=1, near_ties=1, wrong=2)
    assert compare(right, got).rows == 4 and right.least_margin == pytest.approx(2e-5)


def test_rows_add_up_and_finished_ones_add_nothing():
    got = speculative().generate(PROMPTS, NEW, eos=[end()])
    stats = got.stats
    np.testing.assert_array_equal(stats.emitted, [len(text) for text in got.tokens])
    np.testing.assert_array_equal(stats.drafted, K * stats.rounds)  # none while a row is finished
    whole = stats.accepted + stats.rounds
    assert np.all(stats.emitted <= whole) and np.all(stats.emitted >= stats.rounds)
    assert np.all(whole <= (K + 1) * stats.rounds)


def test_an_added_row_changes_no_other():
    few = together(PROMPTS[:4])
    assert together([*PROMPTS[:3], PROMPTS[5]])[:3] == few[:3]


@pytest.mark.slow
def test_sampled_rows_do_not_depend_on_their_batch_mates():
    """Half of the rows have other prompts. The law itself is tested in test_drafters."""
    eng = engine(TINY, drafter=DraftModel(TINY, 2), drafter_params=weights(TINY, 9))
    mates = [[2] if i % 2 == 0 else [1, 3, 0] for i in range(200)]
    sampling = SamplingParams.make(1.0)
    mixed = eng.generate(mates, 3, sampling=sampling, seeds=range(200)).tokens[::2]
    alone = eng.generate([[2]] * 200, 3, sampling=sampling, seeds=range(200)).tokens[::2]
    assert mixed == alone and len(set(map(tuple, mixed))) > 10


# EXSPEC's pool.
def random_run(pool: SequencePool, budgets: list[int], rng: np.random.Generator) -> list[int]:
    """Drive the pool with random acceptances, checking every choice; steps by kind."""
    kinds = []
    left = list(budgets)
    while not pool.done:
        window = pool.window
        before = [(row.padded, row.cached) for row in pool.rows]
        rows, same = pool.next_batch()
        assert set(rows) <= set(window) and len(set(rows)) == len(rows)
        assert all(pool.rows[i].active for i in rows)
        if same:
            assert len(rows) == pool.batch and len({before[i] for i in rows}) == 1
            assert [(row.padded, row.cached) for row in pool.rows] == before
        else:
            assert rows == window[: pool.batch]
            longest = max(pool.rows[i].content for i in rows)
            assert all(pool.rows[i].padded == longest for i in rows)
        added = [min(int(rng.integers(1, 5)), left[i]) for i in rows]
        for i, count in zip(rows, added, strict=True):
            left[i] -= count
        pool.write_back(rows, added, [left[i] == 0 for i in rows])
        kinds.append(int(same))
        assert all(row.padded >= row.content for row in pool.rows)
    assert left == [0] * len(budgets)
    return kinds


@pytest.mark.parametrize("by_length", [False, True])
def test_the_pool_finishes_every_row_by_its_rule(by_length):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 12, 30).tolist()
    kinds = random_run(
        SequencePool(lengths, 12, 3, by_length), rng.integers(1, 20, 30).tolist(), rng
    )
    assert {0, 1} == set(kinds)


def test_equal_lengths_group_more_often_than_random_ones():
    rates = {}
    for name, lengths in (("equal", [6] * 48), ("random", None)):
        rng = np.random.default_rng(0)
        given = rng.integers(2, 90, 48).tolist() if lengths is None else lengths
        kinds = random_run(SequencePool(given, 24, 4), [24] * 48, rng)
        rates[name] = np.mean(kinds)
    assert rates["equal"] > rates["random"]


def test_pools_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="1 <= batch <= window"):
        SequencePool([3], 1, 2)
    with pytest.raises(ValueError, match="prompts of 1 token or more"):
        SequencePool([3, 0], 2, 1)
    pool = SequencePool([3], 1, 1)
    assert pool.needs_prefill([0])
    pool.write_back(pool.next_batch()[0], [2], [False])
    assert not pool.needs_prefill([0])
    pool.write_back(pool.next_batch()[0], [2], [True])
    with pytest.raises(ValueError, match="every row of the pool has finished"):
        pool.next_batch()
    with pytest.raises(ValueError, match="row 0 has finished"):
        pool.write_back([0], [1], [True])


def test_what_does_not_fit_the_padded_form_is_refused():
    few = config(vocab_size=VOCAB - 1)
    one = PaddedDecoder(weights(CFG), CFG, weights(few), few, k=K)
    with pytest.raises(ValueError, match="draft model has 23 tokens and the target 24"):
        one.begin(PROMPTS, NEW)
    with pytest.raises(ValueError, match="at least one prompt"):
        padded().begin([], NEW)
    with pytest.raises(ValueError, match="the padded batch with its drafts needs 27"):
        padded().begin(PROMPTS, NEW, capacity=20)


def test_positions_are_counted_from_the_mask():
    mask = np.array([[False, False, True, True, True], [True] * 5])
    np.testing.assert_array_equal(mask_positions(mask), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    padding, length = realign_padding(np.array([2, 0]), np.array([3, 5]), np.array([4, 1]))
    assert length == 7 and padding.tolist() == [0, 1]
