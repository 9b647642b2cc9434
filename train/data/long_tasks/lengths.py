"""Prompts of an exact number of tokens: bisection on the number of items, then filler words.

The result never exceeds the target. With tokenizers that have a token for every byte it is exact;
the filler stands at the very start of a prompt, where it is in nobody's way, and is no longer than
one item. Other tokenizers may leave the prompt up to :data:`TOLERANCE` tokens short.
"""

import dataclasses
import itertools
from collections.abc import Callable

from train.data.long_tasks.example import Encoder
from train.data.long_tasks.words import FILLER

TOLERANCE = 2
"""Tokens that a prompt may lack where no filler of exactly the right size exists."""

_ENDINGS = (".\n", "\n", ".\n\n", " -\n", " ...\n", " a\n", "!\n", " *\n", ".\n-\n", " so, on.\n")
_DOTS = tuple("." * count + "\n" for count in range(2, 12))
"""Tried last: with a token per character they are of any length up to that of the next word."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt, and the character at which the evidence for its answer begins (None: nowhere)."""

    text: str
    evidence: int | None = None


Build = Callable[[int, str], Draft]
"""``build(items, filler)``: the prompt with that many items, beginning with the filler. It must
give the same for the same arguments, and more items must not be fewer tokens."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A prompt of the right length: its number of items, its tokens, and where evidence begins."""

    items: int
    filler: str
    text: str
    prompt_tokens: int
    answer_token: int | None


def count_items(build: Build, tokens: int, encoder: Encoder, most: int, least: int = 1) -> int:
    """The most items with which the prompt, without filler, has at most ``tokens`` tokens.

    Args:
        most: items that there are.
        least: items that the task needs.

    Raises:
        ValueError: the shortest prompt is too long, or there are fewer items than needed.
    """

    def count(items: int) -> int:
        return len(encoder.encode(build(items, "").text))

    if most < least:
        raise ValueError(f"the task needs {least} items and the source has {most}: give more text.")
    shortest = count(least)
    if shortest > tokens:
        raise ValueError(
            f"{tokens} tokens are too few: the shortest prompt of this task has {shortest}; ask "
            "for a longer one."
        )
    return _largest(lambda n: count(n) <= tokens, least, most)


def fit(build: Build, tokens: int, encoder: Encoder, most: int, least: int = 1) -> Fitted:
    """The prompt with the most items that has at most ``tokens`` tokens, filled up to them.

    Raises:
        ValueError: see :func:`count_items`, or all items together are too short.
    """
    items = count_items(build, tokens, encoder, most, least)
    filler = _filler(lambda text: len(encoder.encode(build(items, text).text)), tokens)
    draft = build(items, filler)
    ids = encoder.encode(draft.text)
    if tokens - len(ids) > TOLERANCE:
        raise ValueError(
            f"the source has text for {len(ids)} tokens of {tokens}: give more text, or ask for a "
            "shorter prompt."
        )
    return Fitted(items, filler, draft.text, len(ids), _token_of(draft, ids, encoder))


def _largest(fits: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number that fits, knowing that ``low`` does: doubling, then bisection."""
    step, high = 1, low
    while high < most:
        high = min(low + step, most)
        if not fits(high):
            break
        low, step = high, 2 * step
    else:
        return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _filler(count: Callable[[str], int], tokens: int) -> str:
    """Filler after which the prompt has ``tokens`` tokens, or as many as can be."""
    gap = tokens - count("")
    if gap == 0:
        return ""
    words = _largest(lambda n: count(_words(n)) <= tokens, 0, min(gap, _MOST_FILLER))
    best, best_count = "", tokens - gap
    for fewer, ending in (*itertools.product(range(4), _ENDINGS), *((0, x) for x in _DOTS)):
        if fewer > words:
            continue
        text = _words(words - fewer, ending)
        size = count(text)
        if best_count < size <= tokens:
            best, best_count = text, size
        if size == tokens:
            break
    return best


_MOST_FILLER = 256


def _words(number: int, ending: str = ".\n") -> str:
    if number == 0:
        return "" if ending == ".\n" else ending.lstrip(" ")
    return " ".join(FILLER[i % len(FILLER)] for i in range(number)).capitalize() + ending


def _token_of(draft: Draft, ids: list[int], encoder: Encoder) -> int | None:
    """The first token that is not decided by the text before the evidence."""
    if draft.evidence is None:
        return None
    before = encoder.encode(draft.text[: draft.evidence])
    pairs = enumerate(zip(before, ids, strict=False))
    # Where the text before is all of a prefix of the ids, the evidence begins right after it.
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(ids) - 1))
