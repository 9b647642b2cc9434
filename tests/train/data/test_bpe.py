import json
import subprocess
import sys

import pytest

from train.data.bpe import END_OF_TEXT, train_bpe

TEXTS = [
    "class Reader:\n    def read(self, count):\n        return self.buffer[:count]\n" * 20,
    "year 2024, 2024 items, 2024 values; ####################################\n" * 20,
]


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 320).fingerprint == train_bpe(TEXTS, 320).fingerprint


def test_digits_are_single_and_line_break_joins_its_indentation():
    line = "self):\n        return 2024\n"
    tokenizer = train_bpe([line * 9], 274)
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode(line)]
    assert pieces == ["self", "):\n       ", " return", " 2", "0", "2", "4", "\n"]


def test_tokens_stay_below_32_bytes():
    rule = "#" * 64
    tokenizer = train_bpe([rule], 261)
    assert [len(tokenizer.decode([index])) for index in range(257, 261)] == [2, 4, 8, 16]
    with pytest.raises(ValueError, match="yield only 261 tokens of 262"):
        train_bpe([rule], 262)


def test_end_of_text_is_id_zero_and_both_ends_and_begins():
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.decode([0]) == END_OF_TEXT
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (0, 0, 300)


def test_impossible_vocabularies_are_refused():
    with pytest.raises(ValueError, match="give at least 257"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="give more text or a smaller vocab_size"):
        train_bpe(["tiny"], 300)


def test_command_writes_a_tokenizer_and_reports_each_split(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGREACH_DATA", str(tmp_path / "cache"))
    text = "".join(f"line {number} of the story\n" for number in range(200))
    (tmp_path / "story.txt").write_text(text)
    out = tmp_path / "out"
    arguments = [f"--corpus=text:{tmp_path / 'story.txt'}", "--vocab_size=270", f"--out={out}"]
    run = subprocess.run(
        [sys.executable, "-m", "train.data.bpe", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [row["split"] for row in rows] == ["train", "validation", "test"]
    assert sum(row["bytes"] for row in rows) == len(text)
    assert sorted(path.name for path in out.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
