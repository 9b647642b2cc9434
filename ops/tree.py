"""Draft trees: padded parent tables, ancestor masks, and the static trees of the literature.

A tree has ``n`` nodes. Node 0 is the root: the last committed token, not yet in the cache. Every
other node is a drafted token. ``parent`` is -1 for the root and for padding; ``mask[i, j]`` says
that node j is node i or one of its ancestors; a node's position is the root's plus its depth.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

CANDIDATES_PER_LEVEL = 10
"""Length of each level's candidate list in Medusa's flat indexing."""


@struct.dataclass
class Tree:
    """Shape of one tree (fields ``(n,)``, mask ``(n, n)``) or of one per row (``(b, n)``...)."""

    parent: Any  # int32, -1 for the root and for padding
    depth: Any  # int32, 0 for the root
    mask: Any  # bool, ancestor or self
    valid: Any  # bool, False for padding


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of a static tree, with what a drafter gathers to fill it.

    ``expanded`` are the nodes of the level above that have children: run the draft on these. Node
    ``start + i`` takes candidate ``rank[i]`` of ``expanded[source[i]]``, which is ``parent[i]``.
    """

    start: int
    stop: int
    parent: np.ndarray
    rank: np.ndarray
    expanded: np.ndarray
    source: np.ndarray


@dataclasses.dataclass(frozen=True)
class StaticTree:
    """A tree fixed before decoding, as sorted paths of child ranks; hashable, so static in jit.

    Nodes are numbered from 1 in the order of (length, lexicographic) of their paths, as Medusa
    does. Build it with :func:`tree_from_paths`.
    """

    paths: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of nodes, the root included."""
        return len(self.paths) + 1

    @functools.cached_property
    def parent(self) -> np.ndarray:
        """(n,) int32 parent of each node, -1 for the root."""
        number = {(): 0} | {path: i + 1 for i, path in enumerate(self.paths)}
        return np.array([-1] + [number[path[:-1]] for path in self.paths], np.int32)

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """(n,) int32 depth of each node."""
        return np.array([0] + [len(path) for path in self.paths], np.int32)

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """(n,) int32 rank of each node among its parent's candidates, 0 for the root."""
        return np.array([0] + [path[-1] for path in self.paths], np.int32)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """(n, n) bool, ancestor or self; column 0 is always true."""
        mask = np.eye(self.size, dtype=bool)
        for node in range(1, self.size):
            mask[node] |= mask[self.parent[node]]
        return mask

    @functools.cached_property
    def tree_indices(self) -> np.ndarray:
        """(n,) index of each node in the flat list [root, top ten of level 1, of level 2, ...].

        For drafters with one candidate list per level (Medusa). Raises ValueError if a rank is
        not below ten.
        """
        if self.rank.max(initial=0) >= CANDIDATES_PER_LEVEL:
            raise ValueError(
                f"flat indices need ranks below {CANDIDATES_PER_LEVEL}: draft by levels instead."
            )
        flat = self.rank + CANDIDATES_PER_LEVEL * (self.depth - 1) + 1
        flat[0] = 0
        return flat

    @functools.cached_property
    def retrieve_indices(self) -> np.ndarray:
        """(leaves, max depth + 1) node numbers from the root to each leaf, padded with -1.

        Rows run from the last leaf to the first, as Medusa's do.
        """
        leaves = sorted(set(range(self.size)) - set(self.parent.tolist()), reverse=True)
        rows = np.full((len(leaves), self.max_depth + 1), -1, np.int32)
        for row, leaf in zip(rows, leaves, strict=True):
            line = np.flatnonzero(self.mask[leaf])
            row[: len(line)] = line
        return rows

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node."""
        return int(self.depth[-1])

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """Levels 1, 2, ... in order; they are contiguous ranges of nodes."""
        starts = np.searchsorted(self.depth, np.arange(1, self.max_depth + 2)).tolist()
        levels = []
        for start, stop in itertools.pairwise(starts):
            parent = self.parent[start:stop]
            expanded, source = np.unique(parent, return_inverse=True)
            levels.append(
                Level(start, stop, parent, self.rank[start:stop], expanded, source.astype(np.int32))
            )
        return tuple(levels)

    def tree(self, batch: int | None = None) -> Tree:
        """The same tree as arrays, repeated for ``batch`` rows if that is given."""
        fields = [jnp.asarray(x) for x in (self.parent, self.depth, self.mask)]
        fields.append(jnp.ones((self.size,), bool))
        if batch is not None:
            fields = [jnp.broadcast_to(x[None], (batch, *x.shape)) for x in fields]
        return Tree(*fields)


def _without_padding(path: list[int]) -> tuple[int, ...]:
    while path and path[-1] == -1:
        path.pop()
    return tuple(path)


def tree_from_paths(
    paths: Iterable[Sequence[int]] | Int[np.ndarray, "paths d"],
) -> StaticTree:
    """Static tree of the given paths of child ranks, in any order; -1 at a path's end is padding.

    Raises:
        ValueError: no path, an empty or repeated path, a negative rank inside a path, or a path
            whose parent is missing.
    """
    cleaned = [_without_padding([int(rank) for rank in path]) for path in paths]
    known = set(cleaned)
    if not cleaned or () in known or len(known) < len(cleaned):
        raise ValueError("a tree needs at least one path, none empty and none given twice.")
    for path in cleaned:
        if min(path) < 0:
            raise ValueError(f"path {path} has a negative rank: ranks count from 0.")
        if len(path) > 1 and path[:-1] not in known:
            raise ValueError(f"path {path} has no parent in the tree: add {path[:-1]}.")
    return StaticTree(tuple(sorted(cleaned, key=lambda path: (len(path), path))))


def tree_from_child_counts(counts: Mapping[str, int]) -> StaticTree:
    """Static tree given by the number of children of each node that has any.

    Keys are paths as strings of digits, the root's the empty one; children take ranks 0, 1, ...
    """
    return tree_from_paths(
        (*map(int, path), rank) for path, count in counts.items() for rank in range(count)
    )


def chain_tree(length: int) -> StaticTree:
    """A single path of ``length`` drafted tokens.

    Raises:
        ValueError: ``length`` is below 1.
    """
    if length < 1:
        raise ValueError(f"a chain needs at least one drafted token, got {length}.")
    return StaticTree(tuple((0,) * depth for depth in range(1, length + 1)))


def tree_from_parents(parent: Int[Array, "*b n"]) -> Tree:
    """Depth, mask and validity of trees given by their parents, traced.

    Nodes may come in any order but node 0 is the root. A node is valid if it descends from the
    root; padding (-1, except at node 0) and its descendants are not. The mask comes from about
    log2(n) squarings of the parent relation.
    """
    n = parent.shape[-1]
    ids = jnp.arange(n)
    mask = jnp.broadcast_to(jnp.eye(n, dtype=bool), (*parent.shape, n))
    mask = mask | (parent[..., None] == ids.reshape((1,) * parent.ndim + (n,)))
    for _ in range(max(n - 1, 1).bit_length()):
        reach = mask.astype(jnp.float32)
        mask = jnp.matmul(reach, reach, precision="highest") > 0
    depth = jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1
    return Tree(parent=parent, depth=depth, mask=mask, valid=mask[..., 0])


MEDUSA_63 = tree_from_child_counts(
    {"": 10, "0": 10, "1": 7, "2": 3, "3": 2}
    | {"4": 1, "5": 1, "6": 1, "7": 1, "8": 1, "9": 1}
    | {"00": 10, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "20": 1}
    | {"000": 2}
)
"""Medusa's sparse tree of 63 drafted nodes and depth 4 (arXiv 2401.10774, its 7B model)."""

EAGLE_25 = tree_from_child_counts(
    {"": 4, "0": 3, "1": 2, "2": 2, "3": 1}
    | {"00": 3, "01": 2, "02": 2, "10": 1, "000": 3, "0000": 2}
)
"""EAGLE-1's tree of 25 drafted nodes and depth 5 (arXiv 2401.15077), also used by Clover-2."""

TOKEN_RECYCLING_80 = tree_from_child_counts(
    {"": 8, "0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1}
    | {"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1}
    | {"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1}
    | {"000": 5, "001": 2, "002": 1, "003": 1, "004": 1}
    | {"010": 1, "020": 1, "100": 1, "200": 1, "300": 1}
    | {"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1}
    | {"00000": 2, "00010": 1}
)
"""Token Recycling's static tree of 80 drafted nodes and depth 6 (arXiv 2408.08696)."""
