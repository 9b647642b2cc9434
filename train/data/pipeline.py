"""The input pipeline of language models: packed batches for training, whole documents for scoring.

Batches are dictionaries of numpy arrays, ``b`` rows by ``t`` positions:

* ``tokens`` int32: what the model reads;
* ``targets`` int32: the token that follows in the same document, or its end of text;
* ``segments`` int32: 1, 2, ... by document within the row, 0 for padding;
* ``positions`` int32: from 0 within each segment;
* ``mask`` float32: 1 where the target counts, 0 for padding and repeated context.
"""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np

from models.tokenizer import Tokenizer
from train.data.corpus import load_corpus
from train.data.packing import (
    DocumentWindows,
    PackedWindows,
    ProcessRows,
    WholeDocuments,
    Windows,
)
from train.data.sources import SPLITS
from train.data.tokens import Tokens, tokenize

# Windows are cheap to make; a short buffer hides that cost without holding memory or cores.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how to batch it.

    Attributes:
      corpus: ``python_stdlib``, ``python_packages`` or ``text:PATH``.
      tokenizer: folder or file of the tokenizer.
      split: ``train``, ``validation`` or ``test``.
      sequence_length: positions per row.
      batch_size: rows of the global batch; each process yields ``batch_size / process_count``.
      seed: of the orders of documents and windows.
      shuffle: whether to reorder them each epoch.
      epochs: passes over the split; None: without end.
      whole: whether to pack documents whole instead of cutting them at the ends of windows.
      process_index, process_count: which share of each global batch this process reads.

    Raises ``ValueError`` for values out of range.
    """

    corpus: str
    tokenizer: str
    split: str
    sequence_length: int
    batch_size: int
    seed: int
    shuffle: bool = True
    epochs: int | None = None
    whole: bool = False
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}: choose one of {', '.join(SPLITS)}.")
        for name in ("sequence_length", "batch_size", "process_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1.")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}: give at least 1, or None for no end.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more.")
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split between {self.process_count} "
                "processes: make it a multiple."
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index {self.process_index} is not in 0..{self.process_count - 1}."
            )


def make_dataset(
    config: DataConfig, beside: Callable[[int], dict[str, np.ndarray]] | None = None
) -> grain.IterDataset:
    """Packed training batches; the iterator's state is one number, so resuming is exact.

    Batches depend only on the config, the corpus and the tokenizer. For every
    ``process_count`` the processes' rows together are the same global batches. ``beside`` gives
    further arrays of a batch by its number.
    """
    return _batched(training_windows(config), config, beside)


def training_windows(config: DataConfig) -> PackedWindows | WholeDocuments:
    """The windows that training batches are made of, in their order."""
    kind = WholeDocuments if config.whole else PackedWindows
    tokens = load_tokens(config)
    return kind(tokens, config.sequence_length, config.seed, config.shuffle, config.epochs)


def evaluation_batches(config: DataConfig, overlap: int = 0) -> grain.IterDataset:
    """One pass over a split in which each token and each end of text has mask 1 exactly once.

    Rows hold one document each, in corpus order, short ones padded. ``overlap`` gives windows
    that continue a document that many positions of context (the usual strided evaluation), at
    ``sequence_length / (sequence_length - overlap)`` of the work. ``seed``, ``shuffle`` and
    ``epochs`` of the config are not used. Bits per byte are the masked sum of nats over all
    processes, divided by ln 2 and by ``load_tokens(config).num_bytes``.

    Raises ``ValueError`` for an overlap outside 0..sequence_length - 1.
    """
    if not 0 <= overlap < config.sequence_length:
        raise ValueError(
            f"overlap {overlap} is not below sequence_length {config.sequence_length}: lower it."
        )
    return _batched(DocumentWindows(load_tokens(config), config.sequence_length, overlap), config)


def load_tokens(config: DataConfig) -> Tokens:
    """The tokens of the config's split, with its size in bytes (``num_bytes``)."""
    corpus = load_corpus(config.corpus, config.split)
    return tokenize(corpus, Tokenizer.load(config.tokenizer))


def _batched(
    windows: Windows,
    config: DataConfig,
    beside: Callable[[int], dict[str, np.ndarray]] | None = None,
) -> grain.IterDataset:
    rows = ProcessRows(windows, config.batch_size, config.process_index, config.process_count)
    batches = grain.MapDataset.source(rows).batch(config.batch_size // config.process_count)
    if beside is not None:
        batches = batches.map_with_index(lambda number, batch: {**batch, **beside(number)})
    return batches.to_iter_dataset(_READ_OPTIONS)
