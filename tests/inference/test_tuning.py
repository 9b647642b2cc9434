import numpy as np
import pytest

from inference import tuning
from inference.drafter import NoDrafter
from inference.drafters.draft_model import DraftModel
from inference.drafters.lookup import LookupDrafter
from inference.engine import Generation
from inference.loop import Stats
from inference.tuning import best_count, by_gain, lookup_lengths, pass_seconds, tuned
from models.load import Model
from ops.tree import tree_from_paths
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import VOCAB, config, letters, weights

STEEP, FLAT = {1: 1.0, 2: 2.0, 16: 16.0}, {1: 1.0, 2: 1.0, 16: 1.0}


def test_passes_that_cost_nothing_more_take_the_longest_draft():
    assert best_count(FLAT, [0.5, 0.2, 0.01]) == 3


def test_passes_that_cost_as_much_as_their_tokens_take_none():
    assert best_count(STEEP, [0.9, 0.8, 0.7]) == 0


def test_between_them_the_length_is_where_tokens_per_second_are_most():
    # A jump of 0.4 for a second token, then 0.1 for each: (1, 1.6 / 1.4, 2.0 / 1.5, 2.04 / 1.6).
    costs = {1: 1.0, 2: 1.4, 4: 1.6}
    assert best_count(costs, [0.6, 0.4, 0.04]) == 2


def test_the_cost_of_a_plain_pass_is_needed():
    with pytest.raises(ValueError, match="measure width 1"):
        best_count({2: 1.0}, [0.5])


def test_costs_are_seconds_by_width():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    seconds = pass_seconds(model, widths=(1, 4), tokens=8, repeats=1)
    assert set(seconds) == {1, 4}
    assert all(0 < value < 60 for value in seconds.values())


def test_making_a_draft_costs_too():
    gains = [0.3, 0.2]
    assert best_count(FLAT, gains) == 2
    assert best_count(FLAT, gains, drafting=0.4) == 2
    assert best_count(FLAT, gains, drafting=0.6) == 0
    assert best_count(FLAT, gains, each=0.1) == 2
    assert best_count(FLAT, gains, each=0.25) == 1
    assert best_count(FLAT, gains, each=0.4) == 0


def test_nodes_come_after_their_parents_and_lower_siblings():
    tree = tree_from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)])
    # By nodes: the root, 0, 1, 2, 00, 01, 10. Node 2 beats its sibling 1, and 01 its sibling 00.
    order = by_gain(tree, np.array([1.0, 0.5, 0.1, 0.2, 0.1, 0.3, 0.05]))
    assert order[0] == 1 and sorted(order) == [1, 2, 3, 4, 5, 6]
    for count in range(1, 7):
        paths = {tree.paths[node - 1] for node in order[:count]}
        for path in paths:
            assert path[:-1] in paths or len(path) == 1
            assert all((*path[:-1], rank) in paths for rank in range(path[-1]))


def count_and_time(monkeypatch: pytest.MonkeyPatch, stats: Stats, drafting: float = 0.0) -> None:
    """Decoding that counts what it is told, and drafts that take a time of our choice."""
    monkeypatch.setattr(tuning, "decoded", lambda *_: Generation([], stats))
    monkeypatch.setattr(tuning, "drafting_seconds", lambda *_: drafting)


# After 7 8 9 the text goes on as before, for as long as you like; after 5 alone it never does.
PROMPT = [7, 8, 9, 1, 2, 3, 4, 5, 0, 5, 6, 7, 8, 9]
NEW = [1, 2, 3, 4, 5, 9, 5, 1, 5, 2]


def test_lookup_drafts_long_after_long_matches_and_little_after_short_ones():
    text = [(PROMPT, NEW)]
    assert lookup_lengths(text, (3, 1), FLAT)[0] >= 5
    # A plain pass for every token but those that a match of three foretells; no draft after one.
    assert lookup_lengths(text, (3, 1), {1: 1.0, 2: 1.9, 6: 2.0, 16: 9.0}) == (5, 0)
    assert any(lookup_lengths(text, (3, 1), STEEP))


