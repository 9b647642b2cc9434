from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import batching
from inference.batching import Batching, Job
from inference.drafter import NoDrafter
from inference.drafters.draft_model import draft_model
from inference.loop import prefill_chunk
from inference.scheduler import SameLength, Together, first_full_group
from ops.sampling import SamplingParams
from research.speculative.swift.drafter import swift
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import VOCAB, config, engine, prompts, weights

LENGTHS = (1, 2, 3, 7, 5, 2, 9)
NEW = (20, 3, 11, 20, 1, 14, 6)
GROUPED = SameLength(batch=2, window=4)


def drafters() -> dict[str, tuple[Any, Any]]:
    """Plain decoding, a draft model of its own state per row, and one state for all rows."""
    return {
        "plain": (NoDrafter(5), None),
        "draft model": draft_model(
            config(), weights(config(num_layers=1), 1), config(num_layers=1)
        ),
        "recycling": (TokenRecycling(), None),
    }


DRAFTERS = drafters()


def pool(drafter: str = "plain", rows: int = 4, **settings: Any) -> Batching:
    one, params = DRAFTERS[drafter]
    return Batching(
        engine(drafter=one, drafter_params=params), rows, 128, **({"rounds_per_call": 3} | settings)
    )


def jobs(**changes: Any) -> list[Job]:
    """Seven jobs of all lengths; more than there are rows."""
    return [
        Job(prompt, new, seed=i, **changes)
        for i, (prompt, new) in enumerate(zip(prompts(*LENGTHS), NEW, strict=True))
    ]


def expected(drafter: str, sampling: SamplingParams, eos: Sequence[int]) -> list[list[int]]:
    """What every job gets from the engine alone."""
    one, params = DRAFTERS[drafter]
    texts = engine(drafter=one, drafter_params=params).generate(
        prompts(*LENGTHS), max(NEW), sampling=sampling, eos=eos, seeds=range(len(NEW))
    )
    return [text[:new] for text, new in zip(texts.tokens, NEW, strict=True)]


WAYS = [
    pytest.param("plain", None, id="plain-together"),
    pytest.param("draft model", GROUPED, id="draft model-grouped"),
    pytest.param("plain", GROUPED, id="plain-grouped", marks=pytest.mark.slow),
    pytest.param("draft model", None, id="draft model-together", marks=pytest.mark.slow),
    pytest.param("recycling", None, id="recycling-together", marks=pytest.mark.slow),
    pytest.param("recycling", GROUPED, id="recycling-grouped", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("drafter", "scheduler"), WAYS)
def test_every_job_gets_what_it_gets_alone(drafter, scheduler):
    end = expected("plain", SamplingParams.make(), [])[3][4]
    got = pool(drafter, scheduler=scheduler, eos=[end]).generate(jobs())
    want = expected(drafter, SamplingParams.make(), [end])
    assert [result.tokens for result in got] == want
    for result, new in zip(got, NEW, strict=True):
        ended = result.tokens[-1] == end
        assert result.reason == ("end" if ended else "length")
        assert ended or len(result.tokens) == new
        assert 1 <= result.rounds <= len(result.tokens)
    assert {result.reason for result in got} == {"end", "length"}


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "scheduler"), WAYS[:4])
def test_sampled_jobs_depend_on_their_seeds_alone(drafter, scheduler):
    got = pool(drafter, scheduler=scheduler).generate(jobs(temperature=0.9, top_p=0.95))
    want = expected(drafter, SamplingParams.make(0.9, top_p=0.95), [])
    assert [result.tokens for result in got] == want


@pytest.mark.parametrize("scheduler", [None, GROUPED], ids=["together", "grouped"])
def test_a_drafter_that_is_tuned_while_serving_is_tuned_in_a_pool(scheduler):
    cfg = config(num_layers=4)
    drafter, params = swift(
        cfg, controls={"max_score": 2.0}, max_steps=4, max_nodes=0, context_window=2
    )
    one = Batching(
        engine(cfg, drafter=drafter, drafter_params=params), 4, 128, scheduler, rounds_per_call=3
    )
    want = engine(cfg, drafter=NoDrafter(5)).generate(prompts(*LENGTHS), max(NEW)).tokens
    got = [result.tokens for result in one.generate(jobs())]
    assert got == [text[:new] for text, new in zip(want, NEW, strict=True)]
    # Rows judge a set once they have more than three new tokens, as about half of them get here.
    assert int(one._state.drafter.search.iterations) > len(NEW)


