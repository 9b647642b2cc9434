"""Text to hide things in: sentences and paragraphs of a given text, or made-up ones.

Made-up text is grammatical and says nothing; it holds no digits, and the same seed gives the same.
"""

import dataclasses
import functools
import re

import numpy as np

from train.data.long_tasks.words import ADJECTIVES, NOUNS, OPENINGS, PLACES, VERBS

_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[.!?;])[\"')\]”’]*\s+")
_LONGEST = 400
"""Characters of a sentence; what is longer (code, tables) is cut at line ends or spaces."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Paragraphs, each of one or more sentences, in their order."""

    paragraphs: tuple[str, ...]

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        """All sentences in order, white space made single."""
        return tuple(s for paragraph in self.paragraphs for s in split_sentences(paragraph))

    @functools.cached_property
    def text(self) -> str:
        """Everything, with a blank line between paragraphs."""
        return "\n\n".join(self.paragraphs)

    def run(self, start: int, count: int) -> list[str]:
        """``count`` sentences from number ``start`` on, going on at the beginning after the last.

        Raises:
            ValueError: more sentences than there are.
        """
        total = len(self.sentences)
        if count > total:
            raise ValueError(f"{count} sentences of a text with {total}: give a longer text.")
        return [self.sentences[(start + i) % total] for i in range(count)]


def read_source(text: str) -> Source:
    """The paragraphs of a text; blank lines separate them.

    Raises:
        ValueError: there is none.
    """
    pieces = (piece.strip() for piece in _PARAGRAPH.split(text.replace("\r\n", "\n")))
    paragraphs = tuple(piece for piece in pieces if piece)
    if not paragraphs:
        raise ValueError("the text is empty: give one with at least one paragraph.")
    return Source(paragraphs)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, white space made single; none of them is empty."""
    sentences = []
    for sentence in _SENTENCE.split(paragraph.strip()):
        for piece in _cut(sentence):
            words = " ".join(piece.split())
            if words:
                sentences.append(words)
    return sentences


def _cut(sentence: str) -> list[str]:
    if len(sentence) <= _LONGEST:
        return [sentence]
    if "\n" in sentence:
        return [piece for line in sentence.split("\n") for piece in _cut(line)]
    return [sentence[i : i + _LONGEST] for i in range(0, len(sentence), _LONGEST)]


def made_up_source(seed: int, sentences: int = 4096) -> Source:
    """Paragraphs of two to four made-up sentences, ``sentences`` in all."""
    rng = np.random.default_rng(seed)
    written = [made_up_sentence(rng) for _ in range(sentences)]
    paragraphs, start = [], 0
    while start < sentences:
        size = int(rng.integers(2, 5))
        paragraphs.append(" ".join(written[start : start + size]))
        start += size
    return Source(tuple(paragraphs))


def made_up_sentence(rng: np.random.Generator) -> str:
    """One sentence about two things and where a third one was."""

    def thing() -> str:
        return f"the {_pick(rng, ADJECTIVES)} {_pick(rng, NOUNS)}"

    core = f"{thing()} {_pick(rng, VERBS)} {thing()} {_pick(rng, PLACES)} {thing()}."
    if rng.random() < 0.5:
        return core[0].upper() + core[1:]
    return f"{_pick(rng, OPENINGS)}, {core}"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
