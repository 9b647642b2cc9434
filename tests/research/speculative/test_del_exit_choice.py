"""DEL's statistics, and the exit and draft length that it chooses by them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.speculative.del_exit.statistics import (
    acceptance,
    choose_exit,
    draft_thresholds,
    no_statistics,
    tpl_table,
    update_statistics,
)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_tokens_per_layer_are_those_of_a_simulation(alpha):
    rng, layers, exit_layer, gamma = np.random.default_rng(3), 12, 3, 5
    draws = rng.random((20_000, gamma)) < alpha
    emitted = 1 + np.cumprod(draws, axis=1).sum(1)
    cost = gamma * exit_layer + layers
    table = np.asarray(tpl_table(jnp.full((11,), alpha), layers, 18))
    error = 3 * emitted.std() / np.sqrt(len(emitted)) / cost
    assert abs(table[exit_layer - 1, gamma] - emitted.mean() / cost) <= error + 1e-7
    if alpha < 1:
        closed = (1 - alpha ** (gamma + 1)) / ((1 - alpha) * cost)
        assert table[exit_layer - 1, gamma] == pytest.approx(closed, rel=1e-5)
    np.testing.assert_allclose(table[:, 0], 1 / layers, rtol=1e-6)


def test_choices_at_the_extremes_and_when_one_exit_gets_better():
    assert [int(x) for x in choose_exit(jnp.zeros(7), 8, 18)] == [1, 0]
    sure = jnp.zeros(7).at[2].set(1.0)
    assert [int(x) for x in choose_exit(sure, 8, 18)] == [3, 17]
    rng = np.random.default_rng(0)
    choose = jax.jit(choose_exit, static_argnums=(1, 2))
    for _ in range(40):
        alpha = rng.random(7).astype(np.float32)
        best, gamma = choose(jnp.asarray(alpha), 8, 18)
        if int(gamma) == 0:
            continue  # plain decoding is no exit's merit
        alpha[int(best) - 1] = min(1.0, alpha[int(best) - 1] + 0.1)
        assert int(choose(jnp.asarray(alpha), 8, 18)[0]) == int(best)


def columns(hits: list[list[int]]) -> tuple[Any, Any, Any]:
    """Tokens whose exits match the target where told, with confidences that tell columns apart."""
    right = jnp.asarray(hits, bool)
    tokens = jnp.concatenate([jnp.where(right, 1, 0), jnp.ones((1, right.shape[1]), int)])
    confidence = 0.1 * jnp.arange(1, right.shape[1] + 1)[None] + jnp.zeros(right.shape)
    return tokens.astype(jnp.int32), confidence, jnp.ones(right.shape[1], bool)


def test_without_decay_and_cuts_acceptance_is_the_share_of_matches():
    rng = np.random.default_rng(1)
    statistics, seen = no_statistics(4), []
    for _ in range(6):
        hits = rng.integers(0, 2, (3, 5)).tolist()
        statistics = update_statistics(statistics, *columns(hits), 0, jnp.asarray(1), False, 1.0)
        seen.append(hits)
    np.testing.assert_allclose(acceptance(statistics), np.mean(seen, axis=(0, 2)), rtol=1e-6)


def test_what_follows_the_first_wrong_draft_does_not_count():
    hits = [[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]]
    args = (no_statistics(4), *columns(hits))
    whole = update_statistics(*args, 0, jnp.asarray(3), False, 1.0)
    np.testing.assert_array_equal(whole.counts, [[3, 2], [5, 0], [3, 2], [0, 0]])
    cut = update_statistics(*args, 0, jnp.asarray(3), True, 1.0)  # exit 3 is wrong at position 1
    np.testing.assert_array_equal(cut.counts, [[1, 1], [2, 0], [1, 1], [0, 0]])
    np.testing.assert_allclose(cut.confidences[2], [0.1, 0.2], rtol=1e-6)
    # Prompt columns are neither cut nor looked at.
    kept = update_statistics(*args, 2, jnp.asarray(3), True, 1.0)
    np.testing.assert_array_equal(kept.counts, [[3, 2], [5, 0], [3, 2], [0, 0]])
    again = update_statistics(cut, *args[1:], 0, jnp.asarray(2), True, 0.5)
    np.testing.assert_allclose(again.counts[1], [0.5 * 2 + 5, 0])


def test_thresholds_lie_between_right_and_wrong_and_may_be_unknown():
    hits = [[1, 0, 1], [1, 1, 1], [0, 0, 0]]
    found = update_statistics(no_statistics(4), *columns(hits), 0, jnp.asarray(1), False, 1.0)
    official = np.asarray(draft_thresholds(found, "official"))
    assert official[0] == pytest.approx(0.5 * (0.2 + 0.2)) and np.isnan(official[1:]).all()
    half = draft_thresholds(found, "half")
    np.testing.assert_allclose(half, [0.2, 0.1, 0.1], rtol=1e-6)
    assert np.all(np.asarray(acceptance(no_statistics(4))) == 0)
