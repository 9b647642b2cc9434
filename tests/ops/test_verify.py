"""The verifier's modes on padded, ragged and adversarial trees, and what all modes promise."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.sampling import SamplingParams, Use, request_key, sample
from ops.verify import LOSSLESS, Verdict, emitted_tokens, verify

ROWS, NODES, VOCAB = 6, 9, 4
SAMPLED = ("swor", "with_replacement")
TREE_MODES = ("greedy", "deterministic", *SAMPLED, "typical")
NO_TEMPERATURE = SamplingParams.make()
WARM = SamplingParams.make(temperature=1.0)

_jitted = functools.cache(
    lambda mode, depth=None: jax.jit(functools.partial(verify, mode, max_depth=depth))
)


def _draft(seed: int, padding: bool = True) -> dict[str, Any]:
    """Random trees with token 0 in play, repeated siblings, padded and dropped nodes.

    Nodes of equal token path have equal logits, as in a real forward pass.
    """
    rng = np.random.default_rng(seed)
    parent = np.stack([rng.integers(0, np.arange(NODES).clip(1)) for _ in range(ROWS)])
    tokens = rng.integers(0, VOCAB, (ROWS, NODES))
    valid = rng.random((ROWS, NODES)) < (0.9 if padding else 2.0)
    empty = rng.random((ROWS, NODES)) < (0.1 if padding else -1.0)
    parent[empty], tokens[empty] = -1, -1
    parent[:, 0], tokens[:, 0], valid[:, 0] = -1, -1, True
    table = rng.normal(0, 2, (ROWS, VOCAB + 1, VOCAB))  # by token, the root's last
    logits = np.take_along_axis(table, tokens[..., None], axis=1)
    probs = rng.dirichlet(np.ones(VOCAB), (ROWS, NODES))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "parent": jnp.asarray(parent, jnp.int32),
        "valid": jnp.asarray(valid),
        "target_logits": jnp.asarray(logits, jnp.float32),
        "seeds": jnp.asarray(rng.integers(0, 10**6, ROWS), jnp.int32),
        "index": jnp.asarray(rng.integers(1, 50, ROWS), jnp.int32),
        "draft_probs": jnp.asarray(probs, jnp.float32),
    }


def _small(tokens: list, parent: list, logits: Any, probs: Any = None) -> dict[str, Any]:
    """A case written by hand, padded to the common sizes; ``logits`` broadcast to its nodes."""
    rows, nodes = len(tokens), len(tokens[0])
    room = ((0, ROWS - rows), (0, NODES - nodes))
    logits = np.broadcast_to(np.asarray(logits, np.float32), (rows, nodes, VOCAB))
    probs = np.broadcast_to(np.asarray(1 / VOCAB if probs is None else probs), logits.shape)
    laws = (np.pad(x, (*room, (0, 0)), constant_values=1 / VOCAB) for x in (logits, probs))
    filled = [jnp.asarray(np.pad(x, room, constant_values=-1), jnp.int32) for x in (tokens, parent)]
    return {
        "tokens": filled[0],
        "parent": filled[1],
        "valid": jnp.ones((ROWS, NODES), bool),
        **dict(zip(("target_logits", "draft_probs"), map(jnp.asarray, laws), strict=True)),
        "seeds": jnp.zeros((ROWS,), jnp.int32),
        "index": jnp.zeros((ROWS,), jnp.int32),
    }


def _chain_draft(seed: int) -> dict[str, Any]:
    """Random chains with the law that each token was drawn from."""
    draft = _draft(seed, padding=False)
    parent = jnp.broadcast_to(jnp.arange(-1, NODES - 1)[None], (ROWS, NODES))
    return draft | {"parent": parent.astype(jnp.int32)}


def _verify(
    mode: str, draft: dict, params: SamplingParams, depth: int | None = None, **limits: float
) -> Verdict:
    draft = {k: jnp.asarray(v) for k, v in draft.items()}
    if mode not in (*SAMPLED, "chain"):
        draft.pop("draft_probs")
    return _jitted(mode, depth)(params=params, **draft, **limits)


def _greedy_reference(draft: dict, row: int) -> tuple[int, int]:
    """Depth and last node of the longest matched path, the lowest such node."""
    tokens, parent = (np.asarray(draft[k])[row].tolist() for k in ("tokens", "parent"))
    valid = np.asarray(draft["valid"])[row]
    best = np.asarray(draft["target_logits"])[row].argmax(-1)
    found = [(0, 0)]
    for node in range(1, NODES):
        depth, at = 0, node
        while at > 0 and valid[at] and parent[at] >= 0 and tokens[at] == best[parent[at]]:
            depth, at = depth + 1, parent[at]
        if at == 0:
            found.append((depth, -node))
    depth, negative = max(found)
    return depth, -negative


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_greedy_takes_the_longest_matched_path(seed: int) -> None:
    draft = _draft(seed)
    verdict = _verify("greedy", draft, NO_TEMPERATURE)
    for row in range(ROWS):
        depth, node = _greedy_reference(draft, row)
        assert int(verdict.num_accepted[row]) == depth
        assert int(verdict.path[row, depth]) == node


def test_greedy_takes_the_deeper_of_repeated_siblings() -> None:
    after = np.asarray([[2, 1, 1, 3, 0]])  # the target's argmax after each node
    case = _small([[-1, 2, 2, 1, 3]], [[-1, 0, 0, 2, 3]], np.eye(VOCAB)[after])
    for mode in ("greedy", "deterministic"):
        verdict = _verify(mode, case, NO_TEMPERATURE)
        assert verdict.path[0].tolist() == [0, 2, 3, 4, -1, -1, -1, -1, -1]
        assert int(verdict.next_token[0]) == 0


def _check_verdict(draft: dict, verdict: Verdict, depth: int) -> None:
    """Paths run from the root along existing nodes, and 1 to depth + 1 tokens come out."""
    emitted = np.asarray(emitted_tokens(draft["tokens"], verdict))
    assert emitted.shape == (ROWS, depth + 1) == verdict.path.shape
    for row in range(ROWS):
        count = int(verdict.num_accepted[row])
        path = np.asarray(verdict.path)[row].tolist()
        assert 0 <= count <= depth
        assert path[0] == 0 and path[count + 1 :] == [-1] * (depth - count)
        for above, node in itertools.pairwise(path[: count + 1]):
            assert int(draft["parent"][row, node]) == above
            assert bool(draft["valid"][row, node]) and int(draft["tokens"][row, node]) >= 0
        drafted = [int(draft["tokens"][row, node]) for node in path[1 : count + 1]]
        want = [*drafted, int(verdict.next_token[row])]
        assert emitted[row].tolist() == want + [-1] * (depth - count)
        assert 0 <= want[-1] < VOCAB


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_paths_are_paths(seed: int) -> None:
    draft, chain = _draft(seed), _chain_draft(seed)
    for mode in TREE_MODES:
        _check_verdict(draft, _verify(mode, draft, WARM), NODES - 1)
    _check_verdict(chain, _verify("chain", chain, WARM), NODES - 1)


@pytest.mark.parametrize("mode", [*TREE_MODES, "chain"])
def test_paths_keep_to_the_depth_asked(mode: str) -> None:
    draft = _chain_draft(3)
    good = draft | {"target_logits": 50.0 * jax.nn.one_hot(_successors(draft), VOCAB)}
    full = {"draft_probs": jax.nn.softmax(good["target_logits"])}
    for depth in (0, 2) if mode == "deterministic" else (2,):
        verdict = _verify(mode, good | full, WARM, depth)
        _check_verdict(good, verdict, depth)
        assert verdict.num_accepted.tolist() == [depth] * ROWS
        # A path cut short says nothing against the token that was not looked at.
        assert verdict.next_token.tolist() == good["tokens"][:, depth + 1].tolist()


def _successors(draft: dict) -> jax.Array:
    """Of each node of a chain, the token drafted after it (0 after the last)."""
    return jnp.pad(draft["tokens"][:, 1:], ((0, 0), (0, 1)))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_temperature_zero_is_greedy(seed: int) -> None:
    draft, chain = _draft(seed), _chain_draft(seed)
    for mode in (*TREE_MODES, "chain"):
        case = chain if mode == "chain" else draft
        want, found = _verify("greedy", case, WARM), _verify(mode, case, NO_TEMPERATURE)
        # Drawn siblings keep repeated ones apart; the emitted text up to there is the same.
        for row in range(ROWS):
            count = int(found.num_accepted[row]) + 1
            both = [emitted_tokens(case["tokens"], v)[row].tolist() for v in (want, found)]
            assert both[0][:count] == both[1][:count]
        if mode in ("deterministic", "typical", "chain"):
            np.testing.assert_array_equal(found.num_accepted, want.num_accepted)
            np.testing.assert_array_equal(found.next_token, want.next_token)


@pytest.mark.parametrize("mode", [*TREE_MODES, "chain"])
def test_a_row_does_not_depend_on_its_batch(mode: str) -> None:
    draft = _chain_draft(11) if mode == "chain" else _draft(11)
    together = _verify(mode, draft, WARM)
    for row in range(ROWS):
        alone = _verify(mode, {k: v[row : row + 1] for k, v in draft.items()}, WARM)
        for name in ("path", "num_accepted", "next_token"):
            np.testing.assert_array_equal(
                getattr(alone, name)[0], getattr(together, name)[row], err_msg=name
            )


def test_settings_per_row() -> None:
    draft = _draft(5)
    mixed = SamplingParams.make(temperature=[0.0, 1.0, 0.0, 1.0, 0.5, 2.0])
    found = _verify("deterministic", draft, mixed)
    cold, warm = (_verify("deterministic", draft, p) for p in (NO_TEMPERATURE, WARM))
    for row, want in ((0, cold), (2, cold), (1, warm), (3, warm)):
        assert found.path[row].tolist() == want.path[row].tolist()
        assert int(found.next_token[row]) == int(want.next_token[row])


def test_padding_never_matches() -> None:
    """The target predicts token 0 everywhere, which padding must not be taken for."""
    tokens = [[-1, 0, -1, 0], [-1, 0, 0, -1]]
    parent = [[-1, 0, 1, -1], [-1, 0, 1, 2]]
    case = _small(tokens, parent, [9.0, 0.0, 0.0, 0.0])
    case["valid"] = case["valid"].at[1, 2].set(False)
    for mode in TREE_MODES:
        verdict = _verify(mode, case, NO_TEMPERATURE)
        assert verdict.num_accepted.tolist() == [1, 1, 0, 0, 0, 0], mode
        assert verdict.path[:3, :3].tolist() == [[0, 1, -1], [0, 1, -1], [0, -1, -1]]
        assert verdict.next_token.tolist() == [0] * ROWS


def test_an_adversarial_draft_costs_nothing_but_speed() -> None:
    """Drafts that are always wrong: each round emits exactly the target's own token."""
    draft = _draft(2, padding=False)
    best = jnp.argmax(draft["target_logits"], -1)
    above = jnp.maximum(draft["parent"], 0)
    wrong = (jnp.take_along_axis(best, above, axis=1) + 1) % VOCAB
    draft["tokens"] = wrong.at[:, 0].set(-1).astype(jnp.int32)
    for mode in TREE_MODES:
        verdict = _verify(mode, draft, NO_TEMPERATURE)
        assert verdict.num_accepted.tolist() == [0] * ROWS
        np.testing.assert_array_equal(verdict.next_token, best[:, 0])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_draft_equal_to_the_target_is_always_accepted(seed: int) -> None:
    chain = _chain_draft(seed)
    chain["draft_probs"] = WARM.warp(chain["target_logits"])
    keys = jax.vmap(lambda s: request_key(s, 0, Use.DRAFT))(jnp.arange(ROWS * NODES) + seed)
    drawn = jax.vmap(sample)(keys, chain["draft_probs"].reshape(-1, VOCAB)).reshape(ROWS, NODES)
    chain["tokens"] = jnp.pad(drawn[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    for mode in ("chain", *SAMPLED):
        verdict = _verify(mode, chain, WARM)
        assert verdict.num_accepted.tolist() == [NODES - 1] * ROWS


@pytest.mark.parametrize("mode", SAMPLED)
def test_a_path_of_drawn_tokens_is_a_chain(mode: str) -> None:
    for seed in range(5):
        chain = _chain_draft(seed)
        tree, plain = _verify(mode, chain, WARM), _verify("chain", chain, WARM)
        for name in ("path", "num_accepted", "next_token"):
            np.testing.assert_array_equal(getattr(tree, name), getattr(plain, name))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_fixed_siblings_is_free(seed: int) -> None:
    """Renumbering the nodes changes neither the greedy nor the drawn text."""
    draft = _draft(seed)
    logits = np.random.default_rng(seed).normal(0, 1, (VOCAB + 1, VOCAB)).astype(np.float32)
    draft["target_logits"] = jnp.asarray(logits)[draft["tokens"]]  # equal paths, equal rows
    order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(NODES - 1)])
    place = np.append(np.argsort(order), -1)  # place[-1] = -1 keeps padding
    moved = {k: v[:, order] for k, v in draft.items() if v.ndim > 1}
    moved["parent"] = jnp.asarray(place)[moved["parent"]].astype(jnp.int32)
    for mode, params in (("greedy", WARM), ("deterministic", WARM)):
        first, second = (_verify(mode, case, params) for case in (draft, draft | moved))
        np.testing.assert_array_equal(
            emitted_tokens(draft["tokens"], first), emitted_tokens(moved["tokens"], second)
        )


