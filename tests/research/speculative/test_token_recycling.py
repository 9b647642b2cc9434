import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Context, NoDrafter, Target, TargetOutputs
from ops.sampling import SamplingParams
from ops.tree import TOKEN_RECYCLING_80, chain_tree, tree_from_child_counts
from research.speculative.token_recycling.drafter import (
    RecyclingState,
    TokenRecycling,
    bigram_matrix,
    draft_tree,
    init_matrix,
    top_ids,
    update_matrix,
)
from tests.inference.models import NEW, VOCAB, config, engine, forward_logits, prompts

SMALL = tree_from_child_counts({"": 3, "0": 3, "1": 2, "2": 1, "00": 2, "01": 1, "000": 1})


def noise_matrix(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (VOCAB, 8)), jnp.int32)


def test_the_tree_is_read_level_by_level():
    matrix, roots = np.asarray(noise_matrix()), [3, 17]
    got = np.asarray(draft_tree(noise_matrix(), jnp.asarray(roots), TOKEN_RECYCLING_80))
    for row, root in enumerate(roots):
        want = [root]
        for node in range(1, TOKEN_RECYCLING_80.size):
            above = want[TOKEN_RECYCLING_80.parent[node]]
            want.append(int(matrix[above, TOKEN_RECYCLING_80.rank[node]]))
        assert got[row].tolist() == want


def test_the_last_node_of_the_last_row_wins_and_what_is_not_learnt_changes_nothing():
    rng = np.random.default_rng(2)
    update = jax.jit(update_matrix)
    for _ in range(20):
        tokens = rng.integers(0, 6, (3, 10)).astype(np.int32)
        candidates = rng.integers(0, 24, (3, 10, 8)).astype(np.int32)
        learnt = rng.random((3, 10)) < 0.6
        tokens[~learnt] = rng.choice([-1, 0, 5], (~learnt).sum())
        want = np.asarray(noise_matrix()).copy()
        for row in range(3):
            for node in range(10):
                if learnt[row, node]:
                    want[tokens[row, node]] = candidates[row, node]
        got = update(noise_matrix(), *map(jnp.asarray, (tokens, candidates, learnt)))
        np.testing.assert_array_equal(got, want)


def matrix_after(drafter: TokenRecycling, texts, new: int, params=None) -> np.ndarray:
    eng = engine(drafter=drafter, drafter_params=params)
    return np.asarray(eng.generate(texts, new).drafter_state.matrix)


def test_rows_hold_the_top_candidates_of_processed_tokens():
    matrix = matrix_after(TokenRecycling(), prompts(), NEW)
    touched = matrix[matrix.any(axis=1)]
    assert len(touched) > 10
    for row in touched:
        assert len(set(row.tolist())) == 8 and row.min() >= 0 and row.max() < VOCAB


def test_one_round_records_the_targets_own_ranking():
    prompt = [5, 9, 2]
    matrix = matrix_after(TokenRecycling(SMALL, k=8), [prompt], 1)
    from_cfg = forward_logits(engine().cfg, prompt)[-1]
    # From a cold matrix all drafted tokens are 0, so only rows 2 and 0 were learnt.
    np.testing.assert_array_equal(matrix[2], np.argsort(-from_cfg, kind="stable")[:8])
    deepest = forward_logits(engine().cfg, [*prompt, 0, 0, 0, 0])[-1]
    np.testing.assert_array_equal(matrix[0], np.argsort(-deepest, kind="stable")[:8])
    assert not np.delete(matrix, [0, 2], axis=0).any()


def test_learning_from_accepted_nodes_only_leaves_the_others():
    prompt = [5, 9, 2]
    matrix = matrix_after(TokenRecycling(SMALL, update="accepted"), [prompt], 1)
    assert matrix[2].any() and not np.delete(matrix, 2, axis=0).any()


def test_without_updates_the_matrix_is_frozen():
    given = noise_matrix()
    after = matrix_after(TokenRecycling(update="none"), prompts(), NEW, given)
    np.testing.assert_array_equal(after, given)
    assert TokenRecycling(update="none").needs == frozenset()


