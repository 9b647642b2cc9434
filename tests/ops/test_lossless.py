"""Statistical proof that every lossless verifier mode keeps the target's law, with controls.

A whole decode loop runs on order-1 Markov tables whose law of the first tokens is known exactly.
Correct variants must pass a chi-square test that broken twins, equal but for one classic mistake,
must fail by many orders of magnitude.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ops.sampling import (
    SamplingParams,
    Use,
    request_key,
    sample,
    sample_without_replacement,
)
from ops.tree import StaticTree, chain_tree, tree_from_child_counts
from ops.verify import Verdict, emitted_tokens, verify
from tests.goldens import golden

SEQUENCES = 20_000
LENGTH = 3  # tokens compared; every draft below is verified over more than one round to fill them
TREE = tree_from_child_counts({"": 2, "0": 2, "1": 1})
PLAIN = SamplingParams.make(temperature=1.0)
WARPED = SamplingParams.make(temperature=0.7, top_p=0.8)

Tables = dict[str, np.ndarray]
Verifier = Callable[..., Verdict]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return golden("speculative_sampling", "exact_joint")


def _draw_children(how: str, seed: Any, index: Any, q: jax.Array, count: int) -> jax.Array:
    """``count`` children of one node whose successors have law ``q``; -1 where there is none."""
    if how == "top":
        return jax.lax.top_k(q, count)[1]
    if how == "swor":
        return sample_without_replacement(request_key(seed, index, Use.DRAFT), q, count)[0]
    keys = [request_key(seed, index, Use.DRAFT, rank) for rank in range(count)]
    return jnp.stack([sample(key, q) for key in keys])


def _draft(how: str, tree: StaticTree, law: jax.Array, seed: Any, index: Any, root: Any) -> Any:
    """One row's drafted tokens, and the law from which each node's children were drawn."""
    tokens: list[Any] = [root] + [None] * (tree.size - 1)
    for level in tree.levels:
        for slot, node in enumerate(level.expanded):
            children = level.start + np.flatnonzero(level.source == slot)
            q = law[tokens[node]]
            depth = int(tree.depth[node])
            drawn = _draw_children(how, seed, index + depth, q, len(children))
            for child, rank in zip(children, level.rank[children - level.start], strict=True):
                tokens[child] = jnp.where(tokens[node] < 0, -1, drawn[rank])
    filled = jnp.stack(tokens).astype(jnp.int32)
    return filled, law[jnp.maximum(filled, 0)]


def _verifier(mode: Any) -> Verifier:
    """The mode under test; a deterministic set has no draft law to give."""

    def check(*args: Any, draft_probs: Any, max_depth: int) -> Verdict:
        q = None if mode == "deterministic" else draft_probs
        return verify(mode, *args, draft_probs=q, max_depth=max_depth)

    return check


def _round(
    tables: Tables, tree: StaticTree, how: str, check: Verifier, params: SamplingParams
) -> Callable[..., tuple[jax.Array, Verdict]]:
    """``(seeds, index, root) -> (drafted tokens, verdict)``: one draft and its verification."""
    target = jnp.log(jnp.asarray(tables["target_table"]))
    law = params.warp(jnp.log(jnp.asarray(tables["draft_table"])))
    draft = jax.vmap(functools.partial(_draft, how, tree, law))

    def run(seeds: jax.Array, index: jax.Array, root: jax.Array) -> tuple[jax.Array, Verdict]:
        tokens, draft_probs = draft(seeds, index, root)
        parent = jnp.asarray(tree.parent)[None]
        logits = target[jnp.maximum(tokens, 0)]
        arguments = (tokens, parent, tokens >= 0, logits, params, seeds, index)
        return tokens, check(*arguments, draft_probs=draft_probs, max_depth=tree.max_depth)

    return run


@functools.partial(jax.jit, static_argnames=("one_round", "depth", "start"))
def _decode(one_round: Any, seeds: jax.Array, depth: int, start: int) -> jax.Array:
    """(b, LENGTH) tokens generated after the start state by as many rounds as it takes."""
    width = 1 + LENGTH + depth
    text = jnp.full((seeds.shape[0], width), -1, jnp.int32).at[:, 0].set(start)
    slots = jnp.arange(width)[None]

    def unfinished(carry: Any) -> jax.Array:
        return jnp.any(carry[1] <= LENGTH)

    def body(carry: Any) -> Any:
        text, length = carry
        root = jnp.take_along_axis(text, length[:, None] - 1, axis=1)[:, 0]
        tokens, verdict = one_round(seeds, length, root)
        new = emitted_tokens(tokens, verdict)
        place = slots - length[:, None]
        count = jnp.where(length <= LENGTH, verdict.num_accepted + 1, 0)
        fresh = jnp.take_along_axis(new, jnp.clip(place, 0, new.shape[1] - 1), axis=1)
        text = jnp.where((place >= 0) & (place < count[:, None]), fresh, text)
        return text, jnp.minimum(length + count, LENGTH + 1)

    length = jnp.ones((seeds.shape[0],), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (text, length))[0][:, 1 : 1 + LENGTH]


def _generate(tables: Tables, tree: StaticTree, how: str, check: Verifier, params: Any) -> Any:
    one_round = _round(tables, tree, how, check, params)
    start = len(tables["target_table"]) - 1
    return np.asarray(_decode(one_round, jnp.arange(SEQUENCES), tree.max_depth, start))


def _numpy_warp(probs: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The sampling law by sorting, in float64: independent of the code under test."""
    heated = probs.astype(np.float64) ** (1 / temperature)
    heated /= heated.sum(-1, keepdims=True)
    for row in heated:
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= top_p]] = 0
    return heated / heated.sum(-1, keepdims=True)


