"""The tokens of a corpus, encoded once and kept on disk as flat arrays."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from models.tokenizer import Tokenizer
from train.data.cache import build_folder, cache_root, locked
from train.data.corpus import Corpus
from train.run_folder import hash_file

_FILES = ("ids.npy", "offsets.npy")
_FORMAT = 1
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Every document of a split: document ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

    ``start_id`` is what a model reads before the first token of a document (bos, or eos where
    there is none), ``eos_id`` what it must predict after the last; neither is stored in ``ids``.
    ``num_bytes`` is the UTF-8 length of the texts, for bits per byte.
    """

    ids: UInt16[np.ndarray, " n"] | UInt32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " documents_plus_one"]
    start_id: int
    eos_id: int
    num_bytes: int

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


def tokenize(corpus: Corpus, tokenizer: Tokenizer, data_dir: pathlib.Path | None = None) -> Tokens:
    """Tokens of a corpus split, from the cache where it has them.

    The cache is keyed by the contents of corpus and tokenizer and checked by sha256 on reading.

    Raises ``ValueError`` when the tokenizer has no eos, or the cached files are damaged.
    """
    if tokenizer.eos_id is None:
        raise ValueError(
            "this tokenizer has no eos token, which separates documents: name one as eos_token "
            "in tokenizer_config.json."
        )
    start_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    key = json.dumps([_FORMAT, corpus.fingerprint, corpus.split, tokenizer.fingerprint])
    name = f"{corpus.split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = (data_dir or cache_root()) / "tokens" / name
    with locked(folder):
        if not folder.exists():
            build_folder(folder, lambda temporary: _write(temporary, corpus, tokenizer))
    ids, offsets = _read(folder)
    return Tokens(ids, offsets, start_id, tokenizer.eos_id, corpus.num_bytes)


def _write(folder: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts, lengths = [], [0]
    for start in range(0, len(corpus), _BATCH):
        stop = min(start + _BATCH, len(corpus))
        for ids in tokenizer.encode_batch([corpus[index].text for index in range(start, stop)]):
            parts.append(np.asarray(ids, dtype))
            lengths.append(len(ids))
    arrays = (np.concatenate(parts), np.cumsum(lengths, dtype=np.int64))
    digests = {}
    for file, array in zip(_FILES, arrays, strict=True):
        np.save(folder / file, array, allow_pickle=False)
        digests[file] = hash_file(folder / file)
    (folder / "sha256.json").write_text(json.dumps(digests), encoding="utf-8")


def _read(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    damaged = ValueError(f"the cached tokens in {folder} are damaged: delete that folder.")
    try:
        expected = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        intact = all(hash_file(folder / file) == expected[file] for file in _FILES)
    except (OSError, ValueError, KeyError) as error:
        raise damaged from error
    if not intact:
        raise damaged
    ids, offsets = (np.load(folder / file, mmap_mode="r", allow_pickle=False) for file in _FILES)
    return ids, np.asarray(offsets)
