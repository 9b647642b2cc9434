"""Prompts from corpora and JSON lines: splits, lengths, repeatability, bad files."""

import gzip
import itertools
import json
import pathlib
import string

import numpy as np
import pytest
import tokenizers

from models.tokenizer import Tokenizer
from train.data.prompts import corpus_pieces, load_prompts


def letters() -> tokenizers.Tokenizer:
    """One token per letter: a is 0, b is 1."""
    words = {letter: i for i, letter in enumerate(string.ascii_letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return backend


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(letters())


def write_lines(path: pathlib.Path, questions: list[str]) -> pathlib.Path:
    """A file of conversations that begin with these questions."""
    lines = "".join(json.dumps({"turns": [q, "z"]}) + "\n" for q in questions)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def words(count: int) -> list[str]:
    """Different words of three letters."""
    return [
        "".join(w)
        for w in itertools.islice(itertools.product(string.ascii_letters, repeat=3), count)
    ]


def test_lines_part_into_disjoint_splits(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "q.jsonl.gz", words(300))
    source = [f"{path}:turns"]
    test = load_prompts(source, "test", tokenizer, 15, 3, seed=0)
    train = load_prompts(source, "train", tokenizer, 240, 3, seed=0)
    everything = {tuple(tokenizer.encode(w)) for w in words(300)}
    assert not {*map(tuple, test)} & {*map(tuple, train)}
    assert {*map(tuple, test)} | {*map(tuple, train)} <= everything
    assert load_prompts(source, "test", tokenizer, 15, 3, seed=0) == test
    assert load_prompts(source, "test", tokenizer, 15, 3, seed=1) != test


def test_lines_of_one_kind_are_taken(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "q.jsonl"
    kinds = ["a [x]", "b", 3]
    lines = [{"turns": [w], "kind": kinds[i % 3]} for i, w in enumerate(words(90))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in kinds:
        wanted = {tuple(tokenizer.encode(x["turns"][0])) for x in lines if x["kind"] == kind}
        got = load_prompts([f"{path}:turns[kind={kind}]"], "train", tokenizer, 20, 3, seed=0)
        assert {*map(tuple, got)} <= wanted
    with pytest.raises(ValueError, match="gave 0 test prompts"):
        load_prompts([f"{path}:turns[kind=c]"], "test", tokenizer, 1, 3, seed=0)
    with pytest.raises(ValueError, match="line 1, has no field 'sort'"):
        load_prompts([f"{path}:turns[sort=a]"], "test", tokenizer, 1, 3, seed=0)


def test_sources_take_turns_until_one_is_empty(
    tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    few = write_lines(tmp_path / "few.jsonl", ["a" * n for n in range(1, 8)])
    many = write_lines(tmp_path / "many.jsonl", ["b" + w for w in words(200)])
    got = load_prompts([f"{few}:turns", f"{many}:turns"], "train", tokenizer, 60, 5, seed=0)
    of_few = [i for i, prompt in enumerate(got) if set(prompt) == {0}]
    assert of_few == list(range(0, 2 * len(of_few), 2)) and 2 <= len(of_few) <= 5


def test_lines_become_a_users_turn(tmp_path: pathlib.Path) -> None:
    backend = letters()
    backend.add_special_tokens(["<user>", "<end>"])
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<end>"
    tokenizer = Tokenizer(backend, chat_template=template)
    path = write_lines(tmp_path / "q.jsonl", ["b", "bb"])
    got = load_prompts([f"{path}:turns"], "train", tokenizer, 2, 4, seed=0, chat=True)
    assert sorted(got) == [[52, 1, 1, 53], [52, 1, 53]]


def test_pieces_of_a_corpus(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text((string.ascii_letters * 5)[i : i + 208])
    source = [f"text:{tmp_path}"]
    got = load_prompts(source, "train", tokenizer, 9, 7, seed=1)
    assert [len(p) for p in got] == [7] * 9
    assert all((b - a) % 52 == 1 for p in got for a, b in itertools.pairwise(p)), "in one piece"
    assert got == load_prompts(source, "train", tokenizer, 9, 7, seed=1)


def test_prompts_of_a_file_have_no_carriage_returns(tmp_path: pathlib.Path) -> None:
    words = {"a": 0, "\n": 1, "\r": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(b"a" * i + b"aa\r\n" * 30)
    got = load_prompts([f"text:{tmp_path}"], "train", Tokenizer(backend), 9, 7, seed=1)
    assert {token for prompt in got for token in prompt} == {0, 1}


def test_long_texts_are_chosen_in_proportion(tokenizer: Tokenizer) -> None:
    texts = ["a" * 4000, "b" * 1000]
    pieces = corpus_pieces(texts, tokenizer, 2, np.random.default_rng(0))
    share = np.mean([piece[0] == 0 for piece in itertools.islice(pieces, 500)])
    assert 0.72 < share < 0.88


def test_bad_sources_are_refused(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "q.jsonl", words(30))
    for sources, length, message in (
        ([f"{path}:text"], 3, "line 1, has no field 'text'"),
        ([f"{path}:turns"], 2, "gave 0 train prompts"),
        ([str(path)], 3, "which field"),
        (["novels"], 3, "unknown corpus"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(sources, "train", tokenizer, 5, length, seed=0)
    with pytest.raises(ValueError, match=r"gave 2\d train prompts of 3 tokens, 99 are asked for"):
        load_prompts([f"{path}:turns"], "train", tokenizer, 99, 3, seed=0)
    with pytest.raises(FileNotFoundError):
        load_prompts([f"{tmp_path / 'no.jsonl'}:turns"], "train", tokenizer, 1, 3, seed=0)
    path.write_text("{broken\n")
    with pytest.raises(ValueError, match="line 1"):
        load_prompts([f"{path}:turns"], "train", tokenizer, 1, 3, seed=0)
    assert list(corpus_pieces(["ab"], tokenizer, 5, np.random.default_rng(0))) == []
