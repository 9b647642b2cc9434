"""FreeFormQA and AlteredNumericQA (Giraffe, arXiv 2308.10882) from documents with questions.

A document is cut to a number of tokens so that the answer stands in its first tenth, its last one,
or anywhere in between; the question stands before or after it. In the altered form the number that
answers is replaced everywhere, so that recalling it from training gives the wrong answer.

Ours: other sentences that hold the answer are left out, so that the location means something; a
document that is too short goes on with its own text from the other side and then with a spare one;
prompts have exactly the length asked for. The wording is our own.
"""

import dataclasses
import re
from typing import Literal

import numpy as np

from train.data.long_tasks.example import Encoder, Example, Space
from train.data.long_tasks.lengths import Draft, fit
from train.data.long_tasks.qa_items import Item, whole_numbers
from train.data.long_tasks.text import split_sentences

AnswerLocation = Literal["start", "random", "end"]
QuestionLocation = Literal["end", "start"]

ANSWER_LOCATIONS: tuple[AnswerLocation, ...] = ("start", "random", "end")
QUESTION_LOCATIONS: tuple[QuestionLocation, ...] = ("end", "start")
RANGES = {"start": (0.0, 0.1), "random": (0.1, 0.9), "end": (0.9, 1.0)}
"""Where the answer begins, as a share of the document's characters."""


class Unplaceable(ValueError):
    """The prompt is too short to hold the answer's sentence where it is asked for."""


_SPLICE = "\n\n"
_TRIES = 24


