import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.policies.dual_chunk import DualChunkPolicy
from models.attention import Step
from ops.block_sparse import attended
from research.context.qwen25_1m.patterns import (
    AShape,
    BlockSparse,
    RandomColumns,
    Run,
    VerticalSlash,
)
from research.context.qwen25_1m.retention import (
    MeasuringPolicy,
    attention_recall,
    listed_keys,
    measure,
)
from tests.inference.models import config, prompts, weights

HEADS, GROUPS, WIDTH, STRIDE, S = 4, 2, 8, 192, 448
FIRST, COUNTS = 384, 60
ONES = jnp.ones((HEADS,), jnp.int32)


def run(first: int = FIRST, counts: int = COUNTS) -> Run:
    rng = np.random.default_rng(0)
    q, critical = (rng.normal(size=(3, 1, 192, HEADS, WIDTH)).astype(np.float32) for _ in "qc")
    k = rng.normal(size=(1, S, GROUPS, WIDTH)).astype(np.float32)
    at = jnp.asarray([first]), jnp.asarray([counts])
    return Run(jnp.asarray(q), jnp.asarray(critical), jnp.asarray(k), *at, STRIDE)


def mask(pattern: Any, of: Run) -> np.ndarray:
    """(h, counts, s): what a pattern attends to."""
    plan = jax.jit(lambda p, r: p.plan(r))(pattern, of)
    return np.asarray(attended(plan, of.positions, S))[0, :, : int(of.counts[0])]


def test_the_a_shape_is_a_sink_and_a_window():
    of = run(0, 150)
    got = mask(AShape(20, 70, (32, 128)), of)
    at, slots = np.arange(150)[:, None], np.arange(S)
    near = (slots <= at) & (slots > at - 70)
    want = near | ((slots < 20) & (slots <= at))
    assert np.all(got[:, want]) and np.all(got <= (slots <= at))
    # Ranges of 64 slots reach at most so far before the window.
    assert not np.any(got[:, (slots >= 20) & (slots < at - 70 - 2 * 64)])


