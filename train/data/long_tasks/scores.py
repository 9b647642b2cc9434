"""Scores of generated text, all in [0, 1], and what chance would get.

Presence and recall reward whoever writes much, so outputs are cut to the task's number of tokens
before they are scored. The score of numbers takes the first one, whatever follows.
"""

import collections
import math
import re
from collections.abc import Callable

import numpy as np

from train.data.long_tasks.example import Example

_DIGITS = re.compile(r"\d+")


def presence_accuracy(output: str, reference: str) -> float:
    """1 if the reference, stripped, is a substring of the output, else 0."""
    return float(reference.strip() in output)


def first_number_accuracy(output: str, value: str) -> float:
    """1 if the first maximal run of digits in the output is the value, else 0."""
    found = _DIGITS.search(output)
    return float(found is not None and int(found[0]) == int(value))


def bleu(output: str, reference: str) -> float:
    """Sentence BLEU over words, with n-grams up to ``min(4, words of the reference)``.

    Geometric mean of the clipped precisions times the brevity penalty (Papineni et al. 2002), not
    smoothed: 0 as soon as one order has no match.

    Raises:
        ValueError: the reference has no word.
    """
    words, expected = output.split(), reference.split()
    if not expected:
        raise ValueError("BLEU needs a reference with at least one word.")
    orders = min(4, len(expected))
    total = 0.0
    for n in range(1, orders + 1):
        have, want = _ngrams(words, n), _ngrams(expected, n)
        matches = sum(min(count, want[gram]) for gram, count in have.items())
        if matches == 0:
            return 0.0
        total += math.log(matches / have.total()) / orders
    return math.exp(total + min(0.0, 1 - len(expected) / len(words)))


def _ngrams(words: list[str], n: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def recall(output: str, answers: tuple[str, ...]) -> float:
    """The share of the answers that stand in the output as whole words or numbers."""
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output) for answer in answers]
    return sum(match is not None for match in found) / len(answers)


def order_accuracy(output: str, labels: tuple[str, ...]) -> float:
    """The share of labels in their place, reading the numbers of the output in their order."""
    numbers = [int(n) for n in _DIGITS.findall(output)]
    pairs = zip(numbers, labels, strict=False)
    return sum(number == int(label) for number, label in pairs) / len(labels)


METRICS: dict[str, Callable[[str, Example], float]] = {
    "first_number": lambda output, example: first_number_accuracy(output, example.answer),
    "presence": lambda output, example: presence_accuracy(output, example.answer),
    "recall": lambda output, example: recall(output, example.answers),
    "order": lambda output, example: order_accuracy(output, example.answers),
}
"""Scores by the name that an example carries."""


def score(example: Example, output: str) -> float:
    """The score of an output by the example's own metric, in [0, 1]."""
    return METRICS[example.metric](output, example)


def chance(example: Example) -> float:
    """The expected score of :func:`guess`; 0 for free text.

    One value is right as often as it is among the candidates; of several values each is drawn with
    the same probability; a random order has one label in its place on average.
    """
    if not len(example.space):
        return 0.0
    if example.metric == "order":
        return 1 / len(example.answers)
    if example.metric == "recall":
        return min(1.0, len(example.answers) / len(example.space))
    return example.space.count(example.answer) / len(example.space)


def guess(example: Example, rng: np.random.Generator) -> str:
    """The output of a guesser who knows the form of an answer and draws from what it may be."""
    return " ".join(example.space.draw(rng, len(example.answers)))
