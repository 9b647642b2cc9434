import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.block_sparse import BLOCK, SparsePlan, attended, block_sparse_attention
from ops.dual_chunk import dual_chunk_attention

HEADS, GROUPS, WIDTH = 4, 2, 8


def random_plan(
    rng: np.random.Generator, first: np.ndarray, counts: np.ndarray, t: int, s: int, stride: int
) -> tuple[SparsePlan, np.ndarray]:
    """A plan of random ranges within chunks and columns for ragged rows, and its mask."""
    b, n, ranges, columns = len(first), -(-t // BLOCK), 6, 9
    lists = np.zeros((3, b, HEADS, n, max(ranges, columns)), np.int32)
    sizes = np.zeros((2, b, HEADS, n), np.int32)
    mask = np.zeros((b, HEADS, t, s), bool)
    for row, head, block in np.ndindex(b, HEADS, n):
        if block * BLOCK >= counts[row]:
            continue
        end = first[row] + counts[row]
        at = np.sort(rng.choice(max(1, end // BLOCK), min(ranges, max(1, end // BLOCK)), False))
        at = at[: rng.integers(0, len(at) + 1)]
        starts = at * BLOCK + rng.integers(0, 9, len(at))
        stops = np.minimum(starts + rng.integers(0, BLOCK - 8, len(at)), end)
        stops = np.minimum(stops, (starts // stride + 1) * stride)
        starts = np.minimum(starts, stops)
        seen = np.zeros(s, bool)
        for start, stop in zip(starts, stops, strict=True):
            seen[start:stop] = True
        free = np.flatnonzero(~seen[:end])
        singles = np.sort(rng.choice(free, min(len(free), rng.integers(0, columns + 1)), False))
        seen[singles] = True
        lists[0, row, head, block, : len(at)] = starts
        lists[1, row, head, block, : len(at)] = stops
        lists[2, row, head, block, : len(singles)] = singles
        sizes[:, row, head, block] = len(at), len(singles)
        mask[row, head, block * BLOCK : (block + 1) * BLOCK] = seen
    at = first[:, None] + np.arange(t)
    mask &= (np.arange(s) <= at[:, :, None])[:, None]
    plan = SparsePlan(
        lists[0, ..., :ranges], lists[1, ..., :ranges], sizes[0], lists[2, ..., :columns], sizes[1]
    )
    return jax.tree.map(jnp.asarray, plan), mask


def expected(q, k, v, at, mask, stride):
    """Float64, pair by pair."""
    k, v = (np.repeat(np.float64(x), HEADS // GROUPS, axis=2) for x in (k, v))
    scores = np.einsum("xbthd,bshd->xbhts", np.float64(q), k) * WIDTH**-0.5
    apart = (at[:, :, None] // stride - np.arange(k.shape[1]) // stride)[:, None]
    scores = np.where(apart <= 0, scores[0], np.where(apart == 1, scores[1], scores[2]))
    weights = np.where(mask, np.exp(scores), 0.0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    out = np.einsum("bhts,bshd->bthd", weights / np.where(total > 0, total, 1.0)[..., None], v)
    return out, lse.transpose(0, 2, 1)


@functools.cache
def compiled(stride: int, implementation: str):
    return jax.jit(
        functools.partial(block_sparse_attention, stride=stride, implementation=implementation)
    )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("stride", [160, 1000])
def test_ragged_rows_attend_to_what_is_listed_and_nothing_else(stride, implementation):
    rng = np.random.default_rng(stride)
    first, counts, t, s = np.array([320, 0, 161]), np.array([150, 60, 0]), 150, 500
    q = rng.normal(size=(3, 3, t, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(3, s, GROUPS, WIDTH)).astype(np.float32) for _ in "kv")
    plan, mask = random_plan(rng, first, counts, t, s, stride)
    at = first[:, None] + np.arange(t)
    np.testing.assert_array_equal(attended(plan, jnp.asarray(at), s), mask)
    listed = mask.reshape(3, GROUPS, -1, s).any(axis=2).swapaxes(1, 2)
    clean = np.where(listed[..., None], k, 0)
    k[~listed] = np.nan
    v[~listed] = 1e4
    got = compiled(stride, implementation)(*map(jnp.asarray, (q, k, v, at)), plan)
    for ours, want in zip(got, expected(q, clean, v, at, mask, stride), strict=True):
        np.testing.assert_allclose(ours, want, atol=3e-6)


def test_a_plan_of_everything_is_dense_attention():
    rng = np.random.default_rng(0)
    stride, t = 200, 200
    q = jnp.asarray(rng.normal(size=(3, 1, t, HEADS, WIDTH)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 2 * t, GROUPS, WIDTH)), jnp.float32) for _ in "kv")
    starts = np.r_[0:t:BLOCK, t : 2 * t : BLOCK]
    stops = np.minimum(starts + BLOCK, np.where(starts < t, t, 2 * t))
    lists = (np.broadcast_to(x, (1, HEADS, 4, len(starts))) for x in (starts, stops))
    counts = np.full((1, HEADS, 4), len(starts))
    plan = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.int32),
        SparsePlan(*lists, counts, np.zeros((1, HEADS, 4, 1)), np.zeros_like(counts)),
    )
    at = jnp.arange(t, 2 * t)[None]
    got = block_sparse_attention(q, k, v, at, plan, stride=stride)
    for ours, want in zip(got, dual_chunk_attention(q, k, v, at, stride=stride), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-6)


def test_blocks_that_are_not_listed_are_skipped():
    """Their values are NaN, which a weight of zero would let through."""
    rng = np.random.default_rng(0)
    blocks, own, stride = 16, 14, 256  # queries of the last two blocks
    t, s = 2 * BLOCK, blocks * BLOCK
    q = rng.normal(size=(3, 1, t, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(1, s, GROUPS, WIDTH)).astype(np.float32) for _ in "kv")
    at = (own * BLOCK + np.arange(t))[None]
    starts = np.array([[0, own, own], [0, own, own + 1]]) * BLOCK
    counts, columns = np.array([2, 3]), np.array([[5 * BLOCK, 5 * BLOCK + 9]] * 2)
    fields = (starts, starts + BLOCK, counts, columns, np.array([2, 2]))
    plan = SparsePlan(
        *(jnp.asarray(np.broadcast_to(x, (1, HEADS, *x.shape)), jnp.int32) for x in fields)
    )
    mask = np.asarray(attended(plan, jnp.asarray(at), s))
    slots = np.arange(s)
    poisoned = ~np.isin(slots, columns[0]) & ~np.isin(slots // BLOCK, [0, own, own + 1])
    want = expected(q, k, v, at, mask, stride)
    k[:, poisoned] = v[:, poisoned] = np.nan
    got = compiled(stride, "xla")(*map(jnp.asarray, (q, k, v, at)), plan)
    for ours, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, wanted, atol=3e-6)
    assert np.isnan(expected(q, k, v, at, mask, stride)[0]).all()


def empty_plan(t: int = 64, heads: int = HEADS) -> SparsePlan:
    lists, counts = jnp.zeros((1, heads, -(-t // BLOCK), 2), jnp.int32), jnp.zeros((1, heads, 1))
    return SparsePlan(lists, lists, counts.astype(jnp.int32), lists, counts.astype(jnp.int32))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_nothing_listed_gives_zeros_and_no_mass(implementation):
    q = jnp.ones((3, 1, 64, HEADS, WIDTH))
    k = jnp.ones((1, 64, GROUPS, WIDTH))
    out, lse = block_sparse_attention(
        q, k, k, jnp.arange(64)[None], empty_plan(), stride=64, implementation=implementation
    )
    assert not np.any(out) and np.all(np.isneginf(lse))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "make local_size less"),
        ({"implementation": "gpu"}, "name one of auto"),
        ({"plan": empty_plan(65)}, "need \\(1, 4, 1\\)"),
        ({"plan": empty_plan(heads=3)}, "SparsePlan.starts has shape"),
        ({"plan": empty_plan().replace(columns=jnp.zeros((1, 4, 1)))}, "and a list"),
        ({"plan": empty_plan().replace(stops=jnp.zeros((1, 4, 1, 3)))}, "as many starts"),
        ({"plan": empty_plan().replace(range_counts=jnp.zeros((1, 4)))}, "range_counts"),
        ({"k": jnp.ones((1, 64, 3, WIDTH))}, "not a multiple of 3 key heads"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    k = jnp.ones((1, 64, GROUPS, WIDTH))
    given: dict[str, Any] = {"k": k, "plan": empty_plan(), "stride": 8} | changes
    q, at = jnp.ones((3, 1, 64, HEADS, WIDTH)), jnp.arange(64)[None]
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, v=given["k"], q_positions=at, **given)
