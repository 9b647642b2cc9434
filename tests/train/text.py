"""A little text and a tokenizer of it, for tests that train language models."""

import pathlib
import random

from train.data.bpe import train_bpe

WORDS = ("def", "return", "value", "index", "self", "for", "in", "range", "(x):", "=", "+", "1")


def write_corpus(folder: pathlib.Path, seed: int = 0) -> tuple[str, str]:
    """``text:FOLDER`` of 40 files and the folder of a tokenizer with 280 ids."""
    texts, draw = folder / "texts", random.Random(seed)
    texts.mkdir(parents=True)
    documents = [" ".join(draw.choices(WORDS, k=60)) + "\n" for _ in range(40)]
    for number, document in enumerate(documents):
        (texts / f"{number}.txt").write_text(document)
    tokenizer = folder / "tokenizer"
    train_bpe(documents, 270).save(tokenizer)
    return f"text:{texts}", str(tokenizer)
