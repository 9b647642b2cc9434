"""Texts and tokenizers that the tests of long-context tasks share."""

import functools
import re

import numpy as np

from models.load import ASSETS
from models.tokenizer import Tokenizer
from tests.train.data.long_tasks.readers import counted
from train.data.long_tasks.registry import Materials
from train.data.long_tasks.text import Source, made_up_sentence, made_up_source


@functools.cache
def tokenizer() -> Tokenizer:
    """A real one: that of a model that ships."""
    return Tokenizer.load(ASSETS / "python-5m")


class Words:
    """An encoder that is fast: one token per word or sign, white space for nothing."""

    def encode(self, text: str) -> list[int]:
        return [hash(word) for word in re.findall(r"\w+|[^\w\s]|\n", text)]


@functools.cache
def materials(task: str = "") -> Materials:
    """A text in which the answer of the task can be read."""
    if task == "infilling":
        return Materials(Source((counted(0, 10_000).strip(),)))
    rng = np.random.default_rng(7)
    if task == "reorder":
        steps = [f"Step {i}. {made_up_sentence(rng)}" for i in range(500)]
        return Materials(Source(tuple(steps)))
    if task == "cloze":
        years = [f"{made_up_sentence(rng)[:-1]} in {rng.integers(900, 2200)}." for _ in range(600)]
        return Materials(Source(tuple(years)))
    return Materials(made_up_source(0, 1500))