def test_the_replay_takes_the_seconds_of_the_rounds():
    cost = np.array([1.0, 10.0, 100.0, 1000.0])
    short = np.array([0, 1, 1, 0, 2]), np.array([2, 0, 0, 0, 0])
    # Drafts of 3 where the first size matches: 2 are right, so the next round is the fourth's.
    drafts = np.array([3, 1, 0])
    assert tuning._replayed_seconds([short], drafts, cost) == 1000 + 1000 + 1
    # Together with a row without matches, which takes five rounds.
    plain = np.full(5, 2), np.zeros(5, int)
    assert tuning._replayed_seconds([short, plain], drafts, cost) == 1000 + 1000 + 1 + 1 + 1


def test_what_is_replayed_is_what_decoding_does():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    drafter = LookupDrafter((4, 2), (2, 1), widths=(1, 3))
    prompts = [[1, 2, 3, 1, 2], [4, 4, 4], [5]]
    for prompt in prompts:
        made = tuning.decoded(model, drafter, None, [prompt], 24)
        rows = [tuning._lookups(prompt, made.tokens[0], drafter.ngrams, 15)]
        ones = tuning._replayed_seconds(rows, np.array([4, 2, 0]), np.ones(16))
        assert ones == int(made.stats.rounds[0])


def test_a_tuned_lookup_has_a_pass_for_each_of_its_drafts(monkeypatch: pytest.MonkeyPatch):
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    monkeypatch.setattr(tuning, "lookup_lengths", lambda *_: (7, 2, 0))
    chosen = tuned(model, LookupDrafter(), None, [[1]], FLAT, 4)
    assert chosen == LookupDrafter((7, 2, 0), (4, 3, 2), widths=(1, 3))


def test_a_draft_model_gets_the_length_that_its_passes_pay_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "LONGEST_CHAIN", 4)
    rounds, by_node = np.array([10], np.int32), np.array([[10, 7, 5, 3, 2]], np.int32)
    stats = Stats(rounds, rounds, rounds, rounds, by_node[:, 1:], by_node, rounds)
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")

    def length(drafting: float) -> int:
        count_and_time(monkeypatch, stats, drafting)
        chosen = tuned(model, DraftModel(config(), 2), None, [[1]], FLAT)
        assert isinstance(chosen, DraftModel)
        return chosen.length

    assert length(0.0) == 4
    # With a fifth of a pass for each token: 1.7 / 1.2, 2.2 / 1.4, 2.5 / 1.6, 2.7 / 1.8.
    assert length(0.8) == 2
    assert length(4.0) == 1


def test_a_tree_keeps_the_nodes_that_pay(monkeypatch: pytest.MonkeyPatch):
    tree = tree_from_paths([(0,), (1,), (0, 0), (0, 1)])
    rounds = np.array([10], np.int32)
    by_node = np.array([[10, 6, 1, 4, 0]], np.int32)
    stats = Stats(rounds, rounds, rounds, rounds, np.array([[7, 4]]), by_node, rounds)
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")

    def paths(seconds: dict[int, float], drafting: float = 0.0) -> set[tuple[int, ...]]:
        count_and_time(monkeypatch, stats, drafting)
        chosen = tuned(model, TokenRecycling(tree), None, [[1]], seconds)
        assert isinstance(chosen, TokenRecycling)
        return set(chosen.tree.paths)

    assert paths(FLAT) == {(0,), (1,), (0, 0)}
    assert paths({1: 1.0, 2: 1.2, 3: 1.4, 4: 1.7, 16: 5.0}) == {(0,), (0, 0)}
    assert paths(STEEP) == {(0,)}
    # What drafting takes is paid once, so more nodes are worth it.
    assert paths({1: 1.0, 2: 1.2, 3: 1.4, 4: 1.46, 16: 5.0}, 1.0) == {(0,), (1,), (0, 0)}


def test_drafts_are_counted_and_timed():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    chosen = tuned(model, TokenRecycling(), None, [[1, 2], [3]], {1: 1.0, 2: 1.0, 99: 1.0}, 8)
    assert isinstance(chosen, TokenRecycling) and 2 <= chosen.width <= 81


def test_what_has_no_static_tree_is_refused():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    with pytest.raises(ValueError, match="NoDrafter has no static tree"):
        tuned(model, NoDrafter(), None, [[1]], FLAT)