def _joint(table: np.ndarray) -> np.ndarray:
    """Law of the first LENGTH tokens of the Markov chain, start state last in the table."""
    vocab = table.shape[1]
    law = np.zeros((vocab,) * LENGTH)
    for cell in itertools.product(range(vocab), repeat=LENGTH):
        states = (vocab, *cell[:-1])
        law[cell] = np.prod([table[s, t] for s, t in zip(states, cell, strict=True)])
    return law


def _p_value(text: np.ndarray, law: np.ndarray) -> float:
    """Pearson chi-square of the generated cells against ``law``; rare cells are pooled."""
    cells = np.ravel_multi_index(text.T, law.shape)
    seen = np.bincount(cells, minlength=law.size).astype(float)
    expected = law.reshape(-1).astype(np.float64)
    expected *= len(text) / expected.sum()
    rare = expected < 5
    if seen[expected == 0].any():
        return 0.0
    pooled_seen = np.append(seen[~rare], seen[rare].sum())
    pooled = np.append(expected[~rare], expected[rare].sum())
    kept = pooled > 0
    return float(stats.chisquare(pooled_seen[kept], pooled[kept]).pvalue)


def _warped_joint(tables: Tables) -> np.ndarray:
    return _joint(_numpy_warp(tables["target_table"], 0.7, 0.8))


def test_exact_law_of_the_golden(tables: Tables) -> None:
    np.testing.assert_allclose(_joint(tables["target_table"]), tables["joint_target"], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "how", "tree"),
    [
        ("chain", "independent", chain_tree(1)),
        ("chain", "independent", chain_tree(2)),
        ("chain", "independent", chain_tree(4)),
        ("deterministic", "top", TREE),
        ("swor", "swor", TREE),
        ("with_replacement", "independent", TREE),
    ],
    ids=["chain1", "chain2", "chain4", "deterministic", "swor", "with_replacement"],
)
def test_keeps_the_law(tables: Tables, mode: str, how: str, tree: StaticTree) -> None:
    text = _generate(tables, tree, how, _verifier(mode), PLAIN)
    assert _p_value(text, tables["joint_target"]) > 1e-4


@pytest.mark.parametrize(
    ("mode", "how", "tree"),
    [
        ("chain", "independent", chain_tree(2)),
        ("deterministic", "top", TREE),
        ("swor", "swor", TREE),  # the warped draft has rows with fewer tokens than siblings
        ("with_replacement", "independent", TREE),
    ],
    ids=["chain2", "deterministic", "swor", "with_replacement"],
)
def test_keeps_the_warped_law(tables: Tables, mode: str, how: str, tree: StaticTree) -> None:
    text = _generate(tables, tree, how, _verifier(mode), WARPED)
    assert _p_value(text, _warped_joint(tables)) > 1e-4


def test_deterministic_drafts_leave_the_text_of_plain_sampling(tables: Tables) -> None:
    """Not only the law: with the same seeds every token is the one plain decoding draws."""
    drafted = _generate(tables, TREE, "top", _verifier("deterministic"), WARPED)
    law = WARPED.warp(jnp.log(jnp.asarray(tables["target_table"])))
    state = jnp.full((SEQUENCES,), len(law) - 1)
    for index in range(1, LENGTH + 1):
        draw = jax.vmap(lambda s, x, i=index: sample(request_key(s, i, Use.TARGET), law[x]))
        state = draw(jnp.arange(SEQUENCES), state)
        np.testing.assert_array_equal(drafted[:, index - 1], state)