def variant(row: int) -> tuple[AnswerLocation, QuestionLocation]:
    """Locations of row number ``row`` of a set, whose items have six rows each in a fixed order."""
    return ANSWER_LOCATIONS[(row % 6) // 2], QUESTION_LOCATIONS[row % 2]


def location(share: float) -> AnswerLocation:
    """Which of the three a place of the document is."""
    return "start" if share < 0.1 else "end" if share > 0.9 else "random"


def make_free_form(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    item: Item,
    answer_location: AnswerLocation = "random",
    question_location: QuestionLocation = "end",
    spare: str = "",
    space: Space | None = None,
    depth: float | None = None,
    task: str = "free-form-qa",
) -> Example:
    """A question on a document of which ``tokens`` tokens are left, question included.

    Args:
        answer_location: the tenth of the document in which the answer begins.
        question_location: whether the question comes before or after the document.
        spare: text that goes on where the document is too short.
        space: what chance draws from; default nothing.
        depth: a share of the document at which the answer shall begin, as nearly as its sentence
            allows, in place of ``answer_location``.

    Raises:
        Unplaceable: the length is too small to put the answer there.
        ValueError: the answer is not in the document, or there is too little text.
    """
    window = _Window.of(item, spare)
    for _ in range(_TRIES):
        share = float(rng.uniform(*RANGES[answer_location])) if depth is None else depth

        def build(size: int, filler: str, share: float = share) -> Draft:
            text, at = window.cut(size, share)
            if question_location == "start":
                head = f"{filler}Question: {item.question}\n\n"
                return Draft(f"{head}{text}\n\nAnswer:", len(head) + at)
            tail = f"\n\nQuestion: {item.question}\nAnswer:"
            return Draft(f"{filler}{text}{tail}", len(filler) + at)

        fitted = fit(build, tokens, encoder, window.size, least=0)
        text, at = window.cut(fitted.items, share)
        where = at / len(text)
        if depth is None and location(where) != answer_location:
            continue
        return Example(
            task=task,
            prompt=fitted.text,
            answer=item.answer,
            answers=(item.answer,),
            metric="presence",
            space=Space() if space is None else space,
            depth=where,
            target_tokens=tokens,
            prompt_tokens=fitted.prompt_tokens,
            answer_token=fitted.answer_token,
            fields={
                "question": item.question,
                "document": text,
                "answer_location": location(where),
                "question_location": question_location,
            },
        )
    raise Unplaceable(
        f"{tokens} tokens cannot hold the answer's sentence at the {answer_location} of the "
        "document: ask for a longer prompt."
    )


@dataclasses.dataclass(frozen=True)
class _Window:
    """The answer's sentence, and the text before and after it that it may be shown with."""

    before: str
    sentence: str
    after: str
    spare: str
    offset: int  # of the answer in its sentence

    @classmethod
    def of(cls, item: Item, spare: str) -> "_Window":
        start = item.span()
        document = item.document
        begin = max((m.end() for m in _ENDS.finditer(document, 0, start)), default=0)
        # From the answer's last character on, so that a full stop inside it does not end it.
        end = _ENDS.search(document, start + len(item.answer) - 1)
        stop = len(document) if end is None else end.end()
        sentence = document[begin:stop].rstrip()

        def without(text: str) -> str:
            if item.answer not in text:
                return " ".join(text.split())
            return " ".join(s for s in split_sentences(text) if item.answer not in s)

        return cls(
            without(document[:begin]), sentence, without(document[stop:]), without(spare),
            start - begin,
        )  # fmt: skip

    @property
    def size(self) -> int:
        """Characters there are besides the sentence."""
        return len(self.before) + len(self.after) + len(self.spare)

    def cut(self, size: int, share: float) -> tuple[str, int]:
        """About ``size`` characters around the sentence, the answer at ``share`` of all of it.

        Returns:
            The text, and the character at which the answer begins.
        """
        total = size + len(self.sentence)
        left = min(size, max(0, round(share * total) - self.offset))
        right = size - left
        spare, extra = self.spare, ["", ""]
        lack_left, lack_right = left - len(self.before), right - len(self.after)
        if lack_left > 0:  # what is left over at the far end of the other side comes first
            spliced, spare = _take(self.after[right:] if lack_right < 0 else "", spare, lack_left)
            extra[0] = spliced + _SPLICE
        if lack_right > 0:
            over = self.before[: len(self.before) - left] if lack_left < 0 else ""
            extra[1] = _SPLICE + _take(over, spare, lack_right)[0]
        head = extra[0] + (self.before[-left:] if left else "")
        tail = self.after[:right] + extra[1]
        head = _from_word(head, whole=left >= len(self.before))
        tail = _to_word(tail, whole=right >= len(self.after) and lack_right <= 0)
        joined = [part for part in (head, self.sentence, tail) if part]
        text = " ".join(joined)
        return text, (len(head) + 1 if head else 0) + self.offset


_ENDS = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+|\n\s*\n")


def _take(first: str, spare: str, count: int) -> tuple[str, str]:
    """``count`` characters of a text and then of the spare one; also what is left of that."""
    first = _from_word(first, whole=not first)
    more = max(0, count - len(first))
    return (first[:count] + " " + spare[:more]).strip(), spare[more:]


def _from_word(text: str, whole: bool) -> str:
    """The text from its first whole word on."""
    return text.strip() if whole or " " not in text else text[text.index(" ") :].strip()


def _to_word(text: str, whole: bool) -> str:
    """The text up to its last whole word."""
    return text.strip() if whole or " " not in text else text[: text.rindex(" ")].strip()


def alter_item(rng: np.random.Generator, item: Item) -> tuple[Item, Space]:
    """The item with another number as its answer, in document, question and answer.

    Years (1000 to 2100) move by at most ten; other numbers keep their number of digits. Every whole
    occurrence is replaced, also one with thousands separators; longer numbers that contain the
    digits, decimals and words like "1990s" are left alone.

    Returns:
        The altered item, and the numbers it was drawn from.

    Raises:
        ValueError: the answer is not one whole number.
    """
    digits = item.answer.replace(",", "")
    if not digits.isdigit() or whole_numbers(item.answer, digits) != [(0, len(item.answer))]:
        raise ValueError(f"the answer {item.answer!r} is not a whole number: alter only numbers.")
    space = alternatives(item.answer)
    new = item.answer
    while new == item.answer:
        new = space.draw(rng, 1)[0]
    new = new.replace(",", "")
    starts = [start for start, _ in whole_numbers(item.document, digits)]
    if not starts or item.start not in (None, *starts):
        raise ValueError(f"{item.answer!r} is no whole number of its document: correct the item.")
    start = starts[0] if item.start is None else item.start
    altered = Item(
        document=_replace(item.document, digits, new),
        question=_replace(item.question, digits, new),
        answer=_replace(item.answer, digits, new),
        start=len(_replace(item.document[:start], digits, new)),
    )
    altered.span()
    return altered, space


def alternatives(answer: str) -> Space:
    """The numbers that may take the place of a number: see :func:`alter_item`.

    Numbers of more than four digits are a range, in which the old one is left out by drawing again.
    """
    digits = answer.replace(",", "")
    value = int(digits)
    if len(digits) == 4 and 1000 <= value <= 2100:
        numbers = range(value - 10, value + 11)
    else:
        numbers = range(10 ** (len(digits) - 1), 10 ** len(digits))
    if len(digits) > 4:
        return Space(numbers)
    others = (v for v in numbers if v != value and len(str(v)) == len(digits))
    return Space(tuple(f"{v:,}" if "," in answer else str(v) for v in others))


def _replace(text: str, digits: str, new: str) -> str:
    """The text with every whole occurrence of a number replaced, in the style of each."""
    parts, last = [], 0
    for start, end in whole_numbers(text, digits):
        separated = "," in text[start:end]
        parts += [text[last:start], f"{int(new):,}" if separated else new]
        last = end
    return "".join([*parts, text[last:]])


def make_altered(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    item: Item,
    answer_location: AnswerLocation = "random",
    question_location: QuestionLocation = "end",
    spare: str = "",
    depth: float | None = None,
    task: str = "altered-qa",
) -> Example:
    """As :func:`make_free_form`, on the altered item; the spare text is altered with it."""
    altered, space = alter_item(rng, item)
    digits, new = item.answer.replace(",", ""), altered.answer.replace(",", "")
    example = make_free_form(
        rng, encoder, tokens, altered, answer_location, question_location,
        _replace(spare, digits, new), space, depth, task,
    )  # fmt: skip
    return dataclasses.replace(example, fields={**example.fields, "old": item.answer})
