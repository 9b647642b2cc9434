"""Which parts of a long text a drafter reads: cut into chunks, scored, put back in their order.

On the host, once per request.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

SEPARATORS = ("\n\n", "\n", ". ", ", ", " ", "")
"""Paragraph, line, sentence, clause, word, character."""
_WORD = re.compile(r"\w+")

Count = Callable[[str], int]
"""How many tokens a text has."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a text and the index of its first character."""

    text: str
    start: int


def split_text(
    text: str, size: int, count: Count, separators: Sequence[str] = SEPARATORS
) -> list[Chunk]:
    """Chunks of at most ``size`` tokens that follow each other without gap or overlap.

    A text too long is cut behind every occurrence of the first separator, pieces still too long at
    the next one, and neighbours are joined again as long as they fit.

    Raises:
        ValueError: ``size`` below 1, or a single character of more than ``size`` tokens.
    """
    if size < 1:
        raise ValueError(f"chunks need at least one token, got size {size}.")
    chunks, start = [], 0
    for piece in _joined(_pieces(text, size, count, separators), size, count):
        chunks.append(Chunk(piece, start))
        start += len(piece)
    return chunks


def _pieces(text: str, size: int, count: Count, separators: Sequence[str]) -> list[str]:
    if not text or count(text) <= size:
        return [text] if text else []
    if not separators:
        raise ValueError(f"character {text!r} has more than {size} tokens: use larger chunks.")
    first, *rest = separators
    parts = list(text) if first == "" else re.split(f"(?<={re.escape(first)})", text)
    pieces = [piece for part in parts for piece in _pieces(part, size, count, rest)]
    return _joined(pieces, size, count)


def _joined(pieces: Sequence[str], size: int, count: Count) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and count(joined[-1] + piece) <= size:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@runtime_checkable
class Retriever(Protocol):
    """How well chunks answer a query. ``threshold`` is the score below which none counts."""

    @property
    def threshold(self) -> float:
        """The least score of a chunk that is of use."""
        ...

    def scores(self, chunks: Sequence[str], query: str) -> np.ndarray:
        """One score per chunk, higher for better."""
        ...


@dataclasses.dataclass(frozen=True)
class BM25:
    """Okapi BM25 over lower-case words; a chunk that shares no word with the query scores 0."""

    k1: float = 1.5
    b: float = 0.75
    threshold: float = 1e-9

    def scores(self, chunks: Sequence[str], query: str) -> np.ndarray:
        """sum over query words of idf tf (k1 + 1) / (tf + k1 (1 - b + b size / mean size))."""
        words = [_WORD.findall(chunk.lower()) for chunk in chunks]
        counts = [collections.Counter(w) for w in words]
        sizes = np.array([len(w) for w in words], np.float64)
        norm = self.k1 * (1 - self.b + self.b * sizes / max(sizes.mean(), 1e-9))
        total = np.zeros(len(chunks))
        for word in set(_WORD.findall(query.lower())):
            tf = np.array([c[word] for c in counts], np.float64)
            found = int((tf > 0).sum())
            idf = math.log(1 + (len(chunks) - found + 0.5) / (found + 0.5))
            total += idf * tf * (self.k1 + 1) / (tf + norm)
        return total


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Cosine similarity of vectors that ``encode`` gives for texts; 0.3 is the authors' bound."""

    encode: Callable[[Sequence[str]], np.ndarray]
    threshold: float = 0.3

    def scores(self, chunks: Sequence[str], query: str) -> np.ndarray:
        """Cosines, in [-1, 1]."""
        vectors = np.asarray(self.encode([*chunks, query]), np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[:-1] @ vectors[-1]


def choose_chunks(
    scores: np.ndarray, chunks: Sequence[Chunk], count: int, threshold: float
) -> list[Chunk]:
    """The best ``count`` chunks of at least ``threshold``, each text once, in the text's order."""
    best = np.argsort(-scores, kind="stable")
    chosen: dict[str, Chunk] = {}
    for i in best[scores[best] >= threshold].tolist():
        if len(chosen) == count:
            break
        chosen.setdefault(chunks[i].text, chunks[i])
    return sorted(chosen.values(), key=lambda chunk: chunk.start)


def context_budget(tokens: int, shortest: int = 4096, factor: float = 24.0) -> int:
    """Most tokens of a retrieved context: a ``factor``-th of the text, at least ``shortest``."""
    return min(tokens, max(shortest, int(tokens / factor)))


def retrieve(
    text: str,
    query: str,
    retriever: Retriever,
    count: Count,
    size: int = 512,
    budget: int | None = None,
) -> str:
    """The retrieved context: the best chunks of ``text`` in their order, joined by blank lines.

    Args:
        count: how many tokens a text has, by the drafter's tokenizer.
        size: most tokens of a chunk.
        budget: most tokens of all chunks together, default :func:`context_budget`.

    Raises:
        ValueError: an empty text, or no chunk of use for the query.
    """
    if not text.strip():
        raise ValueError(
            "there is no context to retrieve from: give the drafter the prompt itself."
        )
    budget = context_budget(count(text)) if budget is None else budget
    chunks = split_text(text, size, count)
    scores = retriever.scores([chunk.text for chunk in chunks], query)
    chosen = choose_chunks(scores, chunks, max(1, budget // size), retriever.threshold)
    if not chosen:
        raise ValueError(
            f"no chunk of the context reaches a score of {retriever.threshold:g} for the query: "
            "lower the retriever's threshold or let the drafter read the prompt itself."
        )
    return "\n\n".join(chunk.text.strip("\n") for chunk in chosen)
