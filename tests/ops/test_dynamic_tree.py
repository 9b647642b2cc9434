"""EAGLE-2's builder and Clover-1's budget rule against plain Python references."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.dynamic_tree import Frontier, beam_tree, budget_level, dynamic_tree

VOCAB, TOP_K, DEPTH, TOTAL = 7, 3, 3, 10


def _log_prob_table(seed: int, kind: str) -> np.ndarray:
    """Log-probabilities (v, v, v) of what follows two tokens.

    Coarse ones are full of exact ties, sparse ones of impossible tokens; both have some that
    rounding pushed above 0.
    """
    rng = np.random.default_rng(seed)
    if kind == "smooth":
        logits = rng.normal(0, 2, (VOCAB,) * 3)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chances = [0.2, 0.2, 0.5, 0.1] if kind == "coarse" else [0.05, 0.05, 0.1, 0.8]
    return rng.choice([1e-3, 0.0, -1.0, -np.inf], (VOCAB,) * 3, p=chances)


def _reference(table: np.ndarray, root: int) -> list[tuple[tuple[int, ...], float]]:
    """(path of tokens, score) of every kept node in order of creation."""

    def children(path: tuple[int, ...], score: float) -> list[tuple[tuple[int, ...], float]]:
        row = np.minimum(table[(root, root, *path)[-2:]], 0)
        best = sorted(range(VOCAB), key=lambda token: -row[token])[:TOP_K]
        return [((*path, token), float(np.float32(score + row[token]))) for token in best]

    pool = children((), 0.0)
    frontier = pool
    for _ in range(DEPTH):
        created = [child for path, score in frontier for child in children(path, score)]
        pool = pool + created
        frontier = sorted(created, key=lambda node: -node[1])[:TOP_K]
    kept = sorted(sorted(range(len(pool)), key=lambda i: -pool[i][1])[:TOTAL])
    return [pool[i] for i in kept]


@jax.jit
def _build(table: jax.Array, roots: jax.Array) -> Any:
    """Tree of each root. The state keeps all fed tokens and each frontier's paths.

    The law depends on the last two tokens, so a wrong ``source`` gives other scores, and it is NaN
    where ``ancestors`` disagree with the path that ``source`` gives.
    """

    def step(state: Any, frontier: Frontier) -> Any:
        fed, paths = state
        at = frontier.level * TOP_K
        fed = jax.lax.dynamic_update_slice(fed, frontier.tokens, (0, at))
        paths = jnp.take_along_axis(paths, frontier.source[..., None], axis=1)
        last = paths[..., -1]
        paths = jnp.concatenate([paths[..., 1:], frontier.tokens[..., None]], axis=-1)
        by_mask = jnp.sum(frontier.ancestors * (fed + 1)[:, None, :], axis=-1)
        agree = by_mask == jnp.sum(jnp.where(paths < VOCAB, paths + 1, 0), axis=-1)
        last = jnp.where(last < VOCAB, last, roots[:, None])
        log_probs = table[last, frontier.tokens]
        return jnp.where(agree[..., None], log_probs, jnp.nan), (fed, paths)

    batch = roots.shape[0]
    nothing = jnp.full((batch, TOP_K, DEPTH), VOCAB, jnp.int32)
    state = jnp.zeros((batch, DEPTH * TOP_K), jnp.int32), nothing
    return dynamic_tree(step, table[roots, roots], state, TOTAL, DEPTH, TOP_K)[0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["smooth", "coarse", "sparse"]))
def test_dynamic_tree(seed: int, kind: str) -> None:
    table = _log_prob_table(seed, kind).astype(np.float32)
    draft = _build(jnp.asarray(table), jnp.arange(2))
    for row in range(2):
        parent = np.asarray(draft.tree.parent[row])
        tokens = np.asarray(draft.tokens[row])
        paths: dict[int, tuple[int, ...]] = {0: ()}
        for i, (path, score) in enumerate(_reference(table, row), start=1):
            np.testing.assert_allclose(draft.scores[row, i], score, atol=1e-5)
            if math.isinf(score):
                assert tokens[i] == -1 and parent[i] == -1 and not draft.tree.valid[row, i]
                continue
            assert parent[i] < i and bool(draft.tree.valid[row, i])
            paths[i] = (*paths[int(parent[i])], int(tokens[i]))
            assert paths[i] == path
            assert draft.scores[row, i] <= draft.scores[row, int(parent[i])]


def test_dynamic_tree_without_expansion() -> None:
    log_probs = jnp.log(jnp.asarray([[0.1, 0.6, 0.3]]))
    draft, state = dynamic_tree(lambda s, f: (s, f), log_probs, "kept", 2, 0, 2)
    assert draft.tokens.tolist() == [[-1, 1, 2]]
    assert draft.tree.parent.tolist() == [[-1, 0, 0]]
    assert state == "kept"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((13, 1, 3), "between 1 and .* = 12 tokens"),
        ((0, 1, 3), "between 1 and"),
        ((3, -1, 3), "depth >= 0"),
        ((3, 1, 9), "top_k 9 exceeds the draft's 7 tokens"),
    ],
)
def test_dynamic_tree_errors(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamic_tree(lambda s, f: (jnp.zeros((1, 3, 7)), s), jnp.zeros((1, 7)), None, *sizes)


def _beam_reference(table: np.ndarray, root: int, shape: tuple[int, ...]) -> list[Any]:
    """(path, score) of every node of a beam, level by level."""
    level, nodes = [((), 0.0)], []
    for count in shape:
        pairs = [
            (
                (*path, token),
                float(np.float32(score + min(table[(root, root, *path)[-2:]][token], 0))),
            )
            for path, score in level
            for token in range(VOCAB)
        ]
        level = sorted(pairs, key=lambda node: -node[1])[:count]
        nodes += level
    return nodes


SHAPE = (2, 5, 4)


@jax.jit
def _beam(table: jax.Array, roots: jax.Array) -> Any:
    """Beam of each root by the last two tokens; NaN where a frontier contradicts itself."""

    def step(state: Any, frontier: Frontier) -> Any:
        fed, before, above_lines = state
        fed = jnp.concatenate([fed, frontier.tokens], axis=1)
        above = jnp.take_along_axis(before, frontier.source, axis=1)
        lines = jnp.sum(frontier.ancestors * (fed + 1)[:, None], axis=-1)
        own = jnp.take_along_axis(above_lines, frontier.source, axis=1) + frontier.tokens + 1
        law = table[above, frontier.tokens]
        agree = (lines == own)[..., None]
        return jnp.where(agree, law, jnp.nan), (fed, frontier.tokens, own)

    nothing = jnp.zeros((roots.shape[0], 0), jnp.int32)
    state = nothing, roots[:, None], jnp.zeros((roots.shape[0], 1), jnp.int32)
    return beam_tree(step, table[roots, roots], state, SHAPE)[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["smooth", "sparse"]))
def test_beam_tree(seed: int, kind: str) -> None:
    table = _log_prob_table(seed, kind).astype(np.float32)
    made = _beam(jnp.asarray(table), jnp.arange(2))
    for row in range(2):
        parent, tokens = np.asarray(made.tree.parent[row]), np.asarray(made.tokens[row])
        scores, paths = np.asarray(made.scores[row]), {0: ()}
        want = _beam_reference(table, row, SHAPE)
        np.testing.assert_allclose(scores[1:], [score for _, score in want], atol=1e-5)
        for node in range(1, len(tokens)):
            if math.isinf(scores[node]):
                assert tokens[node] == -1 and not made.tree.valid[row, node]
                continue
            assert parent[node] < node and scores[node] <= scores[parent[node]]
            paths[node] = (*paths[int(parent[node])], int(tokens[node]))
            assert made.tree.depth[row, node] == len(paths[node])
        if kind == "smooth":  # without ties the nodes are those of the reference
            assert [paths[n] for n in range(1, len(tokens))] == [path for path, _ in want]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "at least one level"), ((0,), "level 1"), ((8,), "level 1"), ((2, 15), "level 2")],
)
def test_beam_tree_errors(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_tree(lambda s, f: (jnp.zeros((1, 2, 7)), s), jnp.zeros((1, 7)), None, shape)


def _budget_reference(
    probs: np.ndarray, joint: np.ndarray, valid: np.ndarray, budget: int, top_p: float, ratio: float
) -> list[tuple[int, int]]:
    """(parent, token) pairs kept, best first."""
    kept = []
    for node, row in enumerate(probs):
        order = np.argsort(-row, kind="stable")
        mass = 0.0
        for token in order:
            if not valid[node] or mass > top_p or row[token] < ratio * row[order[0]]:
                break
            kept.append((float(row[token] * joint[node]), node, int(token)))
            mass += row[token]
    return [(node, token) for _, node, token in sorted(kept, key=lambda x: -x[0])[:budget]]


_budget = jax.jit(budget_level, static_argnames="slots")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(0, 8),
    top_p=st.sampled_from([0.3, 0.7, 0.95]),
    ratio=st.sampled_from([0.0, 0.25, 0.9]),
)
def test_budget_level(seed: int, budget: int, top_p: float, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(6, 0.7), 3).astype(np.float32)
    joint = rng.uniform(0.1, 1.0, 3).astype(np.float32)
    valid = rng.random(3) < 0.8
    found = _budget(*(jnp.asarray(x) for x in (probs, joint, valid)), budget, 8, top_p, ratio)
    want = _budget_reference(probs, joint, valid, budget, top_p, ratio)
    count = len(want)
    pairs = list(
        zip(np.asarray(found.source).tolist(), np.asarray(found.tokens).tolist(), strict=True)
    )
    assert pairs == want + [(-1, -1)] * (8 - count)
    assert np.asarray(found.valid).tolist() == [True] * count + [False] * (8 - count)
    assert int(found.budget) == budget - count
    exact = [probs[node, token] * joint[node] for node, token in want]
    np.testing.assert_allclose(found.joint, exact + [0.0] * (8 - count), rtol=1e-5)


def test_budget_level_serves_every_node_first_if_asked() -> None:
    probs = jnp.asarray([[0.6, 0.4, 0.0], [0.0, 0.1, 0.9]])
    joint, valid = jnp.asarray([0.9, 0.05]), jnp.asarray([True, True])
    plain = _budget(probs, joint, valid, 2, 4)
    assert plain.source.tolist() == [0, 0, -1, -1]
    served = _budget(probs, joint, valid, 2, 4, one_per_node=True)
    assert served.source.tolist() == [0, 1, -1, -1]
    assert served.tokens.tolist() == [0, 2, -1, -1]
    with pytest.raises(ValueError, match="at least one slot"):
        _budget(probs, joint, valid, 2, 0)


def test_budget_level_may_have_more_slots_than_candidates() -> None:
    level = _budget(
        jnp.asarray([[0.7, 0.3]]), jnp.asarray([1.0]), jnp.asarray([True]), 9, 9, top_p=1.0
    )
    assert level.tokens.tolist() == [0, 1] + [-1] * 7
    assert int(level.budget) == 7
