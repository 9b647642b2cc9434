import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import init_cache
from inference.drafters.lookup import LookupDrafter
from inference.loop import prefill_chunk
from inference.policies.dual_chunk import DualChunkPolicy
from inference.policies.registry import make_policy
from inference.policies.vertical_slash import (
    VerticalSlashPolicy,
    read_budgets,
    save_budgets,
    with_budgets,
)
from models import decoder
from models.attention import Step
from ops.sampling import SamplingParams
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import ROUNDING, config, engine, prompts, weights

DENSE = DualChunkPolicy(112, 16, 40)
LENGTHS, NEW, LIMIT = (1, 97, 150), 8, 400
EVERY = np.ones((2, 4), np.int32)
FULL, FEW = 256 * EVERY, np.array([[1, 30, 5, 40], [2, 3, 60, 9]])
MOST = (256, 256)


def sparse(vertical: Any = FEW, slash: Any = FEW, threshold: int = 60) -> VerticalSlashPolicy:
    """The policy with the same static bounds whatever the budgets."""
    policy = with_budgets(DENSE, vertical, slash, threshold)
    return policy.replace(most=MOST)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def generated(kind: str) -> list[list[int]]:
    """Greedy continuations of ragged prompts."""
    policy = {"dense": DENSE, "full": sparse(FULL, FULL), "few": sparse()}[kind]
    run = engine(policy=policy, prefill_size=64, context_limit=LIMIT)
    return run.generate(prompts(*LENGTHS), NEW).tokens


