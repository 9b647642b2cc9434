"""The asynchronous generator: rounds worked out by hand, and what stop tokens waste."""

import dataclasses

import pytest

from research.context.qwen25_1m.scheduler import Engine, Request, Span, simulate

ASYNCHRONOUS = Engine(schedule=Span(1.0), device=Span(4.0), detokenise=Span(2.0))
SYNCHRONOUS = dataclasses.replace(ASYNCHRONOUS, ahead=0)
FREE = Engine(schedule=Span(0.0), device=Span(4.0), detokenise=Span(0.0))


def test_one_after_the_other_by_hand():
    """Each step takes 1 + 4 + 2; the device waits 3 between steps."""
    found = simulate(SYNCHRONOUS, [Request(prompt=5, limit=3)])
    assert [(s.scheduled, s.start, s.end, s.reported) for s in found.steps] == [
        (1, 1, 5, 7), (8, 8, 12, 14), (15, 15, 19, 21),
    ]  # fmt: skip
    assert found.makespan == 21 and found.idle == pytest.approx(6 / 18)
    assert found.wasted == 0 and found.tokens == 3 and found.peak_slots == 8


def test_beside_each_other_by_hand():
    """Step 1 is scheduled at 2, while step 0 runs; step 2 once step 0 is reported, at 7."""
    found = simulate(ASYNCHRONOUS, [Request(prompt=5, limit=3)])
    assert [(s.scheduled, s.start, s.end, s.reported) for s in found.steps] == [
        (1, 1, 5, 7), (2, 5, 9, 11), (8, 9, 13, 15),
    ]  # fmt: skip
    assert found.makespan == 15 and found.idle == 0


def test_a_round_longer_than_two_steps_leaves_the_device_idle():
    """Schedule, detokenise and three hand-overs take 4.5 beside a step of 4."""
    slow = dataclasses.replace(ASYNCHRONOUS, handover=0.5)
    found = simulate(slow, [Request(prompt=0, limit=3)])
    assert [(s.start, s.end) for s in found.steps] == [(1.5, 5.5), (5.5, 9.5), (10, 14)]
    assert found.makespan == 16.5 and found.idle == pytest.approx(0.5 / 12.5)
    many = simulate(slow, [Request(prompt=0, limit=401)])
    assert many.steps[400].start - many.steps[0].start == pytest.approx(200 * (4 + 4.5))


def test_hand_over_without_looking_ahead_gains_nothing():
    requests = [Request(prompt=3, limit=9)]
    apart = simulate(dataclasses.replace(SYNCHRONOUS, handover=0.25), requests)
    assert apart.makespan > simulate(SYNCHRONOUS, requests).makespan


def test_without_overhead_there_is_no_difference():
    requests = [Request(4, 6), Request(2, 9), Request(7, 3)]
    now, ahead = (simulate(dataclasses.replace(FREE, ahead=n), requests) for n in (0, 1))
    assert now.delivered == ahead.delivered == (24, 36, 12)
    assert now.idle == ahead.idle == 0 and [s.rows for s in now.steps] == [
        s.rows for s in ahead.steps
    ]


@pytest.mark.parametrize(
    "ahead, stop, wasted", [(0, 3, 0), (1, 3, 1), (2, 3, 2), (2, 9, 1), (1, 10, 0), (1, None, 0)]
)
def test_a_stop_token_wastes_what_is_ahead_of_it_and_the_limit_nothing(ahead, stop, wasted):
    request = Request(prompt=5, limit=10, stop_after=stop)
    found = simulate(dataclasses.replace(ASYNCHRONOUS, ahead=ahead), [request])
    assert found.wasted == wasted and found.tokens == (stop or 10)
    assert len(found.steps) == found.tokens + wasted
    assert found.peak_slots == 5 + found.tokens + wasted


def test_a_row_that_stopped_is_left_out_of_the_second_step_after_it():
    requests = [Request(0, 10, stop_after=2), Request(0, 5)]
    found = simulate(ASYNCHRONOUS, requests)
    assert [s.rows for s in found.steps] == [(0, 1), (0, 1), (0, 1), (1,), (1,)]
    assert [s.rows for s in simulate(SYNCHRONOUS, requests).steps][2] == (1,)


def test_requests_wait_for_rows_and_for_slots():
    """The next text starts after the wasted slot of the one before."""
    pair = [Request(0, 10, stop_after=2), Request(0, 10, stop_after=2)]
    one = dataclasses.replace(ASYNCHRONOUS, rows=1)
    assert [s.rows[0] for s in simulate(one, pair).steps] == [0, 0, 0, 1, 1, 1]
    narrow = dataclasses.replace(ASYNCHRONOUS, slots=15)
    assert [s.rows[0] for s in simulate(narrow, pair).steps] == [0, 0, 0, 1, 1, 1]
    assert simulate(narrow, pair).peak_slots == 3
    wide = simulate(dataclasses.replace(ASYNCHRONOUS, slots=20), pair)
    assert [s.rows for s in wide.steps] == [(0, 1)] * 3 and wide.peak_slots == 6


def test_a_slow_detokeniser_takes_one_step_after_the_other():
    """Steps 0 and 1 end at 5 and 9, and each takes 10 to read."""
    slow = dataclasses.replace(ASYNCHRONOUS, detokenise=Span(10.0))
    found = simulate(slow, [Request(0, 3)])
    assert [(s.end, s.reported) for s in found.steps] == [(5, 15), (9, 25), (20, 35)]


def test_what_a_text_held_is_free_again():
    found = simulate(dataclasses.replace(ASYNCHRONOUS, rows=1), [Request(7, 2)] * 3)
    assert found.peak_slots == 9 and found.tokens == 6


def test_requests_may_come_late():
    found = simulate(ASYNCHRONOUS, [Request(0, 2), Request(0, 2, arrival=100.0)])
    assert [s.start for s in found.steps] == [1, 5, 101, 105]
    assert found.delivered == (11, 111)


def test_times_grow_with_the_rows():
    wide = Engine(Span(1.0, 0.5), Span(4.0, 1.0), Span(2.0, 0.25), ahead=0)
    (step,) = simulate(wide, [Request(0, 1)] * 4).steps
    assert (step.scheduled, step.start, step.end, step.reported) == (3, 3, 11, 14)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="request 0 needs more than 8 slots"):
        simulate(dataclasses.replace(ASYNCHRONOUS, slots=8), [Request(5, 4)])
    with pytest.raises(ValueError, match="no requests"):
        simulate(ASYNCHRONOUS, [])
    with pytest.raises(ValueError, match="limit of 1 or more"):
        Request(0, 0)
    with pytest.raises(ValueError, match="stop_after counts the stop token"):
        Request(0, 5, stop_after=0)
    with pytest.raises(ValueError, match="must take some time"):
        Engine(Span(1.0), Span(0.0), Span(1.0))
    with pytest.raises(ValueError, match="rows and slots are 1 or more"):
        dataclasses.replace(ASYNCHRONOUS, ahead=-1)