def test_jobs_of_different_sampling_share_a_pool():
    """A greedy, a sampled and a truncated job side by side, and each among other mates."""
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"top_p": 0.9}]
    mixed = [
        Job(prompt, 12, seed=i, **kind)
        for i, (prompt, kind) in enumerate(zip(prompts(3, 5, 2, 4), kinds, strict=True))
    ]
    together = [r.tokens for r in pool().generate(mixed)]
    for job, text in zip(mixed, together, strict=True):
        others = [Job(p, 9, temperature=0.5, seed=7) for p in prompts(6, 8, seed=3)]
        assert pool().generate([others[0], job, others[1]])[1].tokens == text
    plain = engine(drafter=NoDrafter(5)).generate([mixed[0].prompt], 12).tokens[0]
    assert together[0] == plain


def test_rows_are_filled_again_as_they_fall_free():
    one = pool(rows=2, rounds_per_call=1)
    for job in jobs():
        one.submit(job)
    starts, occupied = [], []
    while one.step():
        occupied.append(len(one._order))
        starts.append(one._next - len(one._queue))
    assert starts == sorted(starts) and starts[0] == 2 and starts[-1] == len(NEW)
    assert max(occupied) <= 2
    # Plain decoding: as long as jobs wait, no pass is spent on a row that stands still.
    assert one.counters.forwards < sum(NEW)
    assert one.counters.forwards >= sum(NEW) / 2


