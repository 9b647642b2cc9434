"""Trains a byte-level BPE tokenizer for code and text.

``python -m train.data.bpe --corpus=python_stdlib --vocab_size=4096 --out=DIR`` writes
``tokenizer.json`` and ``tokenizer_config.json`` and prints what each split costs in tokens.
"""

import json
from collections.abc import Iterable

import tokenizers
from absl import app, flags
from tokenizers import decoders, pre_tokenizers, trainers

from models.tokenizer import Tokenizer
from train.data.corpus import CORPORA, load_corpus
from train.data.sources import SPLITS
from train.data.tokens import tokenize

END_OF_TEXT = "<|endoftext|>"

# Pieces that no merge crosses: a word with at most one sign or space before it (".append",
# "_name"), a single digit, a run of other signs with the line break and indentation after it
# ("):\n       "), a run of white space. The last space of an indentation goes to the word after
# it. On the held-out standard library at 4096 ids this gives 3.70 bytes per token; GPT-2's pieces
# without contractions give 3.42.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+(?:\n+ *(?= \S)|\n+)?"
    r"|\s+(?!\S)|\s+"
)
# The trainer's limit is exclusive: long rules and deep indentation stay below 32 bytes a token.
_TOKEN_BYTES_BELOW = 32


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2) with ``vocab_size`` ids.

    Id 0 is ``<|endoftext|>``, which both ends and begins documents. Every byte has a token, so
    any text can be encoded; digits are always single; tokens have fewer than 32 bytes. The result
    depends on the texts alone.

    Raises ``ValueError`` when the vocabulary cannot hold the bytes, or the texts do not yield
    that many tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: give at least {len(alphabet) + 1} "
            "(256 bytes and the end of text)."
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        max_token_length=_TOKEN_BYTES_BELOW,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the texts yield only {backend.get_vocab_size()} tokens of {vocab_size}: give more "
            "text or a smaller vocab_size."
        )
    return Tokenizer(backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def main() -> None:
    """Entry point: trains on the corpus's train split, saves, and prints one line per split."""
    flags.DEFINE_string("corpus", "python_stdlib", f"What to train on: {CORPORA}.")
    flags.DEFINE_integer("vocab_size", 4096, "Number of token ids.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)

    def run(_: list[str]) -> None:
        name = flags.FLAGS.corpus
        corpus = load_corpus(name, "train")
        tokenizer = train_bpe((document.text for document in corpus), flags.FLAGS.vocab_size)
        tokenizer.save(flags.FLAGS.out)
        for split in SPLITS:
            corpus = load_corpus(name, split)
            tokens = tokenize(corpus, tokenizer)
            count = len(tokens.ids)
            row = {
                "split": split,
                "documents": len(corpus),
                "bytes": corpus.num_bytes,
                "tokens": count,
                "bytes_per_token": round(corpus.num_bytes / count, 4),
            }
            print(json.dumps(row), flush=True)

    app.run(run)


if __name__ == "__main__":
    main()
