import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, attention
from ops.attention.merge import merge
from ops.dual_chunk import dual_chunk_attention, pairwise_attention
from ops.dual_chunk.xla import attend_ordered, largest_block

HEADS, GROUPS, WIDTH = 4, 2, 8


def tensors(b: int, t: int, s: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(3, b, t, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(b, s, GROUPS, WIDTH)).astype(np.float32) for _ in "kv")
    return q, k, v


def call(function, *arrays, **settings):
    """Numpy arrays as JAX ones, which is what signatures ask for."""
    return function(*(jnp.asarray(a) for a in arrays), **settings)


def expected(q, k, v, q_positions, k_positions, visible, stride):
    """Float64, pair by pair."""
    k, v = (np.repeat(np.float64(x), HEADS // GROUPS, axis=2) for x in (k, v))
    scores = np.einsum("xbthd,bshd->xbhts", np.float64(q), k) * WIDTH**-0.5
    apart = (q_positions[:, :, None] // stride - k_positions[:, None, :] // stride)[:, None]
    scores = np.where(apart <= 0, scores[0], np.where(apart == 1, scores[1], scores[2]))
    weights = np.where(visible[:, None], np.exp(scores), 0.0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    share = np.where(total > 0, total, 1.0)[..., None]
    out = np.einsum("bhts,bshd->bthd", weights / share, v)
    return out, lse.transpose(0, 2, 1)


def assert_close(got, want, atol=3e-6):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@functools.cache
def ordered(stride: int, rows: int, block: int):
    return jax.jit(
        lambda q, k, v, at, n: attend_ordered(
            q, k, v, at, n, stride, WIDTH**-0.5, rows=rows, block=block
        )
    )


@pytest.mark.parametrize("stride", [24, 7, 100])
@pytest.mark.parametrize(("t", "starts"), [(90, (0, 33)), (3, (61, 5)), (1, (90, 0))])
def test_ragged_rows_equal_the_pairs(stride, t, starts):
    s = 125 if t == 90 else 96
    q, k, v = tensors(2, t, s)
    at = np.array(starts, np.int32)[:, None] + np.arange(t, dtype=np.int32)
    lengths = np.array([at[0, -1] + 1, at[1, -1]], np.int32)  # the last of row 1 is no text
    slots = np.broadcast_to(np.arange(s), (2, s))
    visible = (slots[:, None] <= at[:, :, None]) & (slots < lengths[:, None])[:, None]
    k[~visible.any(1)] = np.nan
    v[~visible.any(1)] = 1e4
    clean = np.where(np.isnan(k), 0, k)
    got = ordered(stride, 40, 16)(q, k, v, at, lengths)
    assert_close(got, expected(q, clean, v, at, slots, visible, stride))


def test_blocks_after_the_last_query_of_a_tile_are_skipped():
    """Values there are NaN, which a weight of zero would let through."""
    t, s, rows, block = 90, 320, 40, 16
    q, k, v = tensors(1, t, s)
    at = np.arange(t, dtype=np.int32)[None]
    run = ordered(48, rows, block)
    want = run(q, k, v, at, np.array([t], np.int32))
    for tile in range(3):
        end = min((tile + 1) * rows, t)
        dirty_k, dirty_v = k.copy(), v.copy()
        unread = -(-end // block) * block
        dirty_k[:, unread:] = dirty_v[:, unread:] = np.nan
        got = run(q, dirty_k, dirty_v, at, np.array([t], np.int32))
        here = slice(tile * rows, end)
        assert_close([x[:, here] for x in got], [x[:, here] for x in want])
        assert np.isnan(got[0][:, end:]).all()


def test_one_row_equals_itself_in_a_batch():
    q, k, v = tensors(3, 70, 80)
    at = np.array([[0], [4], [10]], np.int32) + np.arange(70, dtype=np.int32)
    whole = ordered(24, 40, 16)(q, k, v, at, np.array([80] * 3, np.int32))
    for row in range(3):
        alone = ordered(24, 40, 16)(
            q[:, [row]], k[[row]], v[[row]], at[[row]], np.array([80], np.int32)
        )
        assert_close(alone, (whole[0][row : row + 1], whole[1][row : row + 1]), atol=1e-6)


def test_a_text_within_the_stride_is_plain_attention():
    q, k, v = tensors(2, 50, 50)
    at = np.broadcast_to(np.arange(50, dtype=np.int32), (2, 50))
    plain = call(attention, q[0], k, v, mask=AttentionMask(causal=True), return_lse=True)
    for name in ("xla", "reference"):
        got = call(dual_chunk_attention, q, k, v, at, stride=50, implementation=name)
        assert_close(got, plain, atol=1e-6)


def test_three_segments_merged_in_any_order_are_one_softmax():
    q, k, v = tensors(1, 1, 60)
    at = np.array([[59]], np.int32)
    parts = []
    for rotation, start, stop in ((0, 48, 60), (1, 24, 48), (2, 0, 24), (2, 0, 0)):
        valid = (np.arange(60) >= start) & (np.arange(60) < stop)
        mask = AttentionMask(k_valid=jnp.asarray(valid[None]))
        parts.append(call(attention, q[rotation], k, v, mask=mask, return_lse=True))
    whole = call(dual_chunk_attention, q, k, v, at, stride=24)
    for order in ((0, 1, 2, 3), (3, 2, 0, 1), (1, 3, 2, 0)):
        merged = functools.reduce(lambda a, b: merge(*a, *b), (parts[i] for i in order))
        assert_close(merged, whole, atol=1e-6)
    empty = merge(*parts[3], *parts[3])
    assert np.all(empty[0] == 0) and np.all(empty[1] == -np.inf)


@pytest.mark.parametrize("stride", [24, 7, 100])
@pytest.mark.parametrize("t", [90, 3])
@pytest.mark.parametrize("name", ["xla", "reference"])
def test_shares_of_the_slots_merged_are_the_whole(stride, t, name):
    """Shares of 32 begin anywhere in a chunk; the first row leaves the last one empty."""
    q, k, v = tensors(2, t, 128)
    at = np.array([[93 - t], [125 - t]], np.int32) + np.arange(t, dtype=np.int32)
    lengths = np.array([92, 125], np.int32)
    attend = jax.jit(functools.partial(dual_chunk_attention, stride=stride, implementation=name))
    parts = [
        attend(
            q, k[:, i : i + 32], v[:, i : i + 32], at,
            lengths=np.clip(lengths - i, 0, 32), first=jnp.int32(i),
        )
        for i in range(0, 128, 32)
    ]  # fmt: skip
    whole = dual_chunk_attention(
        *map(jnp.asarray, (q, k, v, at)),
        stride=stride,
        lengths=jnp.asarray(lengths),
        implementation="reference",
    )
    assert_close(functools.reduce(lambda a, b: merge(*a, *b), parts), whole)


def test_prefill_in_any_pieces_equals_one_pass():
    q, k, v = tensors(1, 96, 96)
    at = np.arange(96, dtype=np.int32)[None]
    n = np.array([96], np.int32)
    whole = ordered(24, 40, 16)(q, k, v, at, n)
    for cut in (1, 24, 37):
        pieces = [
            ordered(24, 40, 16)(q[:, :, i : i + cut], k, v, at[:, i : i + cut], n)
            for i in range(0, 96, cut)
        ]
        assert_close([np.concatenate(p, axis=1) for p in zip(*pieces, strict=True)], whole)


def test_pairs_take_any_positions_and_gradients():
    rng = np.random.default_rng(2)
    q, k, v = tensors(2, 50, 50)
    positions = rng.integers(0, 90, (2, 50)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (2, 50)), axis=1).astype(np.int32)
    mask = AttentionMask(
        q_segments=jnp.asarray(segments), k_segments=jnp.asarray(segments), causal=True
    )
    visible = np.tri(50, dtype=bool) & (segments[:, :, None] == segments[:, None])

    def run(q, k, v, rows):
        return call(
            pairwise_attention, q, k, v, positions, positions, mask=mask, stride=24, rows=rows
        )

    want = expected(q, k, v, positions, positions, visible, 24)
    grads = []
    for rows in (16, 64):
        assert_close(run(q, k, v, rows), want)
        grads.append(
            call(jax.grad(lambda *x, rows=rows: jnp.sum(run(*x, rows)[0] ** 2), (0, 1, 2)), q, k, v)
        )
    assert_close(*grads, atol=1e-5)
    step = 1e-2
    slope = (jnp.sum(run(q, k + step * v, v, 64)[0] ** 2)
             - jnp.sum(run(q, k - step * v, v, 64)[0] ** 2)) / (2 * step)  # fmt: skip
    np.testing.assert_allclose(slope, jnp.sum(grads[1][1] * v), rtol=2e-2)


def test_blocks_divide_the_stride():
    for stride in (1, 7, 97, 160, 384, 1021):
        assert stride % largest_block(stride, 512) == 0
    assert [largest_block(s, 512) for s in (160, 1024, 768)] == [160, 512, 384]


def test_bad_calls_are_refused():
    q, k, v = tensors(1, 2, 4)
    at = np.array([[2, 3]], np.int32)
    with pytest.raises(ValueError, match="unknown dual chunk implementation 'gpu'"):
        call(dual_chunk_attention, q, k, v, at, stride=2, implementation="gpu")
    with pytest.raises(ValueError, match="make local_size less than chunk_size"):
        call(dual_chunk_attention, q, k, v, at, stride=0)
    with pytest.raises(ValueError, match="not a multiple of 2 key heads"):
        call(dual_chunk_attention, q[:, :, :, :3], k, v, at, stride=2)
    with pytest.raises(ValueError, match="need shares of a multiple of 128 slots; got 4"):
        share = {"first": jnp.int32(4), "implementation": "interpret"}
        call(dual_chunk_attention, q, k, v, at, stride=128, **share)
