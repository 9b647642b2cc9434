"""Verification rules and tree builders against official codes and float64 re-expressions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.acceptance import verify_chain_with_uniforms
from ops.dynamic_tree import Frontier, dynamic_tree
from ops.sampling import SamplingParams
from ops.tree import MEDUSA_63, tree_from_parents, tree_from_paths
from ops.verify import emitted_tokens, verify, verify_tree_with_uniforms
from tests.goldens import golden

sampling_golden = functools.partial(golden, "speculative_sampling")


def _rows(table: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(row) for row in table.tolist()}


@pytest.mark.parametrize("name", ["tree_buffers_small", "tree_buffers_mc_sim_7b_63"])
def test_static_buffers(name: str) -> None:
    g = sampling_golden(name)
    tree = tree_from_paths(g["choices"])
    np.testing.assert_array_equal(tree.mask, g["attn_mask"])
    np.testing.assert_array_equal(tree.tree_indices, g["tree_indices"])
    np.testing.assert_array_equal(tree.depth, g["position_ids"])
    np.testing.assert_array_equal(tree.retrieve_indices, g["retrieve_indices"])
    traced = jax.jit(tree_from_parents)(jnp.asarray(tree.parent))
    np.testing.assert_array_equal(traced.mask, g["attn_mask"])
    np.testing.assert_array_equal(traced.depth, g["position_ids"])


def test_named_medusa_tree() -> None:
    g = sampling_golden("tree_buffers_mc_sim_7b_63")
    assert tree_from_paths(g["choices"]) == MEDUSA_63


def test_chain() -> None:
    g = sampling_golden("chain_verify")
    args = [jnp.asarray(g[k]) for k in ("target_probs", "draft_probs", "draft_tokens", "uniforms")]
    accepted, law = jax.jit(verify_chain_with_uniforms)(*args)
    np.testing.assert_array_equal(accepted, g["num_accepted"])
    np.testing.assert_allclose(law, g["next_token_probs"], atol=1e-5, rtol=0)


def _tree_fields(g: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jnp.asarray(g["node_tokens"])
    parent = jnp.broadcast_to(jnp.asarray(g["parent"])[None], tokens.shape)
    return tokens, parent, jnp.ones(tokens.shape, bool)


def _check_path(g: dict[str, np.ndarray], path: Any, accepted: Any) -> None:
    """``path`` is the accepted part of the golden's best row, and carries the golden's tokens."""
    best = g["retrieve_indices"][g["best_candidate"]]
    kept = np.arange(best.shape[1])[None] <= g["accept_length"][:, None]
    np.testing.assert_array_equal(accepted, g["accept_length"])
    np.testing.assert_array_equal(np.asarray(path)[:, : best.shape[1]], np.where(kept, best, -1))
    tokens = np.take_along_axis(g["node_tokens"], np.where(kept, best, 0), axis=1)
    np.testing.assert_array_equal(np.where(kept, tokens, -1), g["accepted_tokens"])


def test_tree_greedy() -> None:
    g = sampling_golden("tree_verify_greedy")
    tokens, parent, valid = _tree_fields(g)
    rows = jnp.arange(tokens.shape[0])
    run = jax.jit(functools.partial(verify, "greedy"))
    verdict = run(
        tokens, parent, valid, jnp.asarray(g["node_logits"]), SamplingParams.make(), rows, rows
    )
    _check_path(g, verdict.path, verdict.num_accepted)
    np.testing.assert_array_equal(verdict.next_token, g["next_token_probs"].argmax(-1))
    emitted = np.asarray(emitted_tokens(tokens, verdict))
    for row, count in enumerate(g["accept_length"]):
        want = [*g["accepted_tokens"][row, 1 : count + 1], g["next_token_probs"][row].argmax()]
        assert emitted[row].tolist() == want + [-1] * (emitted.shape[1] - len(want))


def test_tree_deterministic() -> None:
    g = sampling_golden("tree_verify_deterministic_draft")
    tokens, parent, valid = _tree_fields(g)
    probs = jax.nn.softmax(jnp.asarray(g["node_logits"]), axis=-1)
    run = jax.vmap(functools.partial(verify_tree_with_uniforms, rule="deterministic"))
    path, accepted, law, used = jax.jit(run)(
        tokens, parent, valid, probs, jnp.asarray(g["uniforms"])
    )
    _check_path(g, path, accepted)
    np.testing.assert_allclose(law, g["next_token_probs"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(used, g["num_uniforms_used"])


def test_node_without_replacement() -> None:
    g = sampling_golden("tree_verify_swor_node")
    count, width = g["candidates"].shape
    root = np.full((count, 1), -1, np.int32)
    tokens = jnp.asarray(np.concatenate([root, g["candidates"]], axis=1))
    parent = jnp.asarray(np.concatenate([root, np.zeros((count, width), np.int32)], axis=1))
    valid = jnp.ones(tokens.shape, bool)
    target, draft = (
        jnp.repeat(jnp.asarray(g[k])[:, None], width + 1, axis=1)
        for k in ("target_probs", "draft_probs")
    )
    run = jax.vmap(
        lambda tokens, parent, valid, p, u, q: verify_tree_with_uniforms(
            tokens, parent, valid, p, u, "swor", q
        )
    )
    path, accepted, law, _ = jax.jit(run)(
        tokens, parent, valid, target, jnp.asarray(g["uniforms"]), draft
    )
    np.testing.assert_array_equal(accepted, g["accepted_index"] >= 0)
    np.testing.assert_array_equal(
        np.where(np.asarray(accepted) > 0, np.asarray(path)[:, 1] - 1, -1), g["accepted_index"]
    )
    rejected = g["accepted_index"] < 0
    np.testing.assert_allclose(
        np.asarray(law)[rejected], g["next_token_probs"][rejected], atol=1e-4, rtol=0
    )


def test_dynamic_tree() -> None:
    g = sampling_golden("eagle2_dynamic_tree")
    table = jax.nn.log_softmax(jnp.asarray(g["draft_logit_table"]), axis=-1)

    def step(state: None, frontier: Frontier) -> tuple[jax.Array, None]:
        return table[frontier.tokens], state

    sizes = {k: int(g[k]) for k in ("total_tokens", "depth", "top_k")}
    build = jax.jit(lambda root: dynamic_tree(step, table[root][None], None, **sizes)[0])
    draft = build(jnp.asarray(g["root_token"]))
    np.testing.assert_array_equal(draft.tokens[0, 1:], g["draft_tokens"][1:])
    np.testing.assert_array_equal(draft.tree.parent[0], g["parent"])
    np.testing.assert_array_equal(draft.tree.mask[0], g["tree_mask"])
    np.testing.assert_array_equal(draft.tree.depth[0], g["position_ids"])
    np.testing.assert_allclose(draft.scores[0], g["cum_logprob"], atol=1e-5, rtol=0)
    leaves = set(range(len(g["parent"]))) - set(g["parent"].tolist())
    mask = np.asarray(draft.tree.mask[0])
    lines = {tuple(np.flatnonzero(mask[leaf]).tolist()) for leaf in leaves}
    assert lines == {tuple(x for x in row if x >= 0) for row in _rows(g["retrieve_indices"])}


def _with_medusa_padding(g: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Medusa's padded path slots (token 0, logits of the last node) as real nodes of the tree.

    Our verifier never matches padding. To replay a reference that does, each short path is
    lengthened by nodes with exactly what the reference reads there.
    """
    tree = tree_from_paths(g["choices"])
    parent, rows, cases = tree.parent.tolist(), [], len(g["node_tokens"])
    for row in g["retrieve_indices"].tolist():
        line = [node for node in row if node >= 0]
        while len(line) < len(row):
            parent.append(line[-1])
            line.append(len(parent) - 1)
        rows.append(line)
    extra = len(parent) - tree.size
    logits = np.repeat(g["node_logits"][:, -1:], extra, axis=1)
    tokens = np.zeros((cases, extra), np.int32)
    return g | {
        "parent": np.array(parent, np.int32),
        "node_tokens": np.concatenate([g["node_tokens"], tokens], axis=1),
        "node_logits": np.concatenate([g["node_logits"], logits], axis=1),
        "retrieve_indices": np.array(rows, np.int32),
    }


def test_medusa_typical_acceptance() -> None:
    g = _with_medusa_padding(golden("clover", "medusa_typical_acceptance"))
    tokens, parent, valid = _tree_fields(g)
    rows = jnp.arange(tokens.shape[0])
    verdict = jax.jit(functools.partial(verify, "typical"))(
        tokens,
        parent,
        valid,
        jnp.asarray(g["node_logits"]),
        SamplingParams.make(temperature=g["temperature"]),
        rows,
        rows,
        typical_threshold=g["posterior_threshold"],
        typical_alpha=g["posterior_alpha"],
    )
    best = g["retrieve_indices"][g["best_candidate"]]
    kept = np.arange(best.shape[1])[None] <= g["accept_length"][:, None]
    np.testing.assert_array_equal(verdict.num_accepted, g["accept_length"])
    path = np.asarray(verdict.path)[:, : best.shape[1]]
    np.testing.assert_array_equal(path, np.where(kept, best, -1))
