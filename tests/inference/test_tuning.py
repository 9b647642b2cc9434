import types

import numpy as np
import pytest

from inference import tuning
from inference.engine import Generation
from inference.loop import Stats
from inference.tuning import best_length, pass_seconds, tuned_lookup
from models.load import Model
from tests.inference.models import VOCAB, config, letters, weights

STEEP, FLAT = {1: 1.0, 2: 2.0, 16: 16.0}, {1: 1.0, 2: 1.0, 16: 1.0}


def test_passes_that_cost_nothing_more_take_the_longest_draft():
    assert best_length(FLAT, [0.5, 0.2, 0.01]) == 3


def test_passes_that_cost_as_much_as_their_tokens_take_none():
    assert best_length(STEEP, [0.9, 0.8, 0.7]) == 0


def test_between_them_the_length_is_where_tokens_per_second_are_most():
    # A jump of 0.4 for a second token, then 0.1 for each: (1, 1.6 / 1.4, 2.0 / 1.5, 2.04 / 1.6).
    costs = {1: 1.0, 2: 1.4, 4: 1.6}
    assert best_length(costs, [0.6, 0.4, 0.04]) == 2


def test_the_cost_of_a_plain_pass_is_needed():
    with pytest.raises(ValueError, match="measure width 1"):
        best_length({2: 1.0}, [0.5])


def test_costs_are_seconds_by_width():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    seconds = pass_seconds(model, widths=(1, 4), tokens=8, repeats=1)
    assert set(seconds) == {1, 4}
    assert all(0 < value < 60 for value in seconds.values())


def test_lookup_gets_the_length_that_its_hits_pay_for(monkeypatch: pytest.MonkeyPatch):
    # Two rows with ten rounds in which 6 tokens were drafted, of which 5 had a first one right.
    rounds = np.array([40, 30], np.int32)
    by_depth = np.array([[3, 3, 2, 0, 0, 0], [2, 1, 1, 0, 0, 0]], np.int32)
    stats = Stats(rounds, np.array([36, 24], np.int32), rounds, rounds, by_depth, rounds)
    made = types.SimpleNamespace(generate=lambda *_, **__: Generation([], stats))
    monkeypatch.setattr(tuning, "make_engine", lambda *_, **__: made)
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")

    def length(seconds: dict[int, float]) -> int:
        return tuned_lookup(model, [[1]], seconds, longest=6).length

    assert length(FLAT) == 3
    assert length(STEEP) == 1
    # A second token in 0.4 of the rounds pays for 0.2 of a pass, a third in 0.3 for no 0.4.
    assert length({1: 1.0, 2: 1.2, 3: 1.4, 4: 1.8, 7: 3.0}) == 2
