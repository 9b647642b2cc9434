import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.block_sparse import BLOCK, attended
from ops.vertical_slash import Selection, by_segment, geometry, share_of, to_plan


def listed(
    columns: set[int], distances: list[int], q_len: int, kv_len: int, causal: bool
) -> np.ndarray:
    """(q_len, kv_len): the serving engine's index conversion for one segment, step by step."""
    mask = np.zeros((q_len, kv_len), bool)
    off = kv_len - q_len if causal else kv_len
    for first in range(0, q_len, BLOCK):
        end_row = first + BLOCK
        ranges: list[list[int]] = []
        for s in sorted(distances, reverse=True):
            if s >= off + end_row or (not causal and s < first):
                continue
            e = max(off + end_row - s, BLOCK)
            if not ranges or e > ranges[-1][1] + BLOCK:
                ranges.append([e - BLOCK, e])
            elif e > ranges[-1][1]:
                ranges[-1][1] += BLOCK
        for begin, end in ranges:
            mask[first:end_row, begin:end] = True
        mask[first:end_row, sorted(c for c in columns if c < kv_len)] = True
    if causal:
        mask &= np.arange(kv_len) <= np.arange(q_len)[:, None] + off
    return mask


def spread(length: int) -> list[int]:
    return [i * length // 5 for i in range(5)]


def by_the_page(columns, diagonals, first: int, count: int, stride: int, s: int) -> np.ndarray:
    """(count, s): selected slots and diagonals, given to segments and converted one by one."""
    own, end = first // stride * stride, first + count
    mask = np.zeros((count, s), bool)
    segments = [(own, end, True)]
    if own:
        segments.append((own - stride, own, False))
    if own > stride:
        segments.append((0, own - stride, False))
    for base, stop, causal in segments:
        length = stop - base
        # The segment's distance 0 meets the last query at this slot.
        straight = end - 1 if causal else stop + count - 1
        local = [c - base for c in columns if base <= c < stop] or spread(length)
        distances = [straight - x for x in diagonals if base <= x <= straight] or spread(length)
        mask[:, base:stop] |= listed(set(local), distances, count, length, causal)
    return mask


@functools.cache
def compiled(stride: int, t: int, s: int):
    def masks(columns, diagonals, first, counts, every):
        where = geometry(first, counts, stride)
        plan = to_plan(by_segment(columns, diagonals, where, every), where, t)
        at = first[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        return attended(plan, at, s), plan

    return jax.jit(masks)


CASES = [(160, 150, 640), (64, 64, 192)]


@pytest.mark.parametrize("density", [0.002, 0.02, 0.2])
@pytest.mark.parametrize(("stride", "t", "s"), CASES)
def test_plans_are_those_of_the_index_conversion(stride, t, s, density):
    rng = np.random.default_rng(int(1000 * density) + t)
    heads, first = 2, np.array([0, stride, 2 * stride, 2 * stride + stride // 3, stride + 1])
    counts = np.array([t, t, 1, stride - stride // 3, 0])
    end = (first + counts)[:, None, None]
    diagonals = (rng.random((5, heads, s)) < density) & (np.arange(s) < end)
    chosen = (rng.random((5, heads, s)) < density) & (np.arange(s) < end)
    columns = np.sort(np.where(chosen, np.arange(s), s), axis=-1)
    mask, plan = compiled(stride, t, s)(
        jnp.asarray(columns, jnp.int32), jnp.asarray(diagonals), jnp.asarray(first, jnp.int32),
        jnp.asarray(counts, jnp.int32), jnp.zeros(5, bool),
    )  # fmt: skip
    mask = np.asarray(mask)
    for row, head in np.ndindex(5, heads):
        n = counts[row]
        want = by_the_page(
            np.flatnonzero(chosen[row, head]), np.flatnonzero(diagonals[row, head]),
            first[row], n, stride, s,
        )  # fmt: skip
        np.testing.assert_array_equal(mask[row, head, :n], want)
        rows = np.arange(n)
        for x in np.flatnonzero(diagonals[row, head]):
            on = x - (n - 1 - rows)
            assert np.all(mask[row, head, rows[on >= 0], on[on >= 0]])
        for x in np.flatnonzero(chosen[row, head]):
            assert np.all(mask[row, head, :n, x][x <= first[row] + rows])
    assert_well_formed(plan, first, counts, stride)


def assert_well_formed(plan, first, counts, stride):
    """The contract of a plan: lists ascend, no slot twice, ranges in one segment, zeros behind."""
    starts, stops, ranges, columns, singles = map(np.asarray, jax.tree.leaves(plan))
    for index in np.ndindex(ranges.shape):
        row, block = index[0], index[2]
        n, c = ranges[index], singles[index]
        slots = [np.arange(a, b) for a, b in zip(starts[index], stops[index], strict=True)][:n]
        assert all(len(x) <= BLOCK for x in slots)
        everything = np.concatenate([*slots, columns[index][:c]]).astype(int)
        assert len(set(everything)) == len(everything)
        assert np.all(everything < first[row] + counts[row])
        assert np.all(np.diff(starts[index][:n]) > 0) and np.all(np.diff(columns[index][:c]) > 0)
        segments = [set(np.minimum(first[row] // stride - x // stride, 2)) for x in slots if len(x)]
        assert all(len(x) == 1 for x in segments)
        assert not starts[index][n:].any() and not stops[index][n:].any()
        assert not columns[index][c:].any()
        if block * BLOCK >= counts[row]:
            assert n == 0 and c == 0


def test_rows_that_attend_to_everything():
    stride, t, s = 160, 150, 640
    first, counts = jnp.asarray([320, 0, 325]), jnp.asarray([150, 70, 100])
    got, _ = compiled(stride, t, s)(
        jnp.full((3, 2, 4), s, jnp.int32), jnp.zeros((3, 2, s), bool), first, counts,
        jnp.asarray([True, True, False]),
    )  # fmt: skip
    got = np.asarray(got)
    at = np.asarray(first)[:, None] + np.arange(t)
    for row in (0, 1):
        n = int(counts[row])
        want = np.arange(s) <= at[row, :n, None]
        np.testing.assert_array_equal(got[row, :, :n], np.stack([want] * 2))
    assert not got[2, :, :100].all(axis=(0, 1))[:325].all()


def test_columns_given_twice_count_once():
    where = geometry(jnp.asarray([3]), jnp.asarray([1]), 64)
    selection = by_segment(jnp.full((1, 1, 2), 9), jnp.zeros((1, 1, 9), bool), where)
    assert isinstance(selection, Selection)
    kept = np.asarray(selection.columns)[0, 0]
    assert sorted(kept[kept < 9].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [40, 64, 160, 320])
def test_shares_list_what_the_whole_lists_of_their_slots(size):
    stride, t, s = 160, 150, 640
    rng = np.random.default_rng(size)
    first, counts = np.array([0, 320, 480, 165]), np.array([150, 150, 150, 1])
    chosen = jnp.asarray(rng.random((4, 2, s)) < 0.03)
    columns = jnp.asarray(np.sort(rng.integers(0, s, (4, 2, 30)), axis=-1), jnp.int32)
    every = jnp.asarray([False, False, True, False])
    where = geometry(jnp.asarray(first, jnp.int32), jnp.asarray(counts, jnp.int32), stride)
    plan = to_plan(by_segment(columns, chosen, where, every), where, t)
    at = jnp.asarray(first[:, None] + np.arange(t), jnp.int32)
    whole = attended(plan, at, s)
    for begin in range(0, s, size):
        share = share_of(plan, jnp.int32(begin), size)
        share.validate(4, t, 2)
        assert share.starts.shape[3] <= size // BLOCK + 5
        got = attended(share, at, size, jnp.int32(begin))
        np.testing.assert_array_equal(got, whole[..., begin : begin + size])
        for lists, held in (
            (share.starts, share.meant_ranges), (share.columns, share.meant_columns)
        ):  # fmt: skip
            assert np.all(np.where(held, lists >= begin, lists == 0))