def test_learning_from_the_prompt_covers_all_but_its_last_token():
    prompt = prompts(40)[0]
    plain = matrix_after(TokenRecycling(), [prompt, [1]], 0)
    assert not plain.any()
    matrix = matrix_after(TokenRecycling(update_on_prefill=True), [prompt, [1]], 0)
    logits = forward_logits(engine().cfg, prompt)
    want = np.zeros((VOCAB, 8), np.int32)
    for token, row in zip(prompt[:-1], logits, strict=False):
        want[token] = np.argsort(-row, kind="stable")[:8]
    np.testing.assert_array_equal(matrix, want)


def test_finished_rows_teach_nothing_more():
    drafter, state, roots = (
        TokenRecycling(SMALL),
        RecyclingState(noise_matrix()),
        jnp.asarray([1, 2]),
    )
    ones = jnp.ones((2,), jnp.int32)
    context = Context(roots[:, None], ones, ones, SamplingParams.make())
    draft, state, _ = drafter.propose(None, state, target(), None, roots, context)
    logits = jax.random.normal(jax.random.key(0), (2, SMALL.size, VOCAB))
    after = drafter.observe(
        None, state, draft, TargetOutputs(draft.tokens, logits=logits),
        jnp.zeros((2, 5), jnp.int32), jnp.asarray([1, 0]), roots,
    )  # fmt: skip
    alone = update_matrix(state.matrix, draft.tokens[:1], top_ids(logits[:1], 8), draft.valid[:1])
    np.testing.assert_array_equal(after.matrix, alone)


def target() -> Target:
    return Target(None, config())


@pytest.mark.parametrize("start", ["zeros", "noise", "constant"])
def test_text_does_not_depend_on_the_matrix(start):
    given = {"zeros": None, "noise": noise_matrix(), "constant": jnp.full((VOCAB, 8), 7, jnp.int32)}
    want = engine(drafter=NoDrafter(81)).generate(prompts(), NEW).tokens
    got = engine(drafter=TokenRecycling(), drafter_params=given[start]).generate(prompts(), NEW)
    assert got.tokens == want
    sampling = SamplingParams.make(0.8)
    want = engine(drafter=NoDrafter(81)).generate(prompts(), NEW, sampling=sampling).tokens
    eng = engine(drafter=TokenRecycling(), drafter_params=given[start])
    assert eng.generate(prompts(), NEW, sampling=sampling).tokens == want


def test_the_tree_needs_fewer_passes_than_a_chain_from_the_same_matrix():
    tree = engine(drafter=TokenRecycling()).generate(prompts(), 60)
    chain = engine(drafter=TokenRecycling(chain_tree(6))).generate(prompts(), 60)
    assert np.sum(tree.stats.rounds) < np.sum(chain.stats.rounds)


def test_bigram_matrix_counts_successors():
    text = [0, 1, 0, 1, 0, 2, 0, 2, 3, 0, 1]
    matrix = bigram_matrix(text, 5, k=3)
    np.testing.assert_array_equal(matrix[0], [1, 2, 0])
    np.testing.assert_array_equal(matrix[1], [0, 1, 2])
    np.testing.assert_array_equal(matrix[2], [0, 3, 1])
    np.testing.assert_array_equal(matrix[4], [0, 1, 2])  # never seen: the most frequent tokens
    assert matrix.dtype == np.int32
    with pytest.raises(ValueError, match=r"token ids in 0\.\.4"):
        bigram_matrix([1, 5], 5)


def test_a_bigram_table_drafts_through_the_same_tree():
    texts = prompts()
    plain = engine().generate(texts, NEW).tokens
    corpus = [token for prompt, new in zip(texts, plain, strict=True) for token in prompt + new]
    table = jnp.asarray(bigram_matrix(corpus, VOCAB))
    eng = engine(drafter=TokenRecycling(update="none"), drafter_params=table)
    got = eng.generate(texts, NEW)
    assert got.tokens == engine(drafter=NoDrafter(81)).generate(texts, NEW).tokens
    assert got.tokens_per_pass > 1.5


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="unknown update 'some'"):
        TokenRecycling(update="some")
    with pytest.raises(ValueError, match="uses rank 7 but 4 candidates"):
        TokenRecycling(k=4)
    with pytest.raises(
        ValueError, match=r"shape \(5, 8\) but this model and drafter need \(24, 8\)"
    ):
        engine(drafter=TokenRecycling(), drafter_params=init_matrix(5, 8)).generate([[1]], 1)
