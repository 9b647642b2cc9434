"""Every task against known answers: a reader of the prompt is always right, a guesser by chance."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.train.data.long_tasks.readers import READERS, read
from tests.train.data.long_tasks.samples import Words, materials, tokenizer
from train.data.long_tasks.registry import TASKS, make_examples
from train.data.long_tasks.scores import chance, guess, score

LENGTHS = (320, 821)
DEPTHS = (None, None, 0.0, 0.37, 1.0)
FREE = ("infilling",)  # text that nobody can guess


@functools.cache
def examples(task: str, tokens: int, depths=DEPTHS):
    """Examples that the tests share, the first two at random depths."""
    return again(task, tokens, depths, 0)


def again(task: str, tokens: int, depths, seed: int):
    return make_examples(task, tokenizer(), tokens, depths, seed, materials(task))


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_the_prompt_is_always_right(task):
    for tokens in LENGTHS:
        for example in examples(task, tokens):
            assert score(example, read(example)) == 1, example.prompt


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact_and_the_place_is_that_of_the_evidence(task):
    for tokens in LENGTHS:
        for example in examples(task, tokens):
            ids = tokenizer().encode(example.prompt)
            assert len(ids) == example.prompt_tokens == example.target_tokens == tokens
            if TASKS[task].by_depth:
                assert example.depth is not None and 0 <= example.depth <= 1
                assert example.answer_token is not None
                _assert_evidence_begins(example, ids)
            else:
                assert example.depth is None and example.answer_token is None


def _assert_evidence_begins(example, ids):
    """The answer (or a variable's value) stands behind the place and not before it."""
    shown = example.fields.get("value", example.answers[0])
    rest = tokenizer().decode(ids[example.answer_token :])
    if example.task == "infilling":  # what is missing stands nowhere; its place is a sentinel
        assert 0 <= rest.find("<|fim_suffix|>") < 8 and shown not in rest
    elif example.task == "cloze" or example.fields.get("question_location") == "start":
        assert str(shown) in rest  # the question may quote other numbers before it
    else:
        assert rest.count(str(shown)) >= 1
        before = tokenizer().decode(ids[: example.answer_token])
        if example.metric != "presence":
            assert f"{shown}" not in before.replace(">", "> ").split()


@pytest.mark.parametrize("task", [t for t in TASKS if t not in FREE])
def test_a_guesser_scores_chance(task):
    made = [example for tokens in LENGTHS for example in examples(task, tokens)]
    rng = np.random.default_rng(0)
    drawn = [[score(e, guess(e, rng)) for _ in range(80)] for e in made]
    expected = np.mean([chance(e) for e in made])
    assert 0 < expected < 1
    # Scores lie in [0, 1], so their variance is at most that of a coin with the same mean.
    bound = 4 * np.sqrt(expected * (1 - expected) / np.size(drawn)) + 1 / np.size(drawn)
    assert abs(np.mean(drawn) - expected) < bound


@pytest.mark.parametrize("task", FREE)
def test_free_text_cannot_be_guessed(task):
    example = examples(task, 320)[0]
    assert chance(example) == 0 == score(example, guess(example, np.random.default_rng(0)))


@pytest.mark.parametrize("task", TASKS)
def test_seeds_fix_the_examples(task):
    first = [dataclasses.asdict(e) for e in examples(task, 320)]
    # The same whatever else is asked for: two of the five examples, made anew.
    alone = [dataclasses.asdict(e) for e in again(task, 320, DEPTHS[:2], 0)]
    assert alone == first[:2]
    other = again(task, 320, DEPTHS[:2], 1)
    assert all(a["prompt"] != b.prompt for a, b in zip(first, other, strict=False))


@pytest.mark.parametrize("task", ["lines", "lines-short", "needle", "keyword-paragraph"])
def test_places_are_uniform_over_depth(task):
    made = make_examples(task, Words(), 330, [None] * 200, 3, materials())
    counts = np.histogram([e.depth for e in made], bins=4, range=(0, 1))[0]
    # Items are few and not divisible by four, so bins are compared loosely: 50 each, 6 is sigma.
    assert np.all(np.abs(counts - 50) < 5 * 6), counts
    tokens = np.asarray([e.answer_token for e in made]) / 330
    assert tokens.min() < 0.3 and tokens.max() > 0.7


def test_every_task_has_a_reader_and_its_examples_name_it():
    assert READERS.keys() == TASKS.keys()
    assert all(examples(task, 320)[0].task == task for task in TASKS)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown task"):
        make_examples("riddles", Words(), 320, [None], 0, materials())
    with pytest.raises(ValueError, match="outside"):
        make_examples("lines", Words(), 320, [1.5], 0, materials())
    with pytest.raises(ValueError, match="too few"):
        make_examples("lines", tokenizer(), 20, [None], 0, materials())
    with pytest.raises(ValueError, match="source has"):
        make_examples("passkey", Words(), 400_000, [None], 0, materials())


class Letters:
    """The plainest tokenizer: a token per character, and one before the first."""

    def encode(self, text: str) -> list[int]:
        return [0, *map(ord, text)]


@pytest.mark.parametrize("task", TASKS)
def test_any_tokenizer_does(task):
    """Lengths are those of the tokenizer that is given, and so is the evidence's place."""
    tokens = 700 if task in ("common-words", "free-form-qa", "altered-qa") else 1500
    (example,) = make_examples(task, Letters(), tokens, [0.5], 0, materials(task))
    assert len(example.prompt) + 1 == example.prompt_tokens == tokens
    assert score(example, read(example)) == 1
    if TASKS[task].by_depth and task != "infilling":
        shown = str(example.fields.get("value", example.answers[0]))
        assert shown in example.prompt[(example.answer_token or 0) - 1 :]


@pytest.mark.parametrize("tokens", range(301, 325))
def test_every_length_is_exact_with_a_token_per_character(tokens):
    (example,) = make_examples("variables", Letters(), tokens + 200, [0.5], 0, materials())
    assert example.prompt_tokens == tokens + 200
