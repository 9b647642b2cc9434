"""Prompts for a model to continue: pieces of a corpus, or the lines of JSON files.

A source is ``python_stdlib``, ``python_packages``, ``text:PATH`` (pieces of whole documents, from
the corpus' own splits) or ``FILE.jsonl:FIELD`` (``.jsonl.gz`` too; one prompt per line; one line in
ten, by the hash of its prompt, is the test split). ``FILE.jsonl:FIELD[KEY=VALUE]`` takes the lines
whose KEY is VALUE, such as one category of a benchmark.
"""

import gzip
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from models.tokenizer import Tokenizer
from train.data.corpus import load_corpus

Split = Literal["train", "test"]
TEST_EVERY = 10
"""One JSON line in so many is of the test split."""
_JSON_LINES = re.compile(r"(.*\.jsonl(?:\.gz)?):([^:\[\]]*)(?:\[([^=]+)=(.*)\])?")
_TRIES = 200
"""Places of a corpus that may be too short in a row before it counts as exhausted."""


def load_prompts(
    sources: Sequence[str],
    split: Split,
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int,
    chat: bool = False,
) -> list[list[int]]:
    """``count`` prompts, taken from the sources in turn; one that has no more is passed over.

    Args:
        length: tokens of a piece of a corpus, and the most of a line. Longer lines are left out,
            since a cut question asks nothing.
        seed: chooses places and lines.
        chat: lines are a user's turn in the model's chat template. Pieces of a corpus never are.

    Raises:
        ValueError: an unknown source, a line without its field, or fewer prompts than asked for.
        FileNotFoundError: a missing file.
    """
    each = [
        _read(source, split, tokenizer, length, np.random.default_rng([seed, number]), chat)
        for number, source in enumerate(sources)
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*each))
    prompts = list(itertools.islice((p for p in turns if p is not None), count))
    if len(prompts) < count:
        raise ValueError(
            f"{', '.join(sources)} gave {len(prompts)} {split} prompts of {length} tokens, {count} "
            "are asked for: add a source, ask for fewer, or allow another length."
        )
    return prompts


def _read(
    source: str,
    split: Split,
    tokenizer: Tokenizer,
    length: int,
    rng: np.random.Generator,
    chat: bool,
) -> Iterator[list[int]]:
    if found := _JSON_LINES.fullmatch(source):
        path, field, key, value = found.groups()
        wanted = None if key is None else (key, value)
        lines = _lines(pathlib.Path(path), field, wanted, split)
        return _short_prompts(lines, tokenizer, length, rng, chat)
    if source.endswith((".jsonl", ".jsonl.gz")) and not source.startswith("text:"):
        raise ValueError(f"which field of {source} holds the prompt? Name it as {source}:FIELD.")
    texts = [document.text for document in load_corpus(source, split)]
    return corpus_pieces(texts, tokenizer, length, rng)


def corpus_pieces(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Pieces of ``length`` tokens without end, each place of the texts about equally likely.

    Ends after many places in a row with fewer tokens than that until the text's end.
    """
    sizes = np.array([len(text) for text in texts], np.float64)
    if not sizes.any():
        return
    shares = sizes / sizes.sum()
    missed = 0
    while missed < _TRIES:
        text = texts[int(rng.choice(len(texts), p=shares))]
        start = int(rng.integers(len(text)))
        # Enough characters for any tokenizer that is not much coarser than words; the last token
        # of a cut text may be a part of one, so one more than asked for must be there.
        piece = text[start : start + 16 * (length + 1)]
        ids = tokenizer.encode(piece)
        if len(ids) > length:
            missed = 0
            yield ids[:length]
        else:
            missed += 1


def _lines(
    path: pathlib.Path, field: str, wanted: tuple[str, str] | None, split: Split
) -> list[str]:
    """The prompts of a split, of the lines that have the ``wanted`` value of a key."""
    texts = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number},"
            if wanted is not None and str(_value(line, wanted[0], where)) != wanted[1]:
                continue
            value = _value(line, field, where)
            # A conversation is asked its first turn.
            text = str(value[0] if isinstance(value, list) else value)
            if _is_test(text) == (split == "test"):
                texts.append(text)
    return texts


def _value(line: str, field: str, where: str) -> Any:
    try:
        return json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} has no field {field!r}: name one that every line has."
        ) from error


def _short_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, rng: np.random.Generator, chat: bool
) -> Iterator[list[int]]:
    for i in rng.permutation(len(texts)).tolist():
        ids = tokenizer.encode_prompt(texts[int(i)], chat)
        if 0 < len(ids) <= length:
            yield ids


def _is_test(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % TEST_EVERY == 0
