"""Token Recycling against the official tree buffers and a replayed decoding trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from models.decoder import Config
from ops.sampling import SamplingParams
from ops.tree import TOKEN_RECYCLING_80, StaticTree, tree_from_paths
from ops.verify import verify
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.goldens import golden


def tree_of(template: np.ndarray) -> StaticTree:
    tree = tree_from_paths(template)
    rows = [tuple(int(rank) for rank in row if rank >= 0) for row in template]
    # The golden numbers nodes in the order of its template, which is breadth first like ours.
    assert list(tree.paths) == rows
    return tree


@pytest.mark.parametrize("name", ["static_tree_2_2_2", "static_tree_small"])
def test_static_tree_buffers(name):
    want = golden("token_recycling", name)
    tree = tree_of(want["template"])
    np.testing.assert_array_equal(tree.mask, want["attn_mask"].astype(bool))
    np.testing.assert_array_equal(tree.depth, want["position_ids"])
    np.testing.assert_array_equal(tree.parent, want["father_index"])
    np.testing.assert_array_equal(tree.rank[1:], want["candidate_index"][1:])  # the root has none
    paths = {tuple(row) for row in tree.retrieve_indices.tolist()}
    assert paths == {tuple(row) for row in want["search_path"].tolist()}
    bounds = [0, *(level.start for level in tree.levels), tree.size]
    assert bounds[-len(want["depth_split"]) :] == want["depth_split"].tolist()


def test_the_named_tree_is_the_official_template():
    template = golden("token_recycling", "static_tree_2_2_2")["template"]
    assert tree_of(template) == TOKEN_RECYCLING_80


def table_logits(unigram, bigram, tokens, parent, before_root):
    """Logits after each node of a table model that sees a token and the one before it."""
    before = np.where(parent < 0, before_root, tokens[np.maximum(parent, 0)])
    return unigram[tokens] + bigram[before]


@jax.jit
def decide(draft: Draft, logits, sampling, seeds, length):
    return verify(
        draft.mode, draft.tokens, draft.parent, draft.valid, logits, sampling, seeds, length,
        max_depth=draft.max_depth,
    )  # fmt: skip


def test_toy_trace_step_by_step():
    want = golden("token_recycling", "toy_trace")
    unigram, bigram = want["unigram_table"], want["bigram_table"]
    steps, vocab, k = want["matrix_after_step"].shape
    tree = tree_of(want["template"])
    drafter = TokenRecycling(tree=tree, k=k)
    cfg = Config(
        vocab_size=vocab, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        intermediate_size=8, max_length=512,
    )  # fmt: skip
    target, sampling = Target(None, cfg), SamplingParams.make()
    text = want["prompt"].tolist()
    seeds = jnp.zeros((1,), jnp.int32)
    request = Request(jnp.asarray([text], jnp.int32), jnp.asarray([len(text)]), seeds, sampling)
    prompt = TargetOutputs(tokens=request.tokens)
    state = drafter.init(None, target, request, prompt, 512)
    assert not np.any(state.matrix)
    for step in range(steps):
        root = jnp.asarray([text[-1]], jnp.int32)
        length = jnp.asarray([len(text)], jnp.int32)
        context = Context(jnp.asarray([text], jnp.int32), length, seeds, sampling)
        draft, state, _ = drafter.propose(None, state, target, None, root, context)
        tokens = np.asarray(draft.tokens)[0]
        np.testing.assert_array_equal(tokens, want["draft_tokens"][step])
        logits = table_logits(unigram, bigram, tokens, tree.parent, text[-2])
        np.testing.assert_array_equal(logits.argmax(-1), want["node_argmax"][step])
        logits = jnp.asarray(logits[None], jnp.float32)
        verdict = decide(draft, logits, sampling, seeds, length)
        emitted = int(verdict.num_accepted[0]) + 1
        assert emitted == want["accept_length"][step]
        path = np.asarray(verdict.path)[0]
        accepted = np.where(path >= 0, tokens[path], -1)
        np.testing.assert_array_equal(accepted, want["accepted_tokens"][step])
        text += [*accepted[1:emitted].tolist(), int(verdict.next_token[0])]
        state = drafter.observe(
            None, state, draft, TargetOutputs(draft.tokens, logits=logits), verdict.path,
            verdict.num_accepted + 1, jnp.asarray([text[-1]], jnp.int32),
        )  # fmt: skip
        np.testing.assert_array_equal(state.matrix, want["matrix_after_step"][step])
    final = want["final_sequence"].tolist()
    shared = min(len(final), len(text))
    assert text[:shared] == final[:shared] and len(text) >= len(final) - 1
