"""Tasks on paragraphs: infilling, retrieval by keywords or by position, and reordering.

These are the synthetic tasks of long-context training in Qwen2.5-1M (arXiv 2501.15383), which are
also usable for evaluation. The report gives the idea; format, wording and sizes are our own.
"""

import re
from typing import Literal

import numpy as np

from train.data.long_tasks.example import Encoder, Example, Space, drawn, place
from train.data.long_tasks.lengths import Draft, Fitted, fit
from train.data.long_tasks.text import Source

Sentinels = tuple[str, str, str]
SENTINELS: Sentinels = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""Prefix, suffix and middle, as Qwen2.5's tokenizer writes them; other tokenizers spell them."""

OPENING_WORDS = 5
_WORD = re.compile(r"[^\W\d_]{4,}")


def make_infilling(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    middle: int | None = None,
    sentinels: Sentinels = SENTINELS,
    task: str = "infilling",
) -> Example:
    """Prefix, suffix, then the middle to be written (the PSM order), of one piece of text.

    The piece is split at two random points. ``middle`` fixes the number of characters between them
    and ``depth`` where they are (a share of the piece), as evaluation with a short answer needs.

    Raises:
        ValueError: see :func:`train.data.long_tasks.lengths.fit`.
    """
    text = source.text
    start = int(rng.integers(len(text)))
    text = text[start:] + text[:start]
    first, second = np.sort(rng.random(2)).tolist()
    if middle is not None or depth is not None:
        first = drawn(rng, depth)
        second = first + (1 - first) * second

    def parts(size: int) -> tuple[str, str, str]:
        """Prefix, middle and suffix of ``size`` characters; a fixed middle comes on top."""
        begin = round(first * size)
        end = max(begin + 1, round(second * size)) if middle is None else begin + middle
        return text[:begin], text[begin:end], text[end : size + (middle or 0)]

    def build(size: int, filler: str) -> Draft:
        prefix, _, suffix = parts(size)
        head = f"{filler}{sentinels[0]}{prefix}"
        return Draft(f"{head}{sentinels[1]}{suffix}{sentinels[2]}", len(head))

    fitted = fit(build, tokens, encoder, len(text) - (middle or 0), least=1)
    prefix, answer, suffix = parts(fitted.items)
    where = len(prefix) / max(1, len(prefix) + len(suffix))
    return _example(task, fitted, answer, Space(), where, tokens, {"characters": len(answer)})


def make_keyword_retrieval(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    keywords: int = 3,
    task: str = "keyword-paragraph",
) -> Example:
    """Paragraphs, and the request to repeat the one that holds some keywords.

    Keywords are words that no other paragraph shown has; a paragraph with fewer of them than asked
    for is asked for with those that it has, and one without any is passed over.

    Raises:
        ValueError: see :func:`train.data.long_tasks.lengths.fit`; or no paragraph has a word of
            its own.
    """
    shown, depth = _rotation(rng, source), drawn(rng, depth)
    seed = int(rng.integers(2**31))

    def chosen(count: int) -> tuple[int, list[str]]:
        first = place(depth, count)
        for step in range(count):
            target = (first + step) % count
            words = _own_words(shown[:count], target)
            if words:
                order = np.random.default_rng([seed, target]).permutation(len(words)).tolist()
                return target, [words[i] for i in order[:keywords]]
        raise ValueError("no paragraph has a word of its own: give a more varied text.")

    def build(count: int, filler: str) -> Draft:
        target, words = chosen(count)
        tail = f"\n\nRepeat the paragraph with the words {', '.join(words)}.\n"
        return _draft(filler, shown[:count], target, tail)

    fitted = fit(build, tokens, encoder, len(shown), least=1)
    target, words = chosen(fitted.items)
    return _example(
        task, fitted, shown[target], Space(tuple(shown[: fitted.items])),
        target / fitted.items, tokens, {"keywords": words, "paragraph": target},
    )  # fmt: skip


