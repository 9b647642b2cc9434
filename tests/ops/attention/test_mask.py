"""The meaning of AttentionMask, checked against plain loops, and its errors."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, attention
from ops.attention.intervals import UNSEEN, block_ranges, intervals
from tests.ops.attention.cases import CASES, tensors


def visible(mask: AttentionMask, row: Any, i: Any, j: Any, i_pos: int, j_pos: int) -> bool:
    """The rules of the docstring, one query and one slot at a time."""

    def of(x, *index):
        return np.asarray(x)[(min(row, x.shape[0] - 1), *index)]

    if mask.tree is not None:
        node = j - of(mask.tree_start)
        if node >= 0:
            return bool(node < mask.tree.shape[2] and of(mask.tree, i, node))
    ok = True
    if mask.causal:
        ok &= j_pos <= i_pos
    if mask.window is not None:
        ok &= 0 <= i_pos - j_pos < mask.window
    if mask.q_segments is not None:
        ok &= of(mask.q_segments, i) == of(mask.k_segments, j)
    if mask.k_valid is not None:
        ok &= of(mask.k_valid, j)
    if mask.lengths is not None:
        ok &= j < of(mask.lengths)
    return bool(ok)


@pytest.mark.parametrize("name", CASES)
def test_dense_is_the_rules(name):
    (b, t, s, *_), mask = CASES[name]
    dense = np.broadcast_to(np.asarray(mask.dense(t, s)), (b, 1, t, s))
    q_positions, k_positions = (np.asarray(x) for x in mask.positions(t, s))
    rng = np.random.default_rng(0)
    for _ in range(600):
        row, i, j = rng.integers(b), rng.integers(t), rng.integers(s)
        i_pos = q_positions[min(row, len(q_positions) - 1), i]
        j_pos = k_positions[min(row, len(k_positions) - 1), j]
        assert dense[row, 0, i, j] == visible(mask, row, i, j, i_pos, j_pos), (row, i, j)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("tree")])
def test_intervals_say_what_dense_says(name):
    (b, t, s, *_), mask = CASES[name]
    x = intervals(mask, b, t, s)
    seen = (x.position[:, None] >= x.lo[:, :, None]) & (x.position[:, None] <= x.hi[:, :, None])
    if x.q_segment is not None:
        seen &= x.q_segment[:, :, None] == x.k_segment[:, None]
    assert (np.asarray(seen) == np.broadcast_to(mask.dense(t, s)[:, 0], (b, t, s))).all()


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("tree")])
def test_block_ranges_cover_all_that_is_seen(name):
    (b, t, s, *_), mask = CASES[name]
    x = intervals(mask, b, t, s)
    q_blocks, k_blocks = -(-t // 16), -(-s // 32)
    padded = x.pad(16 * q_blocks, 32 * k_blocks)
    first, last = (np.asarray(y) for y in block_ranges(padded, 16, 32))
    dense = np.broadcast_to(mask.dense(t, s)[:, 0], (b, t, s))
    row, i, j = np.nonzero(dense)
    assert (first[row, i // 16] <= j // 32).all() and (j // 32 <= last[row, i // 16]).all()


def test_block_ranges_are_tight_where_it_pays():
    causal = intervals(AttentionMask(causal=True, window=jnp.int32(64)), 1, 256, 256)
    first, last = block_ranges(causal, 64, 64)
    assert last.tolist() == [[0, 1, 2, 3]] and first.tolist() == [[0, 0, 1, 2]]
    ragged = intervals(AttentionMask(lengths=jnp.asarray([1, 65, 0])), 3, 1, 256)
    first, last = block_ranges(ragged, 1, 64)
    assert last.tolist() == [[0], [1], [-1]] and first.tolist() == [[0], [0], [0]]


def test_the_reserved_position_is_never_seen():
    x = intervals(AttentionMask(q_positions=jnp.full((1, 1), UNSEEN), causal=True), 1, 1, 4)
    assert int(x.hi.max()) < UNSEEN


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"q_positions": jnp.zeros((2, 3), jnp.int32)}, "q_positions must have shape"),
        ({"lengths": jnp.zeros((2, 1), jnp.int32)}, "lengths must have shape"),
        ({"window": jnp.zeros((2,), jnp.int32)}, "window must be a scalar"),
        ({"q_segments": jnp.zeros((2, 4), jnp.int32)}, "together"),
        ({"tree": jnp.ones((2, 4, 4), bool)}, "together"),
        ({"tree": jnp.ones((4, 4), bool), "tree_start": jnp.zeros(2, jnp.int32)}, r"\[b, t, n\]"),
        ({"tree": jnp.ones((2, 4, 9), bool), "tree_start": jnp.zeros(2, jnp.int32)}, "n <= 6"),
        ({"causal": True}, "needs q_positions"),
    ],
)
def test_bad_masks_are_refused(fields, words):
    q, k, v = tensors(0, 2, 4, 6, 2, 2, 8)
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, mask=AttentionMask(**fields))


def test_unseen_slots_do_not_widen_a_block():
    """A half-filled block whose filled half lies before the window is not needed."""
    mask = AttentionMask(
        q_positions=jnp.full((1, 1), 200), window=jnp.int32(20), lengths=jnp.asarray([30])
    )
    _, last = block_ranges(intervals(mask, 1, 1, 64), 1, 64)
    assert last.tolist() == [[-1]]
