"""Counts of n-grams as one trie in sorted arrays, looked up on the device by binary search.

The m-grams of each length m are the trie's nodes of level m, in lexicographic order, so that the
children of a node are one run of the next level, sorted by token. A look-up compares the tokens
themselves: there are no hashes, hence no collisions, and no number needs 64 bits.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open

from models.safetensors_io import save_arrays

SCHEMA = "ngram tables 1"


@struct.dataclass
class Level:
    """All m-grams of one length m."""

    token: Any  # (nodes,) int32, the last token of each
    count: Any  # (nodes,) int32, how often it occurs
    total: Any  # (nodes,) int32, how often with a next token; 0 at the last level
    first: Any  # (nodes + 1,) int32, where its children begin, one level on

    @property
    def parent(self) -> Int[np.ndarray, " children"]:
        """For each node of the next level its parent here."""
        first = np.asarray(self.first)
        return np.repeat(np.arange(len(first) - 1), np.diff(first))


@struct.dataclass
class NGramTables:
    """Counts of n-grams, n = 2 up to ``max_order``, over a vocabulary.

    Level 1 has one node per token of the vocabulary. ``tokenizer`` is the fingerprint of the
    tokenizer that made the ids ("" if unknown).
    """

    levels: tuple[Level, ...]
    vocab_size: int = struct.field(pytree_node=False)
    tokenizer: str = struct.field(pytree_node=False, default="")

    @property
    def max_order(self) -> int:
        """The longest n-grams counted."""
        return len(self.levels)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def prob(self, keys: Int[Array, "*b n1"], nxt: Int[Array, "*b j"]) -> Float[Array, "*b j"]:
        """p(next | key), float32, or -1 where the key was never seen with a next token.

        The length of ``keys`` says the order. A key with a -1 in it was never seen.
        """
        node = jnp.where(keys[..., 0] < self.vocab_size, keys[..., 0], -1)
        for depth in range(1, keys.shape[-1]):
            node = self._child(depth, node[..., None], keys[..., depth, None])[..., 0]
        order = keys.shape[-1] + 1
        child = self._child(order - 1, jnp.broadcast_to(node[..., None], nxt.shape), nxt)
        totals, counts = (
            jnp.asarray(x) for x in (self.levels[order - 2].total, self.levels[order - 1].count)
        )
        total = jnp.where(node >= 0, totals[jnp.maximum(node, 0)], 0)
        count = jnp.where(child >= 0, counts[jnp.maximum(child, 0)], 0)
        share = count / jnp.maximum(total, 1)[..., None]
        return jnp.where(total[..., None] > 0, share, -1.0).astype(jnp.float32)

    def mixture(
        self,
        context: Int[Array, "*b c"],
        ids: Int[Array, "*b j"],
        weights: Float[Array, " orders"],
    ) -> Float[Array, "*b j"]:
        """sum over n of ``weights[n - 2]`` p_n(id | last n - 1 tokens); unseen keys add nothing.

        ``context`` ends with the text's last token and is padded on the left with -1; it must
        hold at least as many tokens as there are weights.
        """
        total = jnp.zeros(ids.shape, jnp.float32)
        size = context.shape[-1]
        for i in range(weights.shape[0]):
            p = self.prob(context[..., size - i - 1 :], ids)
            total = total + weights[i] * jnp.maximum(p, 0.0)
        return total

    def _child(
        self, depth: int, node: Int[Array, "*b"], token: Int[Array, "*b"]
    ) -> Int[Array, "*b"]:
        """The child that carries ``token`` of a node of level ``depth``, or -1."""
        first, below = (
            jnp.asarray(x) for x in (self.levels[depth - 1].first, self.levels[depth].token)
        )
        at = jnp.maximum(node, 0)
        begin, end = first[at], first[at + 1]

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) // 2
            smaller = below[jnp.minimum(middle, below.shape[0] - 1)] < token
            open_ = low < high
            return (
                jnp.where(open_ & smaller, middle + 1, low),
                jnp.where(open_ & ~smaller, middle, high),
            )

        # No node has more children than there are tokens.
        low, _ = jax.lax.fori_loop(0, self.vocab_size.bit_length(), halve, (begin, end))
        found = (node >= 0) & (low < end) & (below[jnp.minimum(low, below.shape[0] - 1)] == token)
        return jnp.where(found, low, -1)

    def save(self, path: str | pathlib.Path) -> None:
        """Write one safetensors file."""
        arrays = {
            f"{m}.{name}": np.asarray(getattr(level, name))
            for m, level in enumerate(self.levels, 1)
            for name in ("token", "count", "total", "first")
        }
        arrays["vocab_size"] = np.asarray([self.vocab_size], np.int32)
        arrays["schema"] = np.frombuffer(SCHEMA.encode(), np.uint8)
        arrays["tokenizer"] = np.frombuffer(self.tokenizer.encode(), np.uint8)
        save_arrays(arrays, pathlib.Path(path))


def load_tables(path: str | pathlib.Path, tokenizer: str | None = None) -> NGramTables:
    """Tables from a file of :meth:`NGramTables.save`.

    Args:
        tokenizer: fingerprint of the model's tokenizer, to check that the ids are its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no file of tables, or made with another tokenizer.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no n-gram tables at {path}: count a corpus and save them there.")
    try:
        with safe_open(str(path), framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): count the corpus again.") from error
    if "schema" not in arrays or arrays["schema"].tobytes() != SCHEMA.encode():
        raise ValueError(f"{path} holds no n-gram tables: name a file that they were saved to.")
    made_by = arrays["tokenizer"].tobytes().decode()
    if tokenizer is not None and made_by != tokenizer:
        raise ValueError(
            f"the n-gram tables in {path} were counted with another tokenizer: count the corpus "
            "again with the model's."
        )
    depth = max(int(name.split(".")[0]) for name in arrays if name.endswith(".token"))
    levels = tuple(
        Level(*(arrays[f"{m}.{name}"] for name in ("token", "count", "total", "first")))
        for m in range(1, depth + 1)
    )
    return NGramTables(levels, int(arrays["vocab_size"][0]), made_by)