def make_position_retrieval(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    relation: Literal["before", "after", "index"] | None = None,
    task: str = "position-paragraph",
) -> Example:
    """Paragraphs, and the request to repeat one by its place.

    Asked is for the paragraph right ``before`` or ``after`` one whose beginning is quoted, or for
    the one with an ``index``, counted from 1. Default: one of the three at random. The beginning is
    as many words as tell the paragraph from all others.

    Raises:
        ValueError: see :func:`train.data.long_tasks.lengths.fit`; ``before`` and ``after`` need two
            paragraphs.
    """
    shown, depth = _rotation(rng, source), drawn(rng, depth)
    relation = ("before", "after", "index")[int(rng.integers(3))] if relation is None else relation

    def chosen(count: int) -> tuple[int, str]:
        if relation == "index":
            target = place(depth, count)
            return target, f"Repeat paragraph number {target + 1}, counted from the start."
        # The first paragraph is after none and the last before none.
        target = place(depth, count - 1) + (1 if relation == "after" else 0)
        given = target - 1 if relation == "after" else target + 1
        opening = _opening(shown[:count], given)
        return target, f'Repeat the paragraph right {relation} the one that begins "{opening}".'

    def build(count: int, filler: str) -> Draft:
        target, request = chosen(count)
        return _draft(filler, shown[:count], target, f"\n\n{request}\n")

    fitted = fit(build, tokens, encoder, len(shown), least=1 if relation == "index" else 2)
    target, _ = chosen(fitted.items)
    return _example(
        task, fitted, shown[target], Space(tuple(shown[: fitted.items])),
        target / fitted.items, tokens, {"relation": relation, "paragraph": target},
    )  # fmt: skip


def make_reordering(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    answer: Literal["labels", "text"] = "labels",
    task: str = "reorder",
) -> Example:
    """Shuffled paragraphs with labels; the answer is their original order.

    ``labels`` asks for the labels in that order, ``text`` for the paragraphs themselves. Only text
    that goes from one thing to the next can be put in order; made-up text cannot.

    Raises:
        ValueError: see :func:`train.data.long_tasks.lengths.fit`; two paragraphs are needed.
    """
    start = int(rng.integers(len(source.paragraphs)))
    # In their own order, so no going on at the beginning after the last.
    ordered = source.paragraphs[start:]
    if len(ordered) < 2:
        ordered = source.paragraphs
    seed = int(rng.integers(2**31))
    wanted = "numbers" if answer == "labels" else "texts"

    def order(count: int) -> list[int]:
        return np.random.default_rng([seed, count]).permutation(count).tolist()

    def build(count: int, filler: str) -> Draft:
        body = "\n\n".join(f"({i}) {ordered[j]}" for i, j in enumerate(order(count), 1))
        tail = f"\n\nWrite the {wanted} of the paragraphs in their original order.\n"
        return Draft(filler + body + tail)

    fitted = fit(build, tokens, encoder, len(ordered), least=2)
    shuffled = order(fitted.items)
    labels = [str(shuffled.index(j) + 1) for j in range(fitted.items)]
    text = " ".join(labels) if answer == "labels" else "\n\n".join(ordered[: fitted.items])
    return Example(
        task=task,
        prompt=fitted.text,
        answer=text,
        answers=tuple(labels) if answer == "labels" else (text,),
        metric="order" if answer == "labels" else "presence",
        space=Space(tuple(sorted(labels, key=int))) if answer == "labels" else Space(),
        depth=None,
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=None,
        fields={"paragraphs": fitted.items},
    )


def _rotation(rng: np.random.Generator, source: Source) -> list[str]:
    """The different paragraphs of a source from a random one on, beginning again after the last."""
    start = int(rng.integers(len(source.paragraphs)))
    return list(dict.fromkeys([*source.paragraphs[start:], *source.paragraphs[:start]]))


def _own_words(paragraphs: list[str], target: int) -> list[str]:
    """Words of a paragraph that no other has, in the order of their first appearance."""
    others = {w for i, p in enumerate(paragraphs) if i != target for w in _WORD.findall(p.lower())}
    own = dict.fromkeys(w for w in _WORD.findall(paragraphs[target]) if w.lower() not in others)
    return list(own)


def _opening(paragraphs: list[str], target: int) -> str:
    """The first words of a paragraph, as many as no other begins with."""
    words = paragraphs[target].split(" ")
    for count in range(min(OPENING_WORDS, len(words)), len(words)):
        opening = " ".join(words[:count])
        if sum(p.startswith(opening) for p in paragraphs) == 1:
            return opening
    return paragraphs[target]


def _draft(filler: str, paragraphs: list[str], target: int, tail: str) -> Draft:
    # The filler is not a paragraph: it would shift what is counted from the start.
    head = f"{filler}The paragraphs:\n\n"
    before = "".join(f"{p}\n\n" for p in paragraphs[:target])
    rest = "\n\n".join(paragraphs[target:])
    return Draft(f"{head}{before}{rest}{tail}", len(head) + len(before))


def _example(
    task: str,
    fitted: Fitted,
    answer: str,
    space: Space,
    depth: float,
    tokens: int,
    fields: dict[str, object],
) -> Example:
    return Example(
        task=task,
        prompt=fitted.text,
        answer=answer,
        answers=(answer,),
        metric="presence",
        space=space,
        depth=depth,
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=fitted.answer_token,
        fields=fields,
    )
