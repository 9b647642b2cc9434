"""Accuracy of generation tasks by length and depth, for whoever answers: a model or a reader."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import record
from inference.engine import make_engine
from models.load import Model
from models.tokenizer import Tokenizer
from train.data.long_tasks.example import Example
from train.data.long_tasks.registry import Materials, Task, find_task, make_examples
from train.data.long_tasks.scores import bleu, chance, score

Answerer = Callable[[Sequence[Example], Task], list[str]]
"""Gives an output for every example; all prompts of a call have the same length."""


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Counts prompts as the model reads them, with start token or chat template."""

    tokenizer: Tokenizer
    chat: bool = False

    def encode(self, text: str) -> list[int]:
        """Token ids of the prompt."""
        return self.tokenizer.encode_prompt(text, self.chat)


def engine_answers(
    model: Model, policy: Any, encoder: PromptEncoder, length: int, batch: int
) -> Answerer:
    """Answers of a model under a policy, greedily, in texts of at most ``length`` tokens.

    Generation goes on to the task's number of tokens; the output ends before the first end token
    that is not among its least ones.
    """
    engine = make_engine(model.params, model.cfg, policy=policy, context_limit=length)

    def answer(examples: Sequence[Example], task: Task) -> list[str]:
        outputs = []
        for start in range(0, len(examples), batch):
            prompts = [encoder.encode(e.prompt) for e in examples[start : start + batch]]
            made = len(prompts)
            # A last batch that is not full would be another program.
            prompts += prompts[:1] * (min(batch, len(examples)) - made)
            tokens = engine.generate(prompts, task.new_tokens).tokens[:made]
            outputs += [_text(model.tokenizer, ids, task.least_tokens) for ids in tokens]
        return outputs

    return answer


def _text(tokenizer: Tokenizer, ids: list[int], least: int) -> str:
    ends = (i for i, token in enumerate(ids) if token in tokenizer.end_ids and i >= least)
    return tokenizer.decode(ids[: next(ends, len(ids))], skip_special_tokens=True)


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """One task at one length: examples by seed, ``count`` for each depth in turn.

    ``depths`` is ``(None,)`` for tasks without a place.
    """

    task: str
    length: int
    depths: tuple[float | None, ...]
    examples: tuple[tuple[Example, ...], ...]


def make_task_set(
    name: str,
    encoder: PromptEncoder,
    length: int,
    depths: int,
    count: int,
    seeds: Sequence[int],
    data: Materials,
) -> TaskSet:
    """Examples whose prompt and longest output have ``length`` tokens together.

    Args:
        depths: how many depths, evenly from 0 to 1.
        count: examples per depth and seed.

    Raises:
        ValueError: an unknown task, or a length that it cannot have.
    """
    task = find_task(name)
    places = tuple(np.linspace(0, 1, depths).tolist()) if task.by_depth else (None,)
    wanted = [place for place in places for _ in range(count)]
    if length <= task.new_tokens:
        raise ValueError(
            f"task {name!r} writes up to {task.new_tokens} tokens, more than a text of {length}: "
            "ask for longer ones."
        )
    try:
        examples = tuple(
            tuple(make_examples(name, encoder, length - task.new_tokens, wanted, seed, data))
            for seed in seeds
        )
    except ValueError as error:
        raise ValueError(f"task {name!r} at {length} tokens: {error}") from error
    return TaskSet(name, length, places, examples)


def evaluate(tasks: TaskSet, answerer: Answerer, width: int) -> dict[str, Any]:
    """Accuracy over all and by depth, position and distance of the evidence, seeds kept apart.

    Args:
        answerer: gives the outputs.
        width: of the buckets of positions and distances, in tokens.
    """
    task = find_task(tasks.task)
    scores, bleus = [], []
    for examples in tasks.examples:
        outputs = answerer(examples, task)
        pairs = list(zip(examples, outputs, strict=True))
        scores.append(np.asarray([score(example, output) for example, output in pairs]))
        bleus.append(np.mean([bleu(output, example.answer) for example, output in pairs]))
    count = len(scores[0]) // len(tasks.depths)
    by_depth = [s.reshape(-1, count).mean(1) for s in scores]
    flat = [example for examples in tasks.examples for example in examples]
    row = {
        "kind": "task",
        "task": tasks.task,
        "length": tasks.length,
        "metric": flat[0].metric,
        "accuracy": record.sample([float(s.mean()) for s in scores]),
        "chance": float(np.mean([chance(example) for example in flat])),
        "examples": count * len(tasks.depths),
        "depths": list(tasks.depths),
        "by_depth": [record.sample(list(values)) for values in zip(*by_depth, strict=True)],
    }
    if flat[0].metric == "presence":
        row["bleu"] = record.sample([float(b) for b in bleus])
    if task.by_depth:
        for name, place in (("by_position", _position), ("by_distance", _distance)):
            row[name] = [
                _bucket(tasks, scores, place, low, width) for low in range(0, tasks.length, width)
            ]
        row["width"] = width
    return row


def _position(example: Example) -> int:
    return example.answer_token or 0


def _distance(example: Example) -> int:
    return example.prompt_tokens - _position(example)


def _bucket(
    tasks: TaskSet,
    scores: Sequence[np.ndarray],
    place: Callable[[Example], int],
    low: int,
    width: int,
) -> dict[str, Any] | None:
    """The accuracy of examples whose place is in one bucket; None if there are none."""
    values = []
    for examples, seed_scores in zip(tasks.examples, scores, strict=True):
        inside = [low <= place(e) < low + width for e in examples]
        if any(inside):
            values.append(float(seed_scores[inside].mean()))
    return record.sample(values) if values else None
