"""Questions about documents: what an item is, and items from files, made-up facts and real text."""

import dataclasses
import json
import pathlib
import re

import numpy as np

from train.data.long_tasks.text import Source
from train.data.long_tasks.words import NOUNS, count_made_up, made_up

NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)*|\d+(?:\.\d+)*")
"""A whole number token: with thousands separators, with decimals, or a dotted version."""

BLANK = "____"


@dataclasses.dataclass(frozen=True)
class Item:
    """A document, a question about it, and the answer: a span of the document.

    ``start`` is the character of the document at which the answer stands; None: its first one.
    """

    document: str
    question: str
    answer: str
    start: int | None = None

    def span(self) -> int:
        """Where the answer stands.

        Raises:
            ValueError: it does not stand there.
        """
        start = self.document.find(self.answer) if self.start is None else self.start
        if start < 0 or not self.document.startswith(self.answer, start) or not self.answer:
            raise ValueError(
                f"the answer {self.answer!r} is not in its document: give an item whose answer is "
                "copied from it."
            )
        return start


def whole_numbers(text: str, digits: str) -> list[tuple[int, int]]:
    """Spans of ``text`` that are this whole number, with thousands separators or without."""
    spans = []
    for match in NUMBER.finditer(text):
        start, end = match.span()
        inside_word = (start and (text[start - 1].isalpha() or text[start - 1] == "_")) or (
            end < len(text) and (text[end].isalpha() or text[end] == "_")
        )
        if match[0].replace(",", "") == digits and not inside_word:
            spans.append((start, end))
    return spans


def load_items(path: str | pathlib.Path) -> list[Item]:
    """Items of a JSON-lines file with the string fields document, question and answer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no such record, or its answer is not in its document.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: name a JSON-lines file of questions.")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            item = Item(str(record["document"]), str(record["question"]), str(record["answer"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}, needs the fields document, question and answer: add them."
            ) from error
        item.span()
        items.append(item)
    return items


def fact_items(rng: np.random.Generator, source: Source, count: int = 64) -> list[Item]:
    """Made-up facts within real or made-up text; every other answer is a number.

    A fact is one sentence between others of the source: who built a thing, or in which year.
    """
    names = rng.choice(count_made_up(2), size=2 * count, replace=False).tolist()
    items = []
    for i in range(count):
        place, person = (made_up(n).capitalize() for n in names[2 * i : 2 * i + 2])
        thing = f"the {NOUNS[int(rng.integers(len(NOUNS)))]} of {place}"
        year = int(rng.integers(1100, 2000))
        if i % 2:
            question, answer = f"In which year was {thing} finished?", str(year)
            fact = f"{thing[0].upper()}{thing[1:]} was finished in {year}."
        else:
            question, answer = f"Who built {thing}?", person
            fact = f"{thing[0].upper()}{thing[1:]} was built by {person}."
        around = source.run(
            int(rng.integers(len(source.sentences))), min(12, len(source.sentences))
        )
        middle = len(around) // 2
        document = " ".join([*around[:middle], fact, *around[middle:]])
        items.append(Item(document, question, answer, document.find(fact) + fact.find(answer)))
    return items


def cloze_items(rng: np.random.Generator, source: Source, count: int = 64) -> list[Item]:
    """Sentences of real text with a number of two to four digits, which is asked for as a blank.

    Only numbers that stand once in their sentence are used; the document is the sentence with up
    to twelve others on each side.

    Raises:
        ValueError: no sentence of the text has such a number.
    """
    found = []
    for index, sentence in enumerate(source.sentences):
        for match in NUMBER.finditer(sentence):
            digits = match[0]
            once = digits.isdigit() and whole_numbers(sentence, digits) == [match.span()]
            if once and 2 <= len(digits) <= 4 and digits[0] != "0" and len(sentence.split()) >= 6:
                found.append((index, match.start(), digits))
    if not found:
        raise ValueError("no sentence of the text has a number of 2 to 4 digits: give another.")
    items = []
    for choice in rng.permutation(len(found))[:count].tolist():
        index, at, digits = found[choice]
        sentence = source.sentences[index]
        before = list(source.sentences[max(0, index - 12) : index])
        after = list(source.sentences[index + 1 : index + 13])
        document = " ".join([*before, sentence, *after])
        blank = sentence[:at] + BLANK + sentence[at + len(digits) :]
        question = f'Which number is missing here? "{blank}"'
        start = sum(len(s) + 1 for s in before) + at
        items.append(Item(document, question, digits, start))
    return items
