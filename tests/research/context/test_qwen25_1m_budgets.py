import itertools

import numpy as np
import pytest

from research.context.qwen25_1m.budgets import (
    CAP,
    best_candidates,
    refine,
    refine_uniformly,
    scaled,
)

RNG = np.random.default_rng(0)
NEEDED = RNG.integers(100, 4000, (3, 5))
"""What each head must have of both budgets before its recall is 0.9."""


def recall(vertical: np.ndarray, slash: np.ndarray) -> np.ndarray:
    return np.minimum(0.9 * np.minimum(vertical, slash) / NEEDED, 1.0)


def start() -> tuple[np.ndarray, np.ndarray]:
    return np.full((3, 5), 100), np.arange(15).reshape(3, 5) + 600


def test_refinement_stops_at_the_threshold_and_never_lowers():
    vertical, slash = start()
    seen = []

    def watched(v, s):
        seen.append((v.copy(), s.copy()))
        return recall(v, s)

    out = refine(watched, vertical, slash, step=256)
    assert np.all(out.recall >= 0.9) and out.passes == len(seen)
    for (v0, s0), (v1, s1) in itertools.pairwise(seen):
        low = recall(v0, s0) < 0.9
        np.testing.assert_array_equal(v1, v0 + 256 * low)
        np.testing.assert_array_equal(s1, s0 + 256 * low)
    assert np.all(out.vertical >= start()[0]) and np.all(out.slash >= start()[1])
    np.testing.assert_array_equal(vertical, start()[0])  # the caller's arrays are left alone
    # No head has a step more than it needs.
    more = out.vertical > start()[0]
    assert np.all(recall(out.vertical - 256, out.slash - 256)[more] < 0.9)


def test_heads_that_cannot_reach_the_threshold_end_at_the_cap():
    out = refine(lambda v, s: 0 * v + 0.5, *start(), step=2048)
    np.testing.assert_array_equal(out.vertical, np.full((3, 5), CAP[0]))
    np.testing.assert_array_equal(out.slash, np.full((3, 5), CAP[1]))
    above = refine(lambda v, s: 0 * v + 0.5, *start(), cap=(50, 700))
    np.testing.assert_array_equal(above.vertical, start()[0])
    np.testing.assert_array_equal(above.slash, np.full((3, 5), 700))


def test_a_budget_above_the_cap_stays_and_the_loop_ends():
    vertical = np.array([[5000]])
    out = refine(lambda v, s: np.zeros(v.shape), vertical, vertical, cap=(10, 10))
    assert out.passes == 1 and out.vertical == out.slash == 5000


def test_a_uniform_raise_costs_more():
    each, alike = (f(recall, *start(), step=256) for f in (refine, refine_uniformly))
    assert np.all(alike.recall >= 0.9) and np.ptp(alike.vertical) == 0
    assert each.total < alike.total
    assert each.total == each.vertical.sum() + each.slash.sum()


def test_the_search_takes_the_candidate_that_retains_most():
    scores = {"a": np.array([[0.5, 0.7]]), "b": np.array([[0.6, 0.7]]), "c": np.array([[0.1, 0.8]])}
    np.testing.assert_array_equal(best_candidates(scores), [[1, 2]])
    del scores["c"]
    np.testing.assert_array_equal(best_candidates(scores), [[1, 0]])
    with pytest.raises(ValueError, match="needs candidates"):
        best_candidates({})


def test_budgets_of_other_lengths():
    assert scaled((1000, 4096), 0.125) == (125, 512)
    assert scaled((30, 800), 0.001) == (1, 1)


@pytest.mark.parametrize("settings", [{"step": 0}, {"threshold": 1.5}])
def test_refinement_that_would_not_end_is_refused(settings):
    with pytest.raises(ValueError, match="step must be 1 or more"):
        refine(recall, *start(), **settings)
