import numpy as np
import pytest
import tokenizers

from models.tokenizer import Tokenizer
from train.data.bpe import train_bpe
from train.data.cache import build_folder
from train.data.corpus import load_corpus
from train.data.tokens import tokenize

LINES = "".join(f"the line {number} of text\n" for number in range(300))
BPE = train_bpe([LINES], 270)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(LINES)
    return load_corpus(f"text:{tmp_path / 'text.txt'}", "train", data_dir=tmp_path)


def damage(folder, file, change):
    path = next((folder / "tokens").glob(f"*/{file}"))
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def test_every_document_is_stored_exactly(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.txt").write_text("word " * number + f"{number}")
    corpus = load_corpus(f"text:{tmp_path}", "train", data_dir=tmp_path / "cache")
    tokens = tokenize(corpus, BPE, tmp_path / "cache")
    assert tokens.num_documents == len(corpus)
    assert tokens.ids.dtype == np.uint16
    for index, document in enumerate(corpus):
        start, stop = tokens.offsets[index], tokens.offsets[index + 1]
        assert BPE.decode(tokens.ids[start:stop].tolist()) == document.text
    assert (tokens.start_id, tokens.eos_id, tokens.num_bytes) == (0, 0, corpus.num_bytes)


def test_documents_are_encoded_once_per_tokenizer(corpus, tmp_path, monkeypatch):
    calls = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: calls.append(1) or encode(self, texts)
    )
    first, again = tokenize(corpus, BPE, tmp_path), tokenize(corpus, BPE, tmp_path)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.ids, again.ids)
    tokenize(corpus, train_bpe([LINES], 260), tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("file", ["ids.npy", "offsets.npy", "sha256.json"])
@pytest.mark.parametrize(
    "change",
    [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[: len(c) // 2], lambda c: b""],
    ids=["flipped", "truncated", "emptied"],
)
def test_a_damaged_cache_is_refused(corpus, tmp_path, file, change):
    tokenize(corpus, BPE, tmp_path)
    damage(tmp_path, file, change)
    with pytest.raises(ValueError, match=r"cached tokens in .* are damaged: delete that folder"):
        tokenize(corpus, BPE, tmp_path)


def test_a_build_that_died_leaves_nothing_behind(tmp_path):
    target = tmp_path / "target"

    def die(folder):
        (folder / "part").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        build_folder(target, die)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "target.incomplete").mkdir()
    (tmp_path / "target.incomplete" / "stale").write_text("from a killed process")
    build_folder(target, lambda folder: (folder / "part").mkdir())
    assert [path.name for path in target.iterdir()] == ["part"]


def test_start_token_is_bos_or_else_eos(corpus, tmp_path):
    backend = tokenizers.Tokenizer.from_str(BPE._parsing.to_str())
    with_bos = Tokenizer(backend, eos_token="<|endoftext|>", bos_token="a")
    assert tokenize(corpus, with_bos, tmp_path).start_id == with_bos.bos_id != 0
    assert tokenize(corpus, Tokenizer(backend, eos_token="a"), tmp_path).start_id == (
        with_bos.bos_id
    )
    with pytest.raises(ValueError, match="has no eos token"):
        tokenize(corpus, Tokenizer(backend), tmp_path)