def test_sibling_that_was_never_drawn_is_skipped() -> None:
    """A law with one token cannot yield two siblings: the second must not win probability."""
    logits = np.log(np.asarray([1e-30, 0.5, 0.5, 1e-30]))
    case = _small([[-1, 0, 1]], [[-1, 0, 0]], logits, [1.0, 0.0, 0.0, 0.0])
    for mode in SAMPLED:
        assert int(_verify(mode, case, WARM).num_accepted[0]) == 0


def test_typical_acceptance_by_hand() -> None:
    """Threshold min(eps, delta exp(-H)); the longest path wins, then the likelier one."""
    p = np.asarray([0.70, 0.13, 0.12, 0.05])
    entropy = -(p * np.log(p + 1e-5)).sum()
    assert 0.12 > 0.3 * np.exp(-entropy) > 0.09 > 0.05
    tokens = [[-1, 3, 2, 1, 0, 0], [-1, 3, 2, 1, 1, 2]]
    case = _small(tokens, [[-1, 0, 0, 0, 2, 3], [-1, 0, 0, 0, 2, 1]], np.log(p))
    likelier_pair, pair = [0, 3, 5], [0, 2, 4]
    assert _verify("typical", case, WARM).path[:2, :3].tolist() == [likelier_pair, pair]
    limits = [(0.125, 9.0), (9.0, 0.125 * np.exp(entropy))]  # each bound in turn forbids token 2
    for threshold, alpha in limits:
        strict = _verify("typical", case, WARM, typical_threshold=threshold, typical_alpha=alpha)
        assert strict.path[:2, :3].tolist() == [likelier_pair, [0, 3, -1]]
        assert strict.next_token[:2].tolist() == [0, 0]


