"""Needles in a haystack: one pass key, keyed numbers, many keys, several values of one key.

The families of tasks are those of the passkey test (arXiv 2305.16300) and of RULER (arXiv
2404.06654); all sentences are our own. Needles stand between sentences of the haystack.
"""

import numpy as np

from train.data.long_tasks.example import Encoder, Example, Space, drawn, place
from train.data.long_tasks.lengths import Draft, fit
from train.data.long_tasks.text import Source
from train.data.long_tasks.words import count_made_up, made_up

_PASSKEY = "The pass key is {value}. Keep it in mind: {value} is the pass key."
_PASSKEY_HEADER = "A pass key is hidden in the text below. Find it and remember it.\n\n"
_PASSKEY_TAIL = "\n\nWhat is the pass key?\nThe pass key is"
_NEEDLE = "The number of {key} is {value}."
_HEADER = "Numbers are hidden in the text below. Remember them.\n\n"
_TAIL = "\n\nWhat is the number of {key}?\nThe number of {key} is"
_TAIL_ALL = "\n\nWhat are all {count} numbers of {key}?\nThe numbers of {key} are"


def insert(sentences: list[str], needles: list[tuple[int, str]]) -> tuple[str, list[int]]:
    """The sentences with needles in the gaps (gap ``i`` is before sentence ``i``), in this order.

    Returns:
        The text, and the character at which each needle begins.
    """
    parts: list[str] = []
    length, starts, done = 0, [0] * len(needles), 0
    order = sorted(range(len(needles)), key=lambda i: needles[i][0])
    for gap in range(len(sentences) + 1):
        while done < len(order) and needles[order[done]][0] == gap:
            starts[order[done]] = length
            parts.append(needles[order[done]][1])
            length += len(parts[-1]) + 1
            done += 1
        if gap < len(sentences):
            parts.append(sentences[gap])
            length += len(parts[-1]) + 1
    return " ".join(parts), starts


def digits_range(digits: int) -> range:
    """The numbers of that many digits, without a leading zero."""
    return range(10 ** (digits - 1), 10**digits)


def make_passkey(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    digits: int = 5,
    task: str = "passkey",
) -> Example:
    """One pass key of ``digits`` digits in a haystack."""
    values = digits_range(digits)
    value = int(rng.integers(values.start, values.stop))
    return _hide(
        rng, encoder, tokens, source, drawn(rng, depth), task,
        needles=[_PASSKEY.format(value=value)],
        header=_PASSKEY_HEADER, tail=_PASSKEY_TAIL, answers=(str(value),),
        space=Space(values), fields={"digits": digits},
    )  # fmt: skip


def make_needles(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float | None = None,
    digits: int = 4,
    keys: int = 1,
    values: int = 1,
    task: str = "needle",
) -> Example:
    """``keys`` keyed needles, of which the one at ``depth`` is asked for, with ``values`` values.

    Every other needle, further values of the same key among them, is anywhere. With several values
    the score is the share of them that is recalled. Values differ from each other.

    Raises:
        ValueError: no key or value at all, or more than there are; see also
            :func:`train.data.long_tasks.lengths.fit`.
    """
    numbers = digits_range(digits)
    if not 1 <= keys <= count_made_up(2) or values < 1 or keys + values - 1 > len(numbers):
        raise ValueError(
            f"{keys} keys and {values} values of {digits} digits: ask for at least one of each, "
            "and use more digits for many."
        )
    names = [made_up(int(i)).capitalize() for i in rng.choice(count_made_up(2), keys, False)]
    drawn_values = (numbers.start + rng.choice(len(numbers), keys + values - 1, False)).tolist()
    texts = [str(v) for v in drawn_values]
    owners = [names[0]] * values + names[1:]
    tail = (_TAIL if values == 1 else _TAIL_ALL).format(key=names[0], count=values)
    return _hide(
        rng, encoder, tokens, source, drawn(rng, depth), task,
        needles=[_NEEDLE.format(key=k, value=v) for k, v in zip(owners, texts, strict=True)],
        header=_HEADER, tail=tail, answers=tuple(texts[:values]),
        # With nothing but the right values in the prompt a guesser has to invent numbers.
        space=Space(tuple(texts) if keys > 1 else numbers),
        fields={"key": names[0], "keys": keys, "values": values, "digits": digits},
    )  # fmt: skip


def _hide(
    rng: np.random.Generator,
    encoder: Encoder,
    tokens: int,
    source: Source,
    depth: float,
    task: str,
    *,
    needles: list[str],
    header: str,
    tail: str,
    answers: tuple[str, ...],
    space: Space,
    fields: dict[str, object],
) -> Example:
    """An example whose first needle stands at ``depth`` and the others anywhere."""
    start = int(rng.integers(len(source.sentences)))
    others = rng.random(len(needles) - 1).tolist()

    def build(count: int, filler: str) -> Draft:
        gaps = [place(d, count + 1) for d in (depth, *others)]
        text, starts = insert(source.run(start, count), list(zip(gaps, needles, strict=True)))
        head = filler + header
        return Draft(head + text + tail, len(head) + starts[0])

    fitted = fit(build, tokens, encoder, len(source.sentences), least=0)
    gap = place(depth, fitted.items + 1)
    return Example(
        task=task,
        prompt=fitted.text,
        answer=", ".join(answers),
        answers=answers,
        metric="first_number" if len(answers) == 1 else "recall",
        space=space,
        depth=gap / (fitted.items + 1),
        target_tokens=tokens,
        prompt_tokens=fitted.prompt_tokens,
        answer_token=fitted.answer_token,
        fields={**fields, "gap": gap, "sentences": fitted.items},
    )