def test_random_columns_differ_by_seed_and_keep_the_nearest():
    of = run()
    a, b, again = (mask(RandomColumns(40, seed, 40), of) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert np.any(a != b)
    for i in range(COUNTS):
        near = np.arange(FIRST, FIRST + i + 1)
        assert np.all(a[:, i, near]) and np.all(a[:, i, :30])


def test_naive_selection_uses_the_rotations_that_attend():
    of = run()
    other = of.replace(critical=of.queries)  # pyright: ignore[reportAttributeAccessIssue]
    naive = mask(VerticalSlash(9 * ONES, 120 * ONES, (16, 128), True), of)
    np.testing.assert_array_equal(
        naive, mask(VerticalSlash(9 * ONES, 120 * ONES, (16, 128)), other)
    )
    assert np.any(naive != mask(VerticalSlash(9 * ONES, 120 * ONES, (16, 128)), of))


@pytest.mark.parametrize(("first", "counts"), [(FIRST, COUNTS), (0, 192), (192, 100)])
def test_block_sparse_keeps_the_best_blocks(first, counts):
    of = run(first, counts)
    got = mask(BlockSparse(3, 8), of)
    end = first + counts
    for block in range(-(-counts // 64)):
        rows = slice(64 * block, min(64 * block + 64, counts))
        last = first + rows.stop - 1
        q = np.asarray(of.critical)[:, 0, rows].mean(axis=1)
        scores = []
        for number in range(last // 64 + 1):
            keys = np.zeros((64, GROUPS, WIDTH))
            real = np.asarray(of.k)[0, number * 64 : min(number * 64 + 64, end)]
            keys[: len(real)] = real
            which = min(first // STRIDE - number * 64 // STRIDE, 2)
            mean = np.repeat(keys.mean(axis=0), HEADS // GROUPS, axis=0)
            scores.append(np.sum(q[which] * mean, axis=-1))
        scores = np.array(scores)
        scores[[0, last // 64]] = np.inf
        for head in range(HEADS):
            best = np.sort(np.argsort(-scores[:, head], kind="stable")[:3])
            want = np.isin(np.arange(S) // 64, best) & (
                np.arange(S) <= first + np.arange(rows.start, rows.stop)[:, None]
            )
            np.testing.assert_array_equal(got[head, rows], want)


def test_blocks_of_keys_across_chunks_are_refused():
    of = run().replace(stride=100)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="take a multiple of 64"):
        BlockSparse(3, 8).plan(of)


def test_recall_is_the_mean_share_over_the_queries_that_count():
    dense = jnp.zeros((1, 3, 2))
    sparse = jnp.log(jnp.asarray([[[0.5, 1.0], [0.25, 0.0], [0.75, 1.0]]]))
    got = attention_recall(sparse, dense, jnp.asarray([[True, False, True]]))
    np.testing.assert_allclose(got, [0.625, 1.0])


@functools.cache
def measured() -> Any:
    """Patterns on a model of two layers: a text of four chunks."""
    full = jnp.full((4,), 200, jnp.int32)
    few = jnp.full((2, 4), 5, jnp.int32).at[1].set(200)
    policy = MeasuringPolicy(
        DualChunkPolicy(56, 8),
        {"full": VerticalSlash(full, full, (200, 200)), "local": AShape(1, 1, (1, 1))},
        {"layered": VerticalSlash(few, few, (200, 200))},
        settled=40,
    )
    run = jax.jit(measure, static_argnums=1)
    return run(weights(config()), config(), policy, jnp.asarray(prompts(150)))


@pytest.mark.slow
def test_what_is_measured_is_by_layer_and_head():
    got = measured()
    for name in ("full", "local", "layered"):
        assert got[name].recall.shape == got[name].error.shape == got[name].density.shape == (2, 4)
    np.testing.assert_allclose(got["full"].recall, 1, atol=1e-5)
    np.testing.assert_allclose(got["full"].error, 0, atol=1e-4)
    assert np.all(got["full"].density >= 1)
    local = got["local"]
    assert np.all((local.recall > 0) & (local.recall < 1) & (local.error > 0))
    assert np.all(local.density < got["full"].density)
    layered = got["layered"].recall
    assert np.all(layered[0] < 1 - 1e-4)
    np.testing.assert_allclose(layered[1], 1, atol=1e-5)


def test_early_queries_do_not_count_if_there_are_later_ones():
    cfg, tokens = config(num_layers=1), jnp.asarray(prompts(150))

    def recall(settled: int) -> np.ndarray:
        patterns = {"local": AShape(1, 1, (1, 1))}
        policy = MeasuringPolicy(DualChunkPolicy(56, 8), patterns, settled=settled)
        got = jax.jit(measure, static_argnums=1)(weights(cfg), cfg, policy, tokens)
        return np.asarray(got["local"].recall)

    every, late, beyond = map(recall, (0, 100, 150))
    np.testing.assert_array_equal(beyond, every)
    assert np.all(late < every)  # of a longer past, the nearest keys are a smaller part


def test_listed_keys_are_ranges_and_columns():
    of, pattern = run(), VerticalSlash(9 * ONES, 120 * ONES, (16, 128))
    keys = np.asarray(jax.jit(lambda p, r: listed_keys(p.plan(r)))(pattern, of))
    np.testing.assert_array_equal(keys[0, :, 0], mask(pattern, of)[:, -1].sum(axis=-1))
    assert not keys[:, :, 1:].any()


def test_what_is_not_a_prefill_of_whole_texts_is_refused():
    policy = MeasuringPolicy(DualChunkPolicy(56, 8), {})
    with pytest.raises(ValueError, match="mode 'prefill'"):
        policy.prepare(config(), Step(jnp.arange(3)[None]))
    with pytest.raises(ValueError, match="leave the cache out"):
        x = jnp.zeros((1, 3, 4, 8))
        step = Step(jnp.arange(3)[None], mode="prefill")
        shared = policy.prepare(config(), step)
        policy.attend({}, shared, x, x[:, :, :2], x[:, :, :2], None, step, object())
