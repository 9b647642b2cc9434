"""FreeFormQA and AlteredNumericQA: locations, lengths, and that the old number is gone."""

import json
import re

import numpy as np
import pytest

from tests.train.data.long_tasks.samples import materials, tokenizer
from train.data.long_tasks.numeric_qa import (
    ANSWER_LOCATIONS,
    RANGES,
    alter_item,
    make_altered,
    make_free_form,
    variant,
)
from train.data.long_tasks.qa_items import Item, cloze_items, load_items, whole_numbers
from train.data.long_tasks.text import made_up_source, read_source

DOCUMENT = (
    "The bridge was opened in 1,990 or 1990, say 19905 people. In the 1990s it had 1990.5 visitors "
    "a day. Bus A1990 stops there (since 1990)."
)
ITEM = Item(DOCUMENT, "Was it opened in 1990 or later?", "1990", DOCUMENT.index("1990,"))


def old_number(text: str, old: str) -> list[str]:
    """Whole tokens that are the number, found independently: split at all that is not a number."""
    tokens = re.split(r"[^\w.,]+", text)
    return [t for t in tokens if t.strip(".,").replace(",", "") == old]


@pytest.mark.parametrize("seed", range(20))
def test_the_old_number_is_gone_and_longer_ones_stay(seed):
    altered, space = alter_item(np.random.default_rng(seed), ITEM)
    new = int(altered.answer)
    assert new != 1990 and abs(new - 1990) <= 10 and len(altered.answer) == 4
    assert space.count(altered.answer) == 1 and len(space) == 20
    assert old_number(altered.document, "1990") == [] == old_number(altered.question, "1990")
    assert altered.answer in altered.question and f"{new:,}" in altered.document
    for kept in ("19905 people", "1990s", "1990.5", "A1990"):
        assert kept in altered.document
    assert altered.document[altered.span() :].startswith(altered.answer)


@pytest.mark.parametrize(
    ("number", "low", "high"),
    [("7", 1, 9), ("42", 10, 99), ("987", 100, 999), ("31,415", 10_000, 99_999)],
)
def test_other_numbers_keep_their_digits(number, low, high):
    item = Item(f"There were {number} of them.", "How many?", number)
    news = set()
    for seed in range(60):
        altered, _ = alter_item(np.random.default_rng(seed), item)
        news.add(altered.answer)
        assert altered.answer != number and low <= int(altered.answer.replace(",", "")) <= high
        assert ("," in altered.answer) == ("," in number)
    assert len(news) > (6 if low == 1 else 20)


def test_years_near_a_thousand_keep_four_digits():
    item = Item("It began in 1003.", "When?", "1003")
    news = {int(alter_item(np.random.default_rng(s), item)[0].answer) for s in range(200)}
    assert min(news) == 1000 and max(news) == 1013 and 1003 not in news


def test_whole_numbers_are_told_from_parts():
    assert whole_numbers("1990,1991 and 1990.", "1990") == [(0, 4), (14, 18)]
    assert whole_numbers("v3.11.4", "4") == [] == whole_numbers("x_4 4th", "4")


def test_six_rows_per_item_in_the_fixed_order():
    rows = [variant(row) for row in range(12)]
    assert rows[:6] == rows[6:] and len(set(rows)) == 6
    assert [a for a, _ in rows[:6]] == ["start"] * 2 + ["random"] * 2 + ["end"] * 2
    assert [q for _, q in rows[:6]] == ["end", "start"] * 3


@pytest.mark.parametrize("row", range(6))
def test_the_answer_stands_in_the_right_part_of_the_document(row):
    answer_location, question_location = variant(row)
    data = materials()
    for index, item in enumerate(data.questions[:8]):
        rng = np.random.default_rng([row, index])
        spare = data.spare(rng, 700)
        example = make_free_form(
            rng, tokenizer(), 700, item, answer_location, question_location, spare
        )
        document = example.fields["document"]
        low, high = RANGES[answer_location]
        assert document.count(item.answer) == 1 and document in example.prompt
        assert low <= document.index(item.answer) / len(document) <= high
        assert example.fields["answer_location"] == answer_location
        assert example.prompt_tokens == 700
        before = example.prompt.index(item.question) < example.prompt.index(document)
        assert before == (question_location == "start")


def test_a_long_document_is_cut_and_a_short_one_goes_on_from_its_other_side():
    facts = [f"Fact {word} is old." for word in made_up_source(1, 400).text.split()]
    document = " ".join([*facts[:20], "The key is Zanzibar.", *facts[20:900]])
    item = Item(document, "What is the key?", "Zanzibar")
    for location in ANSWER_LOCATIONS:
        rng = np.random.default_rng(0)
        example = make_free_form(rng, tokenizer(), 900, item, location)
        shown = example.fields["document"]
        assert "Zanzibar" in shown and len(shown) < len(document)
        # Only twenty sentences stand before the answer: more come from behind it.
        assert ("\n\n" in shown) == (location != "start")
    with pytest.raises(ValueError, match="more text"):
        make_free_form(np.random.default_rng(0), tokenizer(), 50_000, item)


def test_a_length_that_cannot_place_the_answer_is_refused():
    long = "word " * 40 + "Zanzibar. " + "And so it went on. " * 40
    with pytest.raises(ValueError, match="longer prompt"):
        make_free_form(
            np.random.default_rng(0), tokenizer(), 110, Item(long, "Where?", "Zanzibar"), "start"
        )


def test_altered_questions_hold_nothing_of_the_old_number():
    data = materials("cloze")
    for index, item in enumerate(data.clozes[:12]):
        rng = np.random.default_rng(index)
        example = make_altered(rng, tokenizer(), 500, item, spare=data.spare(rng, 500))
        assert old_number(example.prompt, item.answer) == []
        assert example.fields["old"] == item.answer != example.answer
        assert len(example.answer) == len(item.answer)


def test_cloze_items_are_numbers_of_the_text():
    source = read_source("In 1805 the army came to the town. The army had no bread at all.\n\nSo.")
    (item,) = cloze_items(np.random.default_rng(0), source)
    assert item.answer == "1805" and item.document[item.span() :].startswith("1805 the army")
    assert item.question == 'Which number is missing here? "In ____ the army came to the town."'
    with pytest.raises(ValueError, match="no sentence"):
        cloze_items(np.random.default_rng(0), read_source("No number here at all."))


def test_items_from_a_file(tmp_path):
    path = tmp_path / "items.jsonl"
    good = {"document": "It was 7 then.", "question": "How many?", "answer": "7"}
    path.write_text(json.dumps(good) + "\n\n")
    assert load_items(path) == [Item("It was 7 then.", "How many?", "7")]
    path.write_text(json.dumps(good | {"answer": "8"}))
    with pytest.raises(ValueError, match="not in its document"):
        load_items(path)
    path.write_text('{"document": "a"}')
    with pytest.raises(ValueError, match="line 1, needs"):
        load_items(path)
    with pytest.raises(FileNotFoundError, match="name a JSON-lines"):
        load_items(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="whole number"):
        alter_item(np.random.default_rng(0), Item("It was Tuesday.", "When?", "Tuesday"))