def count_ngrams(
    ids: Int[np.ndarray, " n"],
    offsets: Int[np.ndarray, " documents_plus_one"],
    vocab_size: int,
    max_order: int = 6,
    tokenizer: str = "",
) -> NGramTables:
    """Count all n-grams up to ``max_order`` that lie within one document.

    Args:
        ids: all documents, one after the other; document i is ``ids[offsets[i]:offsets[i + 1]]``.
        tokenizer: fingerprint of the tokenizer that made the ids.

    Raises:
        ValueError: ids outside the vocabulary, or no document as long as ``max_order``.
    """
    ids = np.asarray(ids, np.int64)
    _check_ids(ids, vocab_size)
    longest = int(np.diff(offsets).max(initial=0))
    if max_order < 2 or longest < max_order:
        raise ValueError(
            f"n-grams up to {max_order} tokens in documents of at most {longest}: give max_order "
            "2 or more, and longer documents or a smaller max_order."
        )
    place = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    node, grams = ids, []
    for order in range(2, max_order + 1):
        inside = np.flatnonzero(place >= order - 1)
        keys, inverse, counts = np.unique(
            node[inside - 1] * vocab_size + ids[inside], return_inverse=True, return_counts=True
        )
        node = np.full(len(ids), -1, np.int64)
        node[inside] = inverse
        grams.append((keys, counts))
    return _assemble(np.bincount(ids, minlength=vocab_size), grams, vocab_size, tokenizer)


def tables_from_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> NGramTables:
    """Tables from given n-grams (r, n) and their counts (r,), one pair of arrays per order.

    What is not listed has count 0, also if a longer n-gram contains it.
    """
    single = []
    for tokens, counts in rows:
        tokens = np.asarray(tokens, np.int64)
        _check_ids(tokens, vocab_size)
        node, grams = tokens[:, 0], []
        for m in range(1, tokens.shape[1]):
            keys, node = np.unique(node * vocab_size + tokens[:, m], return_inverse=True)
            last = m == tokens.shape[1] - 1
            grams.append((keys, _sums(node, counts, len(keys)) if last else np.zeros(len(keys))))
        single.append(_assemble(np.zeros(vocab_size), grams, vocab_size, ""))
    return merge(*single)


def merge(*tables: NGramTables) -> NGramTables:
    """The counts of all the tables together; the order of merging does not matter.

    Raises:
        ValueError: no tables, or vocabularies or tokenizers that differ.
    """
    kinds = {(t.vocab_size, t.tokenizer) for t in tables}
    if len(kinds) != 1:
        raise ValueError(
            f"merging needs tables of one tokenizer, got {len(kinds)}: count with the same one."
        )
    vocab_size, tokenizer = kinds.pop()
    numbers = [np.arange(vocab_size) for _ in tables]
    grams = []
    for depth in range(1, max(t.max_order for t in tables)):
        deep = [i for i, t in enumerate(tables) if t.max_order > depth]
        levels = [tables[i].levels[depth] for i in deep]
        keys = [
            numbers[i][tables[i].levels[depth - 1].parent] * vocab_size + level.token
            for i, level in zip(deep, levels, strict=True)
        ]
        unique, inverse = np.unique(np.concatenate(keys), return_inverse=True)
        counts = np.concatenate([np.asarray(level.count) for level in levels])
        grams.append((unique, _sums(inverse, counts, len(unique))))
        bounds = np.cumsum([len(k) for k in keys])[:-1]
        for i, part in zip(deep, np.split(inverse, bounds), strict=True):
            numbers[i] = part
    unigrams = functools.reduce(np.add, (np.asarray(t.levels[0].count, np.int64) for t in tables))
    return _assemble(unigrams, grams, vocab_size, tokenizer)


def _sums(groups: Int[np.ndarray, " n"], counts: np.ndarray, size: int) -> Int[np.ndarray, " size"]:
    # Sums of counts below 2**53 are exact in float64.
    return np.bincount(groups, weights=counts, minlength=size).astype(np.int64)


def _check_ids(ids: Int[np.ndarray, "..."], vocab_size: int) -> None:
    if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"counting needs token ids, all within 0..{vocab_size - 1}: give some, made with the "
            "model's tokenizer."
        )


def _assemble(
    unigrams: np.ndarray,
    grams: Sequence[tuple[np.ndarray, np.ndarray]],
    vocab_size: int,
    tokenizer: str,
) -> NGramTables:
    """Levels from each level's sorted keys, parent * vocab_size + token, and their counts."""
    token, count, levels = np.arange(vocab_size), unigrams, []
    for keys, counts in (*grams, (np.zeros(0, np.int64), np.zeros(0))):
        parent = keys // vocab_size
        nodes = len(token)
        levels.append(
            Level(
                token=_int32(token),
                count=_int32(count),
                total=_int32(_sums(parent, counts, nodes)),
                first=_int32(np.searchsorted(parent, np.arange(nodes + 1))),
            )
        )
        token, count = keys % vocab_size, counts
    return NGramTables(tuple(levels), vocab_size, tokenizer)


def _int32(values: np.ndarray) -> Int[np.ndarray, " n"]:
    if values.max(initial=0) > np.iinfo(np.int32).max:
        raise ValueError("a count or the number of n-grams exceeds 2**31 - 1: count less text.")
    return values.astype(np.int32)