@jax.jit
def states(params: Any, policy: Any, tokens: jax.Array, counts: jax.Array) -> jax.Array:
    """Hidden states of whole prompts, without a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    step = Step(positions, mode="prefill", prompt_lengths=counts, counts=counts)
    return decoder.forward(params, config(), tokens, step=step, policy=policy).hidden


def whole(policy: Any, *lengths: int) -> np.ndarray:
    tokens = np.zeros((len(lengths), 150), np.int32)
    for row, prompt in zip(tokens, prompts(*lengths), strict=True):
        row[: len(prompt)] = prompt
    return np.asarray(states(weights(config()), policy, jnp.asarray(tokens), jnp.asarray(lengths)))


def test_full_budgets_read_as_dense_attention_does():
    assert generated("full") == generated("dense")
    got, want = whole(sparse(FULL, FULL), 150, 97), whole(DENSE, 150, 97)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :97], want[1, :97], atol=1e-5)


def test_small_budgets_are_something_else_only_beyond_the_threshold():
    got, want = whole(sparse(threshold=97), 150, 97), whole(DENSE, 150, 97)
    assert np.abs(got[0] - want[0]).max() > 100 * ROUNDING
    # The short row stands in a batch with a sparse one, and is dense all the same.
    np.testing.assert_allclose(got[1, :97], want[1, :97], atol=1e-5)
    np.testing.assert_allclose(whole(sparse(threshold=150), 150, 97), want, atol=1e-5)


def test_a_row_of_a_batch_gets_what_it_gets_alone():
    both, alone = whole(sparse(), 97, 150), whole(sparse(), 97)
    np.testing.assert_allclose(both[0, :97], alone[0, :97], atol=1e-5)


def test_one_pass_over_a_cache_equals_one_without():
    """Pieces select for themselves, so only a prompt in one piece must agree."""
    cfg, policy = config(), sparse()
    cache = init_cache(cfg, 1, 160)
    tokens = jnp.asarray(prompts(150))
    cache, out = prefill_chunk(
        weights(cfg), cfg, policy, cache, tokens, jnp.asarray([150]), jnp.asarray([160]),
        extent=160, outputs=frozenset({"hidden"}), prompt_lengths=jnp.asarray([150]),
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(out.hidden)[0], whole(policy, 150)[0], atol=1e-5)
    assert int(cache.length[0]) == 150


@pytest.mark.parametrize("size", [41, pytest.param(256, marks=pytest.mark.slow)])
def test_any_split_of_the_prompt_gives_the_same_text_with_full_budgets(size):
    run = engine(policy=sparse(FULL, FULL), prefill_size=size, context_limit=LIMIT)
    assert run.generate(prompts(*LENGTHS), NEW).tokens == generated("dense")


def test_pieces_select_for_themselves():
    """The mask of a piece comes from its own last queries: another split is another selection."""
    texts = [
        engine(policy=sparse(), prefill_size=size, context_limit=LIMIT)
        .start(prompts(150), 1, SamplingParams.make())[0]
        .cache.layers[1]
        .k[:, :, :149]
        for size in (64, 256)
    ]
    # The first 64 tokens fill one piece of 64, the last of whose queries select for all of it.
    assert np.abs(texts[0] - texts[1])[:, :, 64:].max() > 100 * ROUNDING


@pytest.mark.parametrize("kind", ["lookup", pytest.param("recycling", marks=pytest.mark.slow)])
def test_drafting_changes_nothing(kind):
    drafter: Any = LookupDrafter(4, (2, 1)) if kind == "lookup" else TokenRecycling()
    matrix = np.random.default_rng(5).integers(0, 24, (24, 8))
    run = engine(
        policy=sparse(), prefill_size=64, context_limit=LIMIT, drafter=drafter,
        drafter_params=None if kind == "lookup" else jnp.asarray(matrix, jnp.int32),
    )  # fmt: skip
    got = run.generate(prompts(*LENGTHS), NEW)
    assert got.tokens == generated("few")


def test_a_chunk_of_the_whole_context_is_plain_sparse_attention():
    plain = DualChunkPolicy(160, 0)
    full = with_budgets(plain, FULL, FULL, 60)
    want = whole(decoder.default_policy(config()), 150)
    np.testing.assert_allclose(whole(full, 150)[0], want[0], atol=1e-5)


def test_other_budgets_and_thresholds_are_the_same_program():
    whole(sparse(), 150)
    before = states._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    whole(sparse(FEW + 1, 7 * EVERY, 99), 150)
    assert states._cache_size() == before  # pyright: ignore[reportFunctionMemberAccess]


def test_budgets_go_through_a_file(tmp_path):
    policy = with_budgets(DENSE, FEW, 2 * FEW, 70)
    save_budgets(tmp_path / "budgets.json", policy)
    again = read_budgets(tmp_path / "budgets.json", 112, 16)
    jax.tree.map(np.testing.assert_array_equal, again, policy)
    assert again.most == policy.most == (130, 120)  # 30 columns mean 130
    named = make_policy(f"vertical_slash:112:16:{tmp_path / 'budgets.json'}", config())
    jax.tree.map(np.testing.assert_array_equal, named, policy)
    (tmp_path / "budgets.json").write_text('{"vertical": [[1]]}')
    with pytest.raises(ValueError, match="holds no budgets"):
        read_budgets(tmp_path / "budgets.json", 112, 16)


def test_policies_by_name():
    policy = make_policy("vertical_slash:112:16:50:200", config())
    np.testing.assert_array_equal(policy.vertical, 50 * EVERY)
    np.testing.assert_array_equal(policy.slash, 200 * EVERY)
    assert (policy.threshold, policy.most, policy.dense.stride) == (32768, (50, 200), 96)
    assert make_policy("vertical_slash:112:0:50:200:9", config()).threshold == 9
    for name, message in (
        ("vertical_slash:112:16:0:5", "whole numbers of 1 or more"),
        ("vertical_slash:800:16:5:5", "exceeds the model's 160"),
        ("vertical_slash:112:16", "write vertical_slash:CHUNK:LOCAL:FILE"),
        ("vertical_slash:16:16:5:5", "0 <= local_size < chunk_size"),
    ):
        with pytest.raises(ValueError, match=message):
            make_policy(name, config())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: with_budgets(DENSE, FEW, FEW[:1]), "two tables"),
        (lambda: with_budgets(DENSE, FEW * 0, FEW), "1 or more"),
        (lambda: sparse().per_layer(3), r"shape \(2, 4\) for 3 layers"),
        (lambda: sparse(FEW[:, :2], FEW[:, :2]).prepare(config(), Step(jnp.arange(3)[None])),
         "for 2 and 2 heads"),
        (lambda: sparse().prepare(config(position="learned"), Step(jnp.arange(3)[None])),
         "needs rotary positions"),
    ],
)  # fmt: skip
def test_what_it_is_not_defined_for_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="beyond the context of 100"):
        engine(policy=sparse(), context_limit=100).generate(prompts(150), 1)
