"""LongChat-Lines: unique keys, one matching line, uniform values, and the prompts' length."""

import dataclasses
import re

import numpy as np
import pytest

from tests.train.data.long_tasks.samples import Words, tokenizer
from train.data.long_tasks.lines import LONGCHAT, SHORT, draw_records, make_lines
from train.data.long_tasks.scores import first_number_accuracy

LINE = re.compile(r"(?m)^line ([a-z]+-[a-z]+): REGISTER_CONTENT is <(\d+)>$")


@pytest.mark.parametrize("seed", range(4))
def test_keys_are_unique_and_one_line_matches(seed):
    example = make_lines(np.random.default_rng(seed), tokenizer(), 1500)
    found = LINE.findall(example.prompt)
    keys = [key for key, _ in found]
    assert len(keys) == len(set(keys)) == example.fields["lines"] > 50
    assert all(1 <= int(value) <= 50_000 for _, value in found)
    asked = re.findall(r"in line (\S+)\? I need the number\.", example.prompt)
    assert [v for k, v in found if [k] == asked] == [example.answer]
    assert example.depth == keys.index(asked[0]) / len(keys)


def test_values_reach_both_ends_of_the_range():
    rng = np.random.default_rng(0)
    few = dataclasses.replace(LONGCHAT, values=range(LONGCHAT.values[-3], LONGCHAT.values[-1] + 1))
    assert {v for _, v in draw_records(rng, few, 60)} == {49_998, 49_999, 50_000}
    few = dataclasses.replace(LONGCHAT, values=LONGCHAT.values[:3])
    assert {v for _, v in draw_records(rng, few, 60)} == {1, 2, 3}
    short = [v for _, v in draw_records(rng, SHORT, 4900)]
    assert min(short) == 100 and max(short) == 999


def test_more_lines_for_longer_prompts_and_no_more_than_keys():
    counts = [
        make_lines(np.random.default_rng(0), Words(), n, style=SHORT).fields["lines"]
        for n in (64, 128, 512)
    ]
    assert counts == sorted(counts) and counts[-1] > 100
    with pytest.raises(ValueError, match="records of 4900 keys"):
        draw_records(np.random.default_rng(0), SHORT, 4901)
    with pytest.raises(ValueError, match="shorter prompt"):
        make_lines(np.random.default_rng(0), Words(), 40_000, style=SHORT)


def test_the_first_number_counts():
    assert first_number_accuracy("is <417>, not 9", "417") == 1
    assert first_number_accuracy("key-3 is 417", "417") == 0, "an echoed digit is the first number"
    assert first_number_accuracy("4170", "417") == 0 == first_number_accuracy("none", "417")
