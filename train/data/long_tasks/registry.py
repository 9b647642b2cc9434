"""Every task by its name, with what it needs, and sets of examples with explicit seeds."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from train.data.long_tasks import lines, needles, numeric_qa, paragraphs, ruler
from train.data.long_tasks.example import Encoder, Example, Space
from train.data.long_tasks.qa_items import Item, cloze_items, fact_items
from train.data.long_tasks.text import Source

PARAGRAPH_CHARACTERS = (40, 240)
"""Of the paragraphs that are asked for: an answer must fit in the tokens of an output."""
_SPARE_CHARACTERS = 8
"""Characters of further text per token, for documents that are shorter than the prompt."""
_ITEMS_TRIED = 50


@dataclasses.dataclass(frozen=True)
class Materials:
    """What examples are made from: a text, and questions on documents (default: made-up facts)."""

    source: Source
    items: tuple[Item, ...] = ()
    seed: int = 0

    @functools.cached_property
    def questions(self) -> tuple[Item, ...]:
        """The given items, or made-up facts in the text."""
        rng = np.random.default_rng([self.seed, 1])
        return self.items or tuple(fact_items(rng, self.source))

    @functools.cached_property
    def numeric(self) -> tuple[Item, ...]:
        """The questions whose answer is a whole number.

        Raises:
            ValueError: there is none.
        """
        found = tuple(i for i in self.questions if i.answer.replace(",", "").isdigit())
        if not found:
            raise ValueError("no question has a number as its answer: give some that have.")
        return found

    @functools.cached_property
    def clozes(self) -> tuple[Item, ...]:
        """Numbers of the text with their sentence, as questions."""
        return tuple(cloze_items(np.random.default_rng([self.seed, 2]), self.source))

    @functools.cached_property
    def short_paragraphs(self) -> Source:
        """The paragraphs that an answer can hold.

        Raises:
            ValueError: there are fewer than two.
        """
        low, high = PARAGRAPH_CHARACTERS
        found = tuple(p for p in self.source.paragraphs if low <= len(p) <= high)
        if len(found) < 2:
            raise ValueError(
                f"the text has no two paragraphs of {low} to {high} characters: give another."
            )
        return Source(found)

    def spare(self, rng: np.random.Generator, tokens: int) -> str:
        """Some of the text, for documents that are shorter than a prompt."""
        text, size = self.source.text, _SPARE_CHARACTERS * tokens
        start = int(rng.integers(max(1, len(text) - size)))
        return text[start : start + size]


Make = Callable[[np.random.Generator, Encoder, int, float | None, Materials], Example]


@dataclasses.dataclass(frozen=True)
class Task:
    """How examples are made, and how many tokens an output may (and must at least) have.

    ``by_depth`` says whether the evidence has a place that can be chosen.
    """

    make: Make
    new_tokens: int
    least_tokens: int = 0
    by_depth: bool = True


def _lines(style: lines.LineStyle, task: str) -> Make:
    return lambda rng, encoder, tokens, depth, _: lines.make_lines(
        rng, encoder, tokens, depth, style, task
    )


def _passkey(digits: int, task: str) -> Make:
    return lambda rng, encoder, tokens, depth, data: needles.make_passkey(
        rng, encoder, tokens, data.source, depth, digits, task
    )


def _needles(task: str, **sizes: int) -> Make:
    return lambda rng, encoder, tokens, depth, data: needles.make_needles(
        rng, encoder, tokens, data.source, depth, task=task, **sizes
    )


def _variables(task: str, **sizes: int) -> Make:
    return lambda rng, encoder, tokens, depth, data: ruler.make_variables(
        rng, encoder, tokens, data.source, depth, task=task, **sizes
    )


def _paragraphs(make: Callable[..., Example]) -> Make:
    return lambda rng, encoder, tokens, depth, data: make(
        rng, encoder, tokens, data.short_paragraphs, depth
    )


def _place(
    rng: np.random.Generator, items: Sequence[Item], make: Callable[[Item], Example]
) -> Example:
    """An example of some item, passing over those whose sentence is too long for the prompt.

    Raises:
        Unplaceable: many items were.
    """
    for _ in range(_ITEMS_TRIED - 1):
        try:
            return make(items[int(rng.integers(len(items)))])
        except numeric_qa.Unplaceable:
            continue
    return make(items[int(rng.integers(len(items)))])


def _free_form(
    rng: np.random.Generator, encoder: Encoder, tokens: int, depth: float | None, data: Materials
) -> Example:
    where, asked = numeric_qa.variant(int(rng.integers(6)))
    answers = Space(tuple(item.answer for item in data.questions))
    spare = data.spare(rng, tokens)

    def make(item: Item) -> Example:
        return numeric_qa.make_free_form(
            rng, encoder, tokens, item, where, asked, spare, answers, depth
        )

    return _place(rng, data.questions, make)


def _altered(items: Callable[[Materials], tuple[Item, ...]], task: str) -> Make:
    def altered(
        rng: np.random.Generator,
        encoder: Encoder,
        tokens: int,
        depth: float | None,
        data: Materials,
    ) -> Example:
        where, asked = numeric_qa.variant(int(rng.integers(6)))
        spare = data.spare(rng, tokens)

        def make(item: Item) -> Example:
            return numeric_qa.make_altered(
                rng, encoder, tokens, item, where, asked, spare, depth, task
            )

        return _place(rng, items(data), make)

    return altered


TASKS: dict[str, Task] = {
    "lines": Task(_lines(lines.LONGCHAT, "lines"), 35, least_tokens=5),
    "lines-lead": Task(_lines(lines.LONGCHAT_LEAD, "lines-lead"), 12, least_tokens=5),
    "lines-short": Task(_lines(lines.SHORT, "lines-short"), 8, least_tokens=5),
    "passkey": Task(_passkey(5, "passkey"), 12),
    "passkey-short": Task(_passkey(3, "passkey-short"), 8),
    "needle": Task(_needles("needle"), 12),
    "multi-key": Task(_needles("multi-key", keys=4), 12),
    "multi-value": Task(_needles("multi-value", keys=4, values=3), 32),
    "variables": Task(_variables("variables", chains=2, hops=3), 32),
    "common-words": Task(
        lambda rng, encoder, tokens, depth, data: ruler.make_common_words(rng, encoder, tokens),
        24,
        by_depth=False,
    ),
    "free-form-qa": Task(_free_form, 50),
    "altered-qa": Task(_altered(lambda data: data.numeric, "altered-qa"), 50),
    "cloze": Task(_altered(lambda data: data.clozes, "cloze"), 50),
    "infilling": Task(
        lambda rng, encoder, tokens, depth, data: paragraphs.make_infilling(
            rng, encoder, tokens, data.source, depth, middle=60
        ),
        48,
    ),
    "keyword-paragraph": Task(_paragraphs(paragraphs.make_keyword_retrieval), 112),
    "position-paragraph": Task(_paragraphs(paragraphs.make_position_retrieval), 112),
    "reorder": Task(
        lambda rng, encoder, tokens, depth, data: paragraphs.make_reordering(
            rng, encoder, tokens, data.short_paragraphs
        ),
        48,
        by_depth=False,
    ),
}
"""All tasks. Names with ``-short`` suit small models; ``-lead`` suits models that only continue."""


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def make_examples(
    name: str,
    encoder: Encoder,
    tokens: int,
    depths: Sequence[float | None],
    seed: int,
    data: Materials,
) -> list[Example]:
    """One example of ``tokens`` prompt tokens for each depth (None: uniform).

    The same seed, name and number of tokens give the same examples, whatever else is asked for.

    Raises:
        ValueError: an unknown task, or a length that it cannot have.
    """
    task = find_task(name)
    kind = zlib.crc32(name.encode())
    return [
        task.make(np.random.default_rng([seed, kind, tokens, i]), encoder, tokens, depth, data)
        for i, depth in enumerate(depths)
    ]
