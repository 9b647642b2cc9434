"""Retrieval from records: LongChat-Lines (as in Giraffe, arXiv 2308.10882), and a short form.

``n`` lines with different keys and uniform values, and a question about one of them. The format of
a line, the range of the values and the scoring are those of the published task; header and
question are our own words.
"""

import dataclasses

import numpy as np

from train.data.long_tasks.example import Encoder, Example, Space, drawn, place
from train.data.long_tasks.lengths import Draft, fit
from train.data.long_tasks.words import ADJECTIVES, NOUNS, count_made_up, made_up


@dataclasses.dataclass(frozen=True)
class LineStyle:
    """How records are written: templates with ``key`` and ``value``, and the values' range.

    ``lead`` is what the prompt ends with, so that a base model only has to go on; "" for a model
    that answers questions.
    """

    header: str
    line: str
    question: str
    lead: str
    values: range

    def count_keys(self) -> int:
        """How many different keys there are."""
        return len(ADJECTIVES) * len(NOUNS)

    def key(self, number: int) -> str:
        """The key of that number: an adjective and a noun."""
        adjective, noun = divmod(number, len(NOUNS))
        return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


@dataclasses.dataclass(frozen=True)
class ShortStyle(LineStyle):
    """Records with made-up words of two syllables as keys."""

    def count_keys(self) -> int:
        """How many different keys there are."""
        return count_made_up(2)

    def key(self, number: int) -> str:
        """The key of that number."""
        return made_up(number, 2)


LONGCHAT = LineStyle(
    header=(
        "Here is a record of many lines. Each line begins with its index and holds a number, its "
        "REGISTER_CONTENT. Remember the numbers: at the end you will be asked for one of them.\n"
    ),
    line="line {key}: REGISTER_CONTENT is <{value}>\n",
    question=(
        "The record ends here. What is the REGISTER_CONTENT in line {key}? I need the number.\n"
    ),
    lead="",
    values=range(1, 50001),
)
LONGCHAT_LEAD = dataclasses.replace(LONGCHAT, lead="line {key}: REGISTER_CONTENT is <")
"""The same with the beginning of the answer, for models that only continue text."""

SHORT = ShortStyle(
    header="Records:\n",
    line="{key}: {value}\n",
    question="Which number has {key}?\n",
    lead="{key}:",
    values=range(100, 1000),
)
"""For small models: about seven tokens a line, three digits."""


def draw_records(rng: np.random.Generator, style: LineStyle, count: int) -> list[tuple[str, int]]:
    """``count`` different keys with their values.

    Raises:
        ValueError: there are not so many keys.
    """
    if count > style.count_keys():
        raise ValueError(
            f"{count} records of {style.count_keys()} keys: ask for fewer, or shorter prompts."
        )
    keys = rng.choice(style.count_keys(), size=count, replace=False).tolist()
    values = rng.integers(style.values.start, style.values.stop, size=count).tolist()
    return [(style.key(k), v) for k, v in zip(keys, values, strict=True)]


def write_lines(style: LineStyle, records: list[tuple[str, int]]) -> list[str]:
    """The lines of some records."""
    return [style.line.format(key=key, value=value) for key, value in records]


def make_lines(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    depth: float | None = None,
    style: LineStyle = LONGCHAT,
    task: str = "lines",
) -> Example:
    """Records of ``tokens`` tokens, question included; the line asked for is at ``depth``.

    ``Example.depth`` is the index of the line over the number of lines.

    Raises:
        ValueError: see :func:`train.data.long_tasks.lengths.fit`.
    """
    # A line has more than three tokens: key, colon, value and line break.
    most = min(style.count_keys(), max(1, tokens // 3))
    records = draw_records(rng, style, most)
    lines = write_lines(style, records)
    depth = drawn(rng, depth)

    def build(n: int, filler: str) -> Draft:
        target = place(depth, n)
        start = filler + style.header
        before, after = "".join(lines[:target]), "".join(lines[target:n])
        tail = (style.question + style.lead).format(key=records[target][0])
        return Draft(start + before + after + tail, len(start + before))

    fitted = fit(build, tokens, encoder, most)
    target = place(depth, fitted.items)
    key, value = records[target]
    values = tuple(str(value) for _, value in records[: fitted.items])
    return Example(
        task=task,
        prompt=fitted.text,
        answer=str(value),
        answers=(str(value),),
        metric="first_number",
        space=Space(values),
        depth=target / fitted.items,
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=fitted.answer_token,
        fields={"key": key, "line": target, "lines": fitted.items},
    )
