"""The mixed corpus: documents that hold their own answers, and nothing too long."""

import json
import re

import numpy as np
import pytest

from tests.train.data.long_tasks.samples import materials, tokenizer
from train.data.corpus import load_corpus
from train.data.long_tasks.lines import LONGCHAT_LEAD, SHORT
from train.data.long_tasks.registry import TASKS
from train.data.records import (
    PLAIN,
    Mix,
    _make_document,
    _task_document,
    write_corpus,
    write_documents,
    write_records,
)

TEXTS = [materials().source.text]
REORDER = 200


def pieces(size: int) -> str:
    return "real text " * (size // 8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("style", [SHORT, LONGCHAT_LEAD])
def test_answers_are_those_of_the_records(style, seed):
    rng = np.random.default_rng(seed)
    text = write_records(rng, tokenizer(), 300, style, pieces)
    assert len(tokenizer().encode(text)) <= 300
    line = r"(?m)^(?:line )?([a-z-]+): (?:REGISTER_CONTENT is <)?(\d+)>?$"
    records, asked = text.split("hich number has" if style is SHORT else "The record ends", 1)
    known = dict(re.findall(line, records))
    answers = re.findall(line, asked)
    assert len(known) >= 1 and answers and all(known[key] == value for key, value in answers)


def test_the_mix_has_its_share_and_no_document_is_too_long(tmp_path):
    mix = Mix(("lines-short", "passkey-short", "infilling"), 0.5, 128, 0)
    path = tmp_path / "mix" / "records.jsonl"
    counts = write_corpus(path, mix, tokenizer(), TEXTS, 16_000)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(counts) == {PLAIN, *mix.tasks} == {row["kind"] for row in rows}
    sizes = [len(tokenizer().encode(row["text"])) for row in rows]
    assert sum(sizes) == sum(c["tokens"] for c in counts.values()) >= 16_000
    assert max(sizes) <= 128
    documents = sum(c["documents"] for c in counts.values())
    assert abs(counts[PLAIN]["documents"] / documents - 0.5) < 4 * 0.5 / np.sqrt(documents)
    hidden = [r["text"] for r in rows if r["kind"] == "passkey-short"]
    for text in hidden:
        assert len(set(re.findall(r"pass key is (\d+)|: (\d+) is the", text))) <= 2
        assert re.findall(r"\d+", text)[0] == text.split()[-1]
    corpus = load_corpus(f"text:{path}", "train", tmp_path / "cache")
    assert 0 < len(corpus) <= len(rows) and corpus[0].text in {row["text"] for row in rows}


def test_seeds_fix_the_documents():
    def first(seed: int) -> list:
        documents = write_documents(Mix(tuple(TASKS)[:4], 0.7, 400, seed), tokenizer(), TEXTS)
        return [next(documents) for _ in range(6)]

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("task", [t for t in TASKS if t != "cloze"])
def test_every_task_can_be_mixed_in(task):
    kind, text = next(write_documents(Mix((task,), 1.0, 400, 0), tokenizer(), TEXTS))
    assert kind == task and 100 < len(tokenizer().encode(text)) <= 400


def test_a_draw_that_does_not_fit_is_drawn_again():
    # The paragraphs of most draws are too long for so few tokens.
    rng, data = np.random.default_rng(0), materials()
    one_draw = [np.random.default_rng(i) for i in range(40)]
    missed = 0
    for own in one_draw:
        try:
            _make_document(own, "reorder", REORDER, tokenizer(), data, pieces)
        except ValueError:
            missed += 1
    assert 0 < missed < len(one_draw)
    for _ in range(10):
        text = _task_document(rng, "reorder", REORDER, tokenizer(), data, pieces)
        assert len(tokenizer().encode(text)) <= REORDER


def test_a_failed_corpus_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no document of 'reorder' fits into 32 tokens"):
        write_corpus(tmp_path / "a.jsonl", Mix(("reorder",), 0.9, 32, 0), tokenizer(), TEXTS, 500)
    assert not (tmp_path / "a.jsonl").exists()


def test_bad_mixes_are_refused():
    with pytest.raises(ValueError, match="outside"):
        Mix(("lines",), 1.5, 128, 0)
    with pytest.raises(ValueError, match="unknown task"):
        Mix(("riddles",), 0.5, 128, 0)
    with pytest.raises(ValueError, match="needs tasks"):
        Mix((), 0.5, 128, 0)
    with pytest.raises(ValueError, match="no text has"):
        next(write_documents(Mix((), 0.0, 128, 0), tokenizer(), ["Too short."]))