def _redraw_last(args: Any, verdict: Verdict, probs: jax.Array, when: jax.Array) -> Verdict:
    """Where ``when``, the next token is drawn from ``probs`` at the last accepted node instead."""
    seeds, index = args[5:7]
    last = jnp.take_along_axis(verdict.path, verdict.num_accepted[:, None], axis=1)
    law = jnp.take_along_axis(probs, last[..., None], axis=1)[:, 0]
    keys = jax.vmap(lambda s, i: request_key(s, i, len(Use)))(seeds, index + verdict.num_accepted)
    return Verdict(
        verdict.path,
        verdict.num_accepted,
        jnp.where(when, jax.vmap(sample)(keys, law), verdict.next_token),
    )


def _resample_from_p(*args: Any, **kwargs: Any) -> Verdict:
    """Mistake: after a rejection the next token comes from p, not from the residual."""
    verdict = verify("chain", *args, **kwargs)
    probs = args[4].warp(args[3])
    return _redraw_last(args, verdict, probs, jnp.ones_like(args[5], bool))


def _unwarped_bonus(*args: Any, **kwargs: Any) -> Verdict:
    """Mistake: after full acceptance the next token ignores temperature and top-p."""
    verdict = verify("chain", *args, **kwargs)
    everything = verdict.num_accepted == args[0].shape[1] - 1
    return _redraw_last(args, verdict, jax.nn.softmax(args[3]), everything)


def _scored_as_independent(*args: Any, **kwargs: Any) -> Verdict:
    """Mistake for siblings that are not independent draws: q as if they were."""
    return verify("with_replacement", *args, **kwargs)


@pytest.mark.parametrize(
    ("check", "how", "tree", "params"),
    [
        (_resample_from_p, "independent", chain_tree(1), PLAIN),
        (_unwarped_bonus, "independent", chain_tree(1), WARPED),
        (_scored_as_independent, "swor", TREE, PLAIN),
        (_scored_as_independent, "top", TREE, PLAIN),
    ],
    ids=["resample_from_p", "unwarped_bonus", "swor_unadjusted_q", "top_k_with_softmax_q"],
)
def test_controls_are_rejected(
    tables: Tables, check: Verifier, how: str, tree: StaticTree, params: SamplingParams
) -> None:
    text = _generate(tables, tree, how, check, params)
    law = tables["joint_target"] if params is PLAIN else _warped_joint(tables)
    assert _p_value(text, law) < 1e-6


def test_resampling_from_p_has_the_known_broken_law(tables: Tables) -> None:
    longer = chain_tree(LENGTH + 1)  # every compared token was drafted, none is a free draw
    text = _generate(tables, longer, "independent", _resample_from_p, PLAIN)
    assert _p_value(text, tables["joint_broken_resample_from_p"]) > 1e-4


def _accepted(tables: Tables, tree: StaticTree, how: str, mode: str, roots: jax.Array) -> Any:
    run = jax.jit(_round(tables, tree, how, _verifier(mode), PLAIN))
    rows = jnp.arange(len(roots))
    return np.asarray(run(rows, jnp.ones_like(rows), roots)[1].num_accepted)


def _within(sample_mean: float, exact: float, variance: float, count: int) -> bool:
    return abs(sample_mean - exact) <= 4 * np.sqrt(variance / count) + 1e-6


def test_accepted_per_round(tables: Tables) -> None:
    exact = tables["expected_accepted_from_bos"]
    roots = jnp.full((SEQUENCES,), len(tables["target_table"]) - 1)
    for length in range(1, len(exact)):
        found = _accepted(tables, chain_tree(length), "independent", "chain", roots)
        assert _within(found.mean(), exact[length], found.var(), SEQUENCES)
        assert found.min() >= 0 and found.max() <= length


def test_more_siblings_accept_more(tables: Tables) -> None:
    states = len(tables["target_table"])
    per_state = SEQUENCES // 4
    roots = jnp.repeat(jnp.arange(states), per_state)
    pair = tree_from_child_counts({"": 2})
    cases = {
        "accept_prob": (chain_tree(1), "independent", "chain"),
        "accept_prob_two_with_replacement": (pair, "independent", "with_replacement"),
        "accept_prob_two_without_replacement": (pair, "swor", "swor"),
        "accept_prob_top2_deterministic": (pair, "top", "deterministic"),
    }
    overall = {}
    for name, (tree, how, mode) in cases.items():
        rates = _accepted(tables, tree, how, mode, roots).reshape(states, per_state).mean(axis=1)
        overall[name] = rates.mean()
        for rate, exact in zip(rates, tables[name], strict=True):
            assert _within(rate, exact, exact * (1 - exact), per_state), name
    single, independent, distinct = (overall[name] for name in list(cases)[:3])
    assert single < independent < distinct
