"""Static trees, their drafting tables, and trees built from parents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.tree import (
    EAGLE_25,
    MEDUSA_63,
    TOKEN_RECYCLING_80,
    StaticTree,
    chain_tree,
    tree_from_child_counts,
    tree_from_parents,
    tree_from_paths,
)

NAMED = {"medusa": MEDUSA_63, "eagle": EAGLE_25, "recycling": TOKEN_RECYCLING_80}


def _check_shape(parent: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> None:
    """Depth and mask follow from the parents by walking up from each node."""
    for node in range(len(parent)):
        line, at = {node}, node
        while parent[at] >= 0:
            at = int(parent[at])
            line.add(at)
        assert depth[node] == len(line) - 1
        assert set(np.flatnonzero(mask[node]).tolist()) == line


@pytest.mark.parametrize("tree", [*NAMED.values(), chain_tree(5)], ids=[*NAMED, "chain"])
def test_static_shape(tree: StaticTree) -> None:
    _check_shape(tree.parent, tree.depth, tree.mask)
    assert (tree.parent < np.arange(tree.size)).all()
    assert (np.diff(tree.depth) >= 0).all()
    for leaf_row in tree.retrieve_indices.tolist():
        line = [node for node in leaf_row if node >= 0]
        assert line[0] == 0 and tree.parent[line[1:]].tolist() == line[:-1]
    leaves = {max(node for node in row) for row in tree.retrieve_indices.tolist()}
    assert leaves == set(range(tree.size)) - set(tree.parent.tolist())


def test_named_sizes() -> None:
    levels = {
        name: [level.stop - level.start for level in tree.levels] for name, tree in NAMED.items()
    }
    assert levels["eagle"] == [4, 8, 8, 3, 2]
    assert levels["recycling"] == [8, 21, 25, 15, 8, 3]
    assert MEDUSA_63.size == 64 and sum(levels["medusa"]) == 63
    eagle = (
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    )
    assert EAGLE_25 == tree_from_paths([[int(rank) for rank in path] for path in eagle.split()])


@pytest.mark.parametrize("tree", NAMED.values(), ids=list(NAMED))
def test_levels_fill_the_tree(tree: StaticTree) -> None:
    """Drafting by levels gives every node the candidate of its own path."""
    path_of = {0: ()}
    for level in tree.levels:
        candidates = [
            [(*path_of[int(node)], rank) for rank in range(10)] for node in level.expanded
        ]
        for i, node in enumerate(range(level.start, level.stop)):
            path_of[node] = candidates[level.source[i]][level.rank[i]]
            assert level.expanded[level.source[i]] == level.parent[i] == tree.parent[node]
    assert [path_of[node] for node in range(1, tree.size)] == list(tree.paths)
    inner = {int(node) for level in tree.levels for node in level.expanded}
    assert inner == set(tree.parent.tolist()) - {-1}


def test_paths_in_any_order_and_padding() -> None:
    tree = tree_from_paths([(0, 1, -1), (1, -1, -1), (0, 1, 2), (0, -1, -1)])
    assert tree.paths == ((0,), (1,), (0, 1), (0, 1, 2))
    assert tree.retrieve_indices.tolist() == [[0, 1, 3, 4], [0, 2, -1, -1]]
    assert tree.tree_indices.tolist() == [0, 1, 2, 12, 23]
    assert hash(tree) == hash(tree_from_paths(reversed(tree.paths)))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "at least one path"),
        ([(0,), (0,)], "none given twice"),
        ([(-1, -1)], "none empty"),
        ([(0,), (0, -1, 3)], "negative rank"),
        ([(0,), (1, 2)], r"no parent in the tree: add \(1,\)"),
    ],
)
def test_bad_paths(paths: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_from_paths(paths)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="ranks below 10"):
        _ = tree_from_child_counts({"": 11}).tree_indices
    with pytest.raises(ValueError, match="at least one drafted token"):
        chain_tree(0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1, 10), min_size=9, max_size=9))
def test_traced_tree(picks: list[int]) -> None:
    """Random parents with padding: validity, depth and mask by walking up."""
    parent = np.array([-1] + [min(pick, i) for i, pick in enumerate(picks)], np.int32)
    tree = jax.jit(tree_from_parents)(jnp.asarray(parent))
    _check_shape(parent, np.asarray(tree.depth), np.asarray(tree.mask))
    tops = [int(np.flatnonzero(np.asarray(tree.mask[i]))[0]) for i in range(len(parent))]
    assert np.asarray(tree.valid).tolist() == [top == 0 for top in tops]


def test_traced_tree_takes_batches_and_any_node_order() -> None:
    forward = [-1, 0, 1, 2, 3, 4, 5]
    backward = [-1, 2, 3, 4, 5, 6, 0]
    tree = tree_from_parents(jnp.asarray([forward, backward]))
    assert tree.depth.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 6, 5, 4, 3, 2, 1]]
    for row, parent in enumerate((forward, backward)):
        _check_shape(np.array(parent), np.asarray(tree.depth[row]), np.asarray(tree.mask[row]))


def test_static_tree_as_arrays() -> None:
    alone, batch = EAGLE_25.tree(), EAGLE_25.tree(batch=3)
    traced = tree_from_parents(alone.parent)
    for name in ("parent", "depth", "mask", "valid"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(traced, name))
        assert getattr(batch, name).shape == (3, *getattr(alone, name).shape)
        np.testing.assert_array_equal(getattr(batch, name)[2], getattr(alone, name))
