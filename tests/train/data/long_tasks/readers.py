"""Readers that answer from the prompt alone, by regular expressions: what a perfect model says."""

import re
from collections import Counter

from train.data.long_tasks.example import Example


def read(example: Example) -> str:
    """The output of the reader of the example's task, from its prompt and its name only."""
    return READERS[example.task](example.prompt)


def one(pattern: str, text: str) -> str:
    """The only match of a pattern."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{len(found)} matches of {pattern}"
    return found[0]


def lines(prompt: str) -> str:
    key = one(r"in line (\S+)\?", prompt)
    return f"<{one(rf'line {key}: REGISTER_CONTENT is <([0-9]+)>', prompt)}>"


def lines_short(prompt: str) -> str:
    key = one(r"number has (\w+)\?", prompt)
    return " " + one(rf"(?m)^{key}: (\d+)$", prompt)


def passkey(prompt: str) -> str:
    return one(r"The pass key is (\d+)\.", prompt)


def needle(prompt: str) -> str:
    key = one(r"What (?:is|are) .*of (\w+)\?", prompt)
    return " ".join(re.findall(rf"The number of {key} is (\d+)\.", prompt))


def variables(prompt: str) -> str:
    value = one(r"have the value (\d+)\?", prompt)
    names = [one(rf"VAR (\w+) = {value}\.", prompt)]
    while copied := re.findall(rf"VAR (\w+) = VAR {names[-1]}\.", prompt):
        names += copied
    return " ".join(names)


def common_words(prompt: str) -> str:
    words = prompt.split("than the others.\n\n")[1].split("\n\n")[0].split(" ")
    count = int(one(r"Which (\d+) words", prompt))
    return " ".join(word for word, _ in Counter(words).most_common(count))


def facts(prompt: str) -> str:
    """Made-up facts: who built it, or when it was finished."""
    thing = one(r"(?:Who built|was) (the \w+ of \w+?)(?: finished)?\?", prompt)[1:]
    return one(rf"[Tt]{thing} was (?:built by|finished in) (\w+)\.", prompt)


def cloze(prompt: str) -> str:
    blank = one(r'missing here\? "(.*____.*)"', prompt)
    pattern = re.escape(blank).replace("____", r"(\d+)")
    return one(pattern, prompt.replace(blank, ""))


def infilling(prompt: str) -> str:
    """Of a text that counts, ``0041. 0042.``: what follows the prefix, or precedes the suffix."""
    prefix, rest = prompt.split("<|fim_prefix|>")[1].split("<|fim_suffix|>")
    suffix = rest.split("<|fim_middle|>")[0]
    if seen := list(re.finditer(r" (\d{4})\.", prefix)):
        after = counted(int(seen[-1][1]) + 1, 40)
        return after[len(prefix) - seen[-1].end() :]
    first = re.search(r" (\d{4})\.", suffix)
    assert first is not None
    before = counted(int(first[1]) - 40, 40)
    return before[: len(before) - first.start()]


def counted(start: int, count: int) -> str:
    """Numbers of four digits from ``start`` on."""
    return "".join(f" {i:04}." for i in range(start, start + count))


def paragraphs(prompt: str) -> list[str]:
    """The paragraphs shown, without filler and request."""
    return prompt.split("The paragraphs:\n\n", 1)[1].split("\n\n")[:-1]


def keyword_paragraph(prompt: str) -> str:
    words = one(r"with the words (.*)\.\n", prompt).split(", ")
    found = [p for p in paragraphs(prompt) if all(w in re.findall(r"\w+", p) for w in words)]
    assert len(found) == 1
    return found[0]


def position_paragraph(prompt: str) -> str:
    shown = paragraphs(prompt)
    if index := re.search(r"paragraph number (\d+), counted", prompt):
        return shown[int(index[1]) - 1]
    relation, opening = one(r'right (before|after) the one that begins "(.*)"\.\n', prompt)
    given = [i for i, p in enumerate(shown) if p.startswith(opening)]
    assert len(given) == 1
    return shown[given[0] + (1 if relation == "after" else -1)]


def reorder(prompt: str) -> str:
    """Of paragraphs that begin with ``Step N``."""
    steps = re.findall(r"(?m)^\((\d+)\) Step (\d+)", prompt)
    return " ".join(label for label, _ in sorted(steps, key=lambda pair: int(pair[1])))


READERS = {
    "lines": lines,
    "lines-lead": lines,
    "lines-short": lines_short,
    "passkey": passkey,
    "passkey-short": passkey,
    "needle": needle,
    "multi-key": needle,
    "multi-value": needle,
    "variables": variables,
    "common-words": common_words,
    "free-form-qa": facts,
    "altered-qa": facts,
    "cloze": cloze,
    "infilling": infilling,
    "keyword-paragraph": keyword_paragraph,
    "position-paragraph": position_paragraph,
    "reorder": reorder,
}