def test_text_is_handed_out_as_it_becomes_certain():
    pieces: dict[int, list[list[int]]] = {i: [] for i in range(len(NEW))}
    given = [
        Job(j.prompt, j.max_new_tokens, seed=j.seed, on_tokens=pieces[i].append)
        for i, j in enumerate(jobs())
    ]
    got = pool().generate(given)
    for i, result in enumerate(got):
        assert [token for piece in pieces[i] for token in piece] == result.tokens
        assert all(pieces[i]) and len(pieces[i]) == -(-len(result.tokens) // 3)


def test_new_jobs_compile_nothing():
    one = pool("draft model")
    one.generate(jobs(temperature=0.5, top_p=0.9, top_k=7))
    functions = (batching._decode_rows, batching._place, prefill_chunk)
    before = [f._cache_size() for f in functions]
    for seed in range(1, 3):
        lengths = np.random.default_rng(seed).integers(1, 16, 7)
        for i, prompt in enumerate(prompts(*lengths.tolist(), seed=seed)):
            one.submit(Job(prompt, 2 + 3 * i, 0.3 * seed, 3 + seed, 1 - 0.1 * seed, seed + i))
        one.run()
    assert [f._cache_size() for f in functions] == before


def test_cancelled_jobs_leave_the_others_alone():
    want = [r.tokens for r in pool(rows=2).generate(jobs())]
    one = pool(rows=2)
    numbers = [one.submit(job) for job in jobs()]
    one.step()
    one.cancel(numbers[0])  # runs
    one.cancel(numbers[5])  # waits
    first, waiting = one.result(numbers[0]), one.result(numbers[5])
    assert first.reason == waiting.reason == "cancelled"
    assert first.tokens == want[0][: len(first.tokens)] and len(first.tokens) == 3
    assert waiting.tokens == []
    one.run()
    for i in (1, 2, 3, 4, 6):
        assert one.result(numbers[i]).tokens == want[i]
    with pytest.raises(ValueError, match="neither waits nor runs"):
        one.cancel(numbers[0])
    with pytest.raises(ValueError, match="has no result"):
        one.result(numbers[0])


def test_whoever_is_told_of_tokens_may_cancel():
    want = [r.tokens for r in pool(rows=2).generate(jobs())]
    one = pool(rows=2)
    given = jobs()
    told: list[list[int]] = []

    def stop(tokens: list[int]) -> None:
        told.append(tokens)
        for number in (0, 1):
            one.cancel(number)

    numbers = [one.submit(Job(given[0].prompt, given[0].max_new_tokens, on_tokens=stop))]
    numbers += [one.submit(job) for job in given[1:]]
    one.run()
    got = [one.result(number) for number in numbers]
    assert told == [got[0].tokens] and got[0].reason == got[1].reason == "cancelled"
    assert got[1].tokens == want[1][: len(got[1].tokens)]
    assert [r.tokens for r in got[2:]] == want[2:]


def test_what_lies_in_stale_slots_is_never_seen():
    one = pool("draft model", rows=2)
    for job in jobs():
        one.submit(job)
    want = [r.tokens for r in pool("draft model", rows=2).generate(jobs())]
    while one.step():
        state = one._state
        own = state.drafter
        one._state = state.replace(
            cache=poisoned(state.cache), drafter=own.replace(cache=poisoned(own.cache))
        )
    assert [one.result(i).tokens for i in range(len(NEW))] == want


def poisoned(cache: Any) -> Any:
    """The cache with large garbage in every slot that is not committed."""
    stale = jnp.arange(cache.capacity)[None] >= cache.length[:, None]
    noise = jax.tree.map(
        lambda x: jnp.where(stale[:, None, :, None], 1e4 * jnp.sign(x - 0.01), x), cache.layers
    )
    return cache.replace(layers=noise)


def test_grouped_steps_hold_rows_of_equal_length_in_the_window():
    seen: list[tuple[list[int], list[int], bool]] = []

    class Spy(SameLength):
        def choose(self, lengths: Any) -> Any:
            places, same = super().choose(lengths)
            seen.append((list(lengths), places, same))
            return places, same

    spy = Spy(batch=2, window=3)
    got = pool(scheduler=spy, rounds_per_call=1, rows=4).generate(jobs())
    assert [len(r.tokens) for r in got] == list(NEW)
    for lengths, places, same in seen:
        assert max(places) < min(3, len(lengths)) and len(set(places)) == len(places)
        equal = len({lengths[p] for p in places}) == 1 and len(places) == 2
        assert equal if same else places == list(range(len(places)))
    assert {same for *_, same in seen} == {True, False}


def test_counters_tell_the_share_of_grouped_steps():
    alike = [Job(prompt, 8) for prompt in prompts(*[4] * 6)]
    one = pool(rows=6, scheduler=SameLength(batch=3, window=6), rounds_per_call=1)
    one.generate(alike)
    assert one.counters.grouping_rate == 1.0
    # Rows of equal length take turns: as many passes as two static batches.
    assert one.counters.forwards == one.counters.steps == 16
    assert one.counters.slots_read == 16 * 128
    mixed = pool(rows=4, scheduler=SameLength(batch=2, window=4), rounds_per_call=1)
    mixed.generate(jobs())
    assert 0 < mixed.counters.grouping_rate < 1
    wide = pool(rows=4, scheduler=SameLength(2, 4, block=64), rounds_per_call=1)
    wide.generate(jobs())
    assert wide.counters.grouping_rate > mixed.counters.grouping_rate


def test_the_first_full_group_wins():
    assert first_full_group([3, 5, 5, 3, 3], 2) == ([1, 2], True)
    assert first_full_group([3, 5, 3, 5, 3], 3) == ([0, 2, 4], True)
    assert first_full_group([1, 2, 3], 2) == ([0, 1], False)
    assert first_full_group([1], 2) == ([0], False)
    assert first_full_group([1, 1], 3) == ([0, 1], False)
    assert Together().choose([4, 2]) == ([0, 1], False)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job([], 3), "prompt 0 is empty"),
        (Job([VOCAB], 3), "outside 0..23"),
        (Job([1], -1), "max_new_tokens of 0 or more"),
        (Job([1] * 150, 11), "beyond the context of 160"),
        (Job([1] * 100, 24), "the text with one draft needs 129 cache slots but there are 128"),
        (Job([1], 3, temperature=-1.0), "temperature must be"),
        (Job([1], 3, top_p=0.0), "top_p must lie"),
    ],
)
def test_bad_jobs_are_refused_before_they_wait(job, message):
    one = pool()
    with pytest.raises(ValueError, match=message):
        one.submit(job)
    with pytest.raises(ValueError, match="the pool is empty"):
        one.run()
    assert one.step() is False


def test_pools_and_groups_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="give at least 2 rows"):
        pool(rows=1, scheduler=GROUPED)
    with pytest.raises(ValueError, match="give at least 1 rows and 1 round"):
        pool(rounds_per_call=0)
    with pytest.raises(ValueError, match="1 <= batch <= window"):
        SameLength(batch=4, window=2)
    with pytest.raises(ValueError, match="there are 128"):
        engine().start([[1] * 126], 3, SamplingParams.make(), capacity=128)


def test_a_job_may_ask_for_nothing():
    got = pool().generate([Job([3, 4], 0), Job([5], 2)])
    assert got[0].tokens == [] and got[0].reason == "length" and len(got[1].tokens) == 2
