"""SWIFT's search: proposals, the rule that keeps the best, and the Gaussian process."""

import numpy as np

from research.speculative.swift.gaussian_process import GaussianProcess, matern, suggest
from research.speculative.swift.search import (
    candidates,
    num_skipped,
    propose_bayes,
    propose_random,
    start_search,
    uniform_set,
    update_search,
    vector_to_set,
)


def test_every_proposal_skips_as_many_and_never_the_ends():
    rng, layers = np.random.default_rng(0), 9
    search = start_search(uniform_set(layers), 20)
    for i in range(12):
        count = num_skipped(layers, 0.45)
        bayes = i % 3 == 2
        proposal = (
            propose_bayes(rng, search, count, 2.5, 1e-2)
            if bayes
            else propose_random(rng, candidates(layers), count)
        )
        skip = np.stack([proposal.skip.attention, proposal.skip.mlp])
        assert skip.sum() == count == 6 and not skip[:, [0, -1]].any()
        if not bayes:
            np.testing.assert_array_equal(proposal.point, skip[:, 1:-1].reshape(-1))
        search = update_search(search, proposal, rng.random(), 2.0, 99)
    assert int(search.iterations) == 12
    best = int(np.argmax(np.asarray(search.scores)[:12]))
    assert float(search.best_score) == float(search.scores[best])
    want = vector_to_set(np.asarray(search.points[best]), 6)
    np.testing.assert_array_equal(search.skip.attention, want.attention)


def test_the_search_ends_at_a_good_score_without_progress_or_when_full():
    proposal = propose_random(np.random.default_rng(0), 6, 2)
    fresh = start_search(uniform_set(5), 3)
    assert not update_search(fresh, proposal, 0.96, 0.95, 9).active
    same = update_search(fresh, proposal, 0.5, 0.95, 1)
    assert same.active and int(same.tolerance) == 0
    worse = update_search(same, proposal, 0.5, 0.95, 1)
    assert worse.active and int(worse.tolerance) == 1 and float(worse.best_score) == 0.5
    assert not update_search(worse, proposal, 0.4, 0.95, 1).active
    third = update_search(worse, proposal, 0.6, 0.95, 9)
    assert third.active and not update_search(third, proposal, 0.7, 0.95, 9).active


def test_the_process_knows_what_it_has_seen_and_little_else():
    rng = np.random.default_rng(1)
    points = rng.random((12, 3))
    values = np.sin(3 * points[:, 0]) + points[:, 1]
    process = GaussianProcess(points, values, 1e-6)
    mean, deviation = process.predict(points)
    np.testing.assert_allclose(mean, values, atol=1e-2)
    assert deviation.max() < 0.05 < process.predict(np.array([[5.0, -5.0, 5.0]]))[1][0]
    # The posterior mean from the normal equations.
    d = np.linalg.norm(points[:, None] - points[None], axis=-1)
    gram = matern(d, process.scale) + 1e-6 * np.eye(12)
    x = rng.random((1, 3))
    cross = matern(np.linalg.norm(x - points, axis=-1), process.scale)
    y = (values - values.mean()) / values.std()
    want = values.mean() + values.std() * cross @ np.linalg.solve(gram, y)
    np.testing.assert_allclose(process.predict(x)[0], want, rtol=1e-6)
    assert matern(np.zeros(1), 0.3) == 1


def test_the_suggestion_goes_where_values_are_high():
    rng = np.random.default_rng(2)
    points = rng.random((40, 2))
    values = -np.sum((points - np.array([0.8, 0.3])) ** 2, axis=1)
    found = suggest(points, values, rng, 0.0, 1e-4)
    np.testing.assert_allclose(found, [0.8, 0.3], atol=0.1)
    assert suggest(np.zeros((0, 2)), np.zeros(0), rng, 2.5, 1e-2).shape == (2,)