def test_each_mode_says_whether_it_is_lossless() -> None:
    assert {mode for mode, exact in LOSSLESS.items() if not exact} == {"typical", "transfer"}
    assert set(LOSSLESS) == {*TREE_MODES, "chain", "transfer"}


def test_new_numbers_do_not_recompile() -> None:
    traces = []

    @jax.jit
    def run(**arguments: Any) -> Verdict:
        traces.append(1)
        return verify("deterministic", **arguments)

    for seed in range(3):
        draft = _draft(seed)
        draft.pop("draft_probs")
        run(params=SamplingParams.make(temperature=0.5 + seed), **draft)
    assert len(traces) == 1


def test_low_precision_logits_are_verified_in_float32() -> None:
    draft = _draft(1)
    coarse = draft | {"target_logits": draft["target_logits"].astype(jnp.bfloat16)}
    exact = draft | {"target_logits": coarse["target_logits"].astype(jnp.float32)}
    for mode in ("deterministic", "typical"):
        one, two = _verify(mode, coarse, WARM), _verify(mode, exact, WARM)
        np.testing.assert_array_equal(one.path, two.path)
        np.testing.assert_array_equal(one.next_token, two.next_token)


def test_bad_arguments() -> None:
    draft: dict[str, Any] = {k: jnp.asarray(v) for k, v in _draft(0).items()}
    laws = {"draft_probs": draft.pop("draft_probs")}
    with pytest.raises(ValueError, match="unknown verifier mode 'best': choose one of greedy"):
        verify("best", params=WARM, **draft)
    with pytest.raises(ValueError, match="mode 'chain' needs draft_probs"):
        verify("chain", params=WARM, **draft)
    with pytest.raises(ValueError, match="mode 'greedy' takes no draft_probs"):
        verify("greedy", params=WARM, **draft, **laws)
    with pytest.raises(ValueError, match="max_depth must not be negative"):
        verify("greedy", params=WARM, **draft, max_depth=-1)
