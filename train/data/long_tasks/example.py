"""What a long-context example is, and what the generators ask of a tokenizer and of a text."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Encoder(Protocol):
    """What a generator asks of a tokenizer: how many tokens a prompt has.

    Whoever wraps prompts (a start token, a chat template) passes an encoder that does so too, and
    the lengths are exact with the wrapping.
    """

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        ...


@dataclasses.dataclass(frozen=True)
class Space:
    """What a guesser draws from who knows the form of the answers but not which one is right.

    Where a prompt holds several candidates they are these; otherwise it is the range that the
    generator drew the answer from. Empty for free text, which cannot be guessed.
    """

    candidates: tuple[str, ...] | range = ()

    def __len__(self) -> int:
        return len(self.candidates)

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        """``count`` different candidates, all of them if there are fewer."""
        chosen = rng.choice(len(self), min(count, len(self)), replace=False, shuffle=True)
        return [str(self.candidates[int(i)]) for i in chosen]

    def count(self, answer: str) -> int:
        """How often the answer is among the candidates."""
        if isinstance(self.candidates, range):
            digits = answer.replace(",", "")
            return int(digits.isdigit() and int(digits) in self.candidates)
        return self.candidates.count(answer)


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its answer, and where and how long everything is.

    Attributes:
        task: the name of its task.
        prompt: the text to continue.
        answer: the reference text.
        answers: every value that counts; ``(answer,)`` unless several are asked for.
        metric: how an output is scored: a name of ``scores.METRICS``.
        space: what chance draws from.
        depth: where the evidence stands among the items of the prompt, in [0, 1]; None for tasks
            that need the whole prompt.
        target_tokens: the length asked for.
        prompt_tokens: tokens of the prompt, at most ``target_tokens``.
        answer_token: index of the token in which the evidence begins; None if ``depth`` is.
        fields: further facts of the task, by name.
    """

    task: str
    prompt: str
    answer: str
    answers: tuple[str, ...]
    metric: str
    space: Space
    depth: float | None
    target_tokens: int
    prompt_tokens: int
    answer_token: int | None
    fields: Mapping[str, Any]


def place(depth: float, count: int) -> int:
    """Which of ``count`` places a depth means; uniform depths give uniform places.

    Raises:
        ValueError: a depth outside [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} is outside [0, 1]: 0 is the start of the text, 1 its end.")
    return min(int(depth * count), count - 1)


def drawn(rng: np.random.Generator, depth: float | None) -> float:
    """The depth, or a uniform one if it is None."""
    return float(rng.random()) if depth is None else float(depth)
