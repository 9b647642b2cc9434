"""Attention of a tree in two parts equals dense attention over prefix and tree together."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, BlockSizes, attention, hybrid_tree_attention, merge
from tests.ops.attention.cases import BLOCKS, random_tree, tensors

NODES, SLOTS = 13, 300


def dense(q, k, v, prefix, tree, start):
    """One masked attention over the concatenation, by definition."""
    both = AttentionMask(tree=tree, tree_start=jnp.full(q.shape[0], start, jnp.int32))
    both = dataclasses.replace(
        both,
        q_positions=prefix.q_positions,
        k_positions=_padded(prefix.k_positions),
        window=prefix.window,
        lengths=prefix.lengths,
        k_valid=None if prefix.k_valid is None else _padded(prefix.k_valid),
        causal=prefix.causal,
    )
    return attention(q, k, v, mask=both, implementation="reference")


def _padded(x):
    return None if x is None else jnp.pad(x, ((0, 0), (0, NODES)))


def masks() -> dict[str, AttentionMask]:
    """What queries see of the prefix: all, none of it in one row, a ring with a window."""
    rng = np.random.default_rng(3)
    order = np.stack([rng.permutation(SLOTS) + 40 for _ in range(2)])
    return {
        "lengths": AttentionMask(lengths=jnp.asarray([300, 129], jnp.int32)),
        "nothing": AttentionMask(lengths=jnp.asarray([0, 1], jnp.int32)),
        "ring": AttentionMask(
            q_positions=jnp.asarray(rng.integers(250, 345, (2, NODES)), jnp.int32),
            k_positions=jnp.asarray(order, jnp.int32),
            k_valid=jnp.asarray(order < 330),
            window=jnp.int32(65),
            causal=True,
        ),
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize(
    ("implementation", "heads", "groups"),
    [("xla", 6, 2), ("interpret", 6, 2), ("xla", 4, 4)],
)
def test_equals_dense_attention_over_both(name, implementation, heads, groups):
    prefix, tree = masks()[name], random_tree(5, 2, NODES)
    q, k, v = tensors(31, 2, NODES, SLOTS + NODES, heads, groups, 32)
    wanted = dense(q, k, v, prefix, tree, SLOTS)

    @jax.jit
    def run(q, k, v):
        before, new = slice(None, SLOTS), slice(SLOTS, None)
        return hybrid_tree_attention(
            q, k[:, before], v[:, before], prefix, k[:, new], v[:, new], tree,
            implementation=implementation, blocks=BLOCKS,
        )  # fmt: skip

    np.testing.assert_allclose(run(q, k, v), wanted, rtol=1e-5, atol=1e-5)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    rounded = dense(*(x.astype(jnp.float32) for x in low), prefix, tree, SLOTS)
    got = run(*low)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), rounded, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1, 97, 300])
def test_the_prefix_may_be_cut_anywhere_and_merged_in_any_order(size):
    """An empty prefix first, then pieces of every size, joined forwards and backwards."""
    tree = random_tree(6, 2, NODES)
    q, k, v = tensors(32, 2, NODES, SLOTS + NODES, 6, 2, 16)
    none = AttentionMask(lengths=jnp.zeros(2, jnp.int32))
    nodes = AttentionMask(tree=tree, tree_start=jnp.zeros(2, jnp.int32))
    wanted = dense(q, k, v, AttentionMask(), tree, SLOTS)
    attend = jax.jit(lambda k, v, mask: attention(q, k, v, mask=mask, return_lse=True))
    whole = SLOTS // size * size if size > 1 else 30
    edges = [*range(0, whole, size), SLOTS]
    parts = [attend(k[:, a:b], v[:, a:b], AttentionMask()) for a, b in itertools.pairwise(edges)]
    parts = [attend(k[:, :1], v[:, :1], none), attend(k[:, SLOTS:], v[:, SLOTS:], nodes), *parts]
    for order in (parts, parts[::-1]):
        out, lse = order[0]
        for part in order[1:]:
            out, lse = merge(out, lse, *part)
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_a_tree_among_the_prefix_is_refused():
    q, k, v = tensors(33, 1, 3, 6, 2, 2, 8)
    tree = random_tree(7, 1, 3)
    prefix = AttentionMask(tree=tree, tree_start=jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="a prefix mask without one"):
        hybrid_tree_attention(q, k, v, prefix, k[:, :3], v[:, :3], tree, blocks=BlockSizes())
