"""The acceptance rules by enumeration over draws and a fine grid of uniform numbers."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.acceptance import SiblingRule, residual, verify_chain_with_uniforms
from ops.verify import verify_tree_with_uniforms

GRID = 64  # midpoints per uniform number; each threshold is hit to within half a cell
# The draft's favourite is mostly rejected, so the second sibling and its law carry weight.
P = np.asarray([0.05, 0.25, 0.4, 0.3], np.float32)
Q = np.asarray([0.7, 0.2, 0.05, 0.05], np.float32)


@functools.cache
def _verify(rule: SiblingRule) -> Any:
    def row(*arguments: Any) -> Any:
        return verify_tree_with_uniforms(*arguments[:5], rule, *arguments[5:])  # type: ignore[call-arg]

    return jax.jit(jax.vmap(row))


def _emitted_law(rule: SiblingRule, pair: tuple[int, ...], p: np.ndarray) -> np.ndarray:
    """Law of the first emitted token, given two children of the root, over all uniforms."""
    steps = (np.arange(GRID) + 0.5) / GRID
    uniforms = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    cases = len(uniforms)
    tokens = np.tile(np.asarray([-1, *pair], np.int32), (cases, 1))
    parent = np.tile(np.asarray([-1, 0, 0], np.int32), (cases, 1))
    laws = [] if rule == "deterministic" else [np.tile(Q, (cases, 3, 1))]
    arrays = [tokens, parent, np.ones((cases, 3), bool), np.tile(p, (cases, 3, 1))]
    arrays += [uniforms.astype(np.float32), *laws]
    path, accepted, law, _ = map(np.asarray, _verify(rule)(*(jnp.asarray(x) for x in arrays)))
    token = tokens[np.arange(cases), np.maximum(path[:, 1], 0)]
    return np.where(accepted[:, None] > 0, np.eye(4)[token], law).mean(0)


@pytest.mark.parametrize("pair", [(0, 2), (2, 0), (1, 3)])
def test_fixed_set_leaves_the_law(pair: tuple[int, ...]) -> None:
    np.testing.assert_allclose(_emitted_law("deterministic", pair, P), P, atol=1 / GRID)


@pytest.mark.parametrize("rule", ["swor", "with_replacement"])
def test_drawn_siblings_leave_the_law(rule: SiblingRule) -> None:
    total = np.zeros(4)
    for pair in itertools.product(range(4), repeat=2):
        weight = Q[pair[0]] * Q[pair[1]]
        if rule == "swor":
            weight = 0.0 if pair[0] == pair[1] else weight / (1 - Q[pair[0]])
        total += weight * _emitted_law(rule, pair, P)
    np.testing.assert_allclose(total, P, atol=1 / GRID)


def test_residual_that_vanishes_falls_back() -> None:
    p = jnp.asarray([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
    q = jnp.asarray([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    np.testing.assert_array_equal(residual(p, q), [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])


def _chain(p: list, q: list, tokens: list, uniforms: list, **options: jax.Array) -> tuple:
    target, draft, draws = (jnp.asarray([x], jnp.float32) for x in (p, q, uniforms))
    accepted, law = verify_chain_with_uniforms(
        target, draft, jnp.asarray([tokens]), draws, **options
    )
    return int(accepted[0]), np.asarray(law[0]).tolist()


def test_chain_guards() -> None:
    p = [[0.0, 1.0], [0.25, 0.75]]
    # The target gives the token no mass: rejected even by the uniform number 0.
    assert _chain(p, [[1.0, 0.0]], [0], [0.0]) == (0, [0.0, 1.0])
    # q = 0 at a drawn token can only be rounding: the target's mass decides.
    assert _chain(p, [[1.0, 0.0]], [1], [0.999]) == (1, [0.25, 0.75])
    assert _chain([[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0]], [1], [0.0])[0] == 0


def test_chain_that_ends_early_draws_from_the_target_itself() -> None:
    p, q = [[0.25, 0.75]] * 3, [[0.75, 0.25]] * 2
    assert _chain(p, q, [1, 0], [0.5, 0.9]) == (1, [0.0, 1.0])
    ended = jnp.asarray([[True, False]])
    assert _chain(p, q, [1, -1], [0.5, 0.0], valid=ended) == (1, [0.25, 0.75])
    nothing = jnp.asarray([[False, False]])
    assert _chain(p, q, [-1, -1], [0.0, 0.0], valid=nothing) == (0, [0.25, 0.75])


def test_disjoint_support_rejects_everything_and_leaves_the_target() -> None:
    p, q = [[0.0, 0.0, 0.3, 0.7]] * 3, [[0.6, 0.4, 0.0, 0.0]] * 2
    accepted, law = _chain(p, q, [0, 1], [0.0, 0.0])
    assert accepted == 0
    np.testing.assert_allclose(law, p[0], atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_single_path_decides_as_the_chain_does(seed: int) -> None:
    """A tree that is one path equals the chain whose q is the drafted token, to the last bit."""
    rng = np.random.default_rng(seed)
    rows, drafted, vocab = 16, 4, 5
    p = jnp.asarray(rng.dirichlet(np.full(vocab, 0.3), (rows, drafted + 1)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, drafted)), jnp.int32)
    uniforms = jnp.asarray(rng.random((rows, drafted)), jnp.float32)
    q = jax.nn.one_hot(tokens, vocab, dtype=jnp.float32)
    accepted, law = verify_chain_with_uniforms(p, q, tokens, uniforms)
    tree_tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=-1)
    parent = jnp.broadcast_to(jnp.arange(-1, drafted)[None], tree_tokens.shape)
    valid = jnp.ones(tree_tokens.shape, bool)
    _, tree_accepted, tree_law, used = _verify("deterministic")(
        tree_tokens, parent, valid, p, uniforms
    )
    np.testing.assert_array_equal(tree_accepted, accepted)
    np.testing.assert_array_equal(tree_law, law)
    np.testing.assert_array_equal(used, np.minimum(np.asarray(accepted) + 1, drafted))


def test_repeated_siblings_of_a_fixed_set_use_no_number() -> None:
    tokens, parent = jnp.asarray([-1, 1, 1, 0]), jnp.asarray([-1, 0, 0, 0])
    probs = jnp.tile(jnp.asarray(P)[None], (4, 1))
    uniforms = jnp.asarray([0.9, 0.9, 0.0])
    path, accepted, law, used = verify_tree_with_uniforms(
        tokens, parent, jnp.ones(4, bool), probs, uniforms, "deterministic"
    )
    assert (int(accepted), int(used), path.tolist()) == (0, 2, [0, -1, -1, -1])
    np.testing.assert_allclose(law, [0, 0, 4 / 7, 3 / 7], atol=1e-6)


def test_bad_arguments() -> None:
    tokens, parent, valid = jnp.asarray([-1, 1]), jnp.asarray([-1, 0]), jnp.ones(2, bool)
    probs = jnp.tile(jnp.asarray(P)[None], (2, 1))
    with pytest.raises(ValueError, match="1 drafted nodes may need as many uniforms: got 0"):
        verify_tree_with_uniforms(tokens, parent, valid, probs, jnp.zeros((0,)), "deterministic")
    cases: list[tuple[SiblingRule, Any]] = [("swor", None), ("deterministic", probs)]
    for rule, law in cases:
        with pytest.raises(ValueError, match="give draft_probs for sampled siblings"):
            verify_tree_with_uniforms(tokens, parent, valid, probs, jnp.zeros(1), rule, law)
