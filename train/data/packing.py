"""Windows of fixed length over tokenised documents, each computed from its number alone.

A document of ``n`` tokens gives ``n + 1`` positions: position 0 reads the start token and
predicts token 0, position ``n`` reads the last token and predicts the end of text. So every token
and every end is predicted exactly once, and nothing is predicted from another document.
"""

import functools

import numpy as np
from jaxtyping import Int, Int64

from train.data.tokens import Tokens

Window = dict[str, np.ndarray]

_WITHOUT_END = 2**20
"""Epochs: grain needs a finite length that fits 64 bits."""


def empty_window(length: int, pad_id: int) -> Window:
    """A window of padding: mask and segment 0 everywhere."""
    return {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "mask": np.zeros(length, np.float32),
    }


def _place(window: Window, at: int, tokens: Tokens, document: int, start: int, stop: int) -> None:
    """Put positions ``start`` to ``stop`` of a document into a window from ``at`` on."""
    ids = tokens.ids[tokens.offsets[document] : tokens.offsets[document + 1]]
    here = slice(at, at + stop - start)
    framed = np.empty(stop - start + 1, np.int32)
    inner = ids[max(start - 1, 0) : stop]
    skip = 1 if start == 0 else 0
    framed[skip : skip + len(inner)] = inner
    if start == 0:
        framed[0] = tokens.start_id
    window["tokens"][here] = framed[:-1]
    if stop == len(ids) + 1:
        framed[-1] = tokens.eos_id
    window["targets"][here] = framed[1:]
    window["segments"][here] = window["segments"].max() + 1
    window["positions"][here] = np.arange(stop - start)
    window["mask"][here] = 1


class PackedWindows:
    """Documents joined and cut into windows of ``length`` positions, epoch after epoch.

    Each epoch joins the documents in an order of its own and visits the windows in another; both
    depend only on (seed, epoch). The last window of an epoch is padded. A document that goes on
    from the window before starts again at position 0, and sees nothing of its beginning.
    ``epochs=None`` means without end.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, shuffle: bool, epochs: int | None):
        self._tokens, self._length, self._seed, self._shuffle = tokens, length, seed, shuffle
        self._sizes = np.diff(tokens.offsets) + 1
        self.windows_per_epoch = -(-int(self._sizes.sum()) // length)
        self._count = self.windows_per_epoch * (_WITHOUT_END if epochs is None else epochs)
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        epoch, visit = divmod(index, self.windows_per_epoch)
        documents, starts, windows = self._layout(epoch)
        low = int(windows[visit]) * self._length
        high = min(low + self._length, int(starts[-1]))
        window = self.empty()
        rank = int(np.searchsorted(starts, low, side="right")) - 1
        while rank < len(documents) and starts[rank] < high:
            begin = int(starts[rank])
            start, stop = max(low, begin), min(high, int(starts[rank + 1]))
            _place(
                window,
                start - low,
                self._tokens,
                int(documents[rank]),
                start - begin,
                stop - begin,
            )
            rank += 1
        return window

    def empty(self) -> Window:
        """A window whose mask is zero throughout."""
        return empty_window(self._length, self._tokens.eos_id)

    def _make_layout(
        self, epoch: int
    ) -> tuple[Int64[np.ndarray, " d"], Int64[np.ndarray, " d1"], Int64[np.ndarray, " w"]]:
        """Order of documents, where each starts in the joined stream, order of windows."""
        if self._shuffle:
            documents = permutation(self._seed, 2 * epoch, len(self._sizes))
            windows = permutation(self._seed, 2 * epoch + 1, self.windows_per_epoch)
        else:
            documents, windows = np.arange(len(self._sizes)), np.arange(self.windows_per_epoch)
        starts = np.concatenate([[0], np.cumsum(self._sizes[documents])])
        return documents, starts, windows


class WholeDocuments:
    """As :class:`PackedWindows`, but no document is cut: one that does not fit begins a window.

    For corpora whose documents are about as long as a window, and have to be read from their
    beginning. Documents are packed in corpus order, once; epochs differ in the order of windows.

    Raises ``ValueError`` for a document of more positions than a window has.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, shuffle: bool, epochs: int | None):
        self._tokens, self._length, self._seed, self._shuffle = tokens, length, seed, shuffle
        sizes = np.diff(tokens.offsets) + 1
        if sizes.size and int(sizes.max()) > length:
            raise ValueError(
                f"a document has {int(sizes.max())} positions, its end included, and windows have "
                f"{length}: make documents shorter, windows longer, or let documents be cut."
            )
        firsts, room = [0], length
        for document, size in enumerate(sizes.tolist()):
            if size > room:
                firsts.append(document)
                room = length
            room -= size
        self._firsts = np.append(firsts, len(sizes))
        self.windows_per_epoch = len(firsts)
        self._count = self.windows_per_epoch * (_WITHOUT_END if epochs is None else epochs)
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        epoch, visit = divmod(index, self.windows_per_epoch)
        number = int(self._order(epoch)[visit])
        window, at = self.empty(), 0
        for document in range(self._firsts[number], self._firsts[number + 1]):
            size = int(self._tokens.offsets[document + 1] - self._tokens.offsets[document]) + 1
            _place(window, at, self._tokens, document, 0, size)
            at += size
        return window

    def empty(self) -> Window:
        """A window whose mask is zero throughout."""
        return empty_window(self._length, self._tokens.eos_id)

    def _make_order(self, epoch: int) -> Int[np.ndarray, " w"]:
        if self._shuffle:
            return permutation(self._seed, epoch, self.windows_per_epoch)
        return np.arange(self.windows_per_epoch)


class DocumentWindows:
    """Each document cut on its own into windows of ``length``, in corpus order, for evaluation.

    Windows of a document advance by ``length - overlap``; the overlapping positions are context
    with mask 0, so that every token and every end counts exactly once.
    """

    def __init__(self, tokens: Tokens, length: int, overlap: int):
        self._tokens, self._length, self._overlap = tokens, length, overlap
        self._sizes = np.diff(tokens.offsets) + 1
        further = -(-np.maximum(self._sizes - length, 0) // (length - overlap))
        self._first = np.concatenate([[0], np.cumsum(further + 1)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Window:
        document = int(np.searchsorted(self._first, index, side="right")) - 1
        number = index - int(self._first[document])
        start = number * (self._length - self._overlap)
        stop = min(start + self._length, int(self._sizes[document]))
        window = self.empty()
        _place(window, 0, self._tokens, document, start, stop)
        if number:
            window["mask"][: self._overlap] = 0
        return window

    def empty(self) -> Window:
        """A window whose mask is zero throughout."""
        return empty_window(self._length, self._tokens.eos_id)


Windows = PackedWindows | WholeDocuments | DocumentWindows


class ProcessRows:
    """The windows that one process sees, when global batches are split between processes.

    Global batch ``s`` is windows ``s * batch_size`` and on; process ``i`` of ``n`` has the
    ``i``-th run of ``batch_size / n`` of them. The last batch is filled with empty windows, so
    all processes see the same number of batches.
    """

    def __init__(self, windows: Windows, batch_size: int, index: int, count: int):
        self._windows, self._batch_size, self._index = windows, batch_size, index
        self._rows = batch_size // count
        self._count = -(-len(windows) // batch_size) * self._rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        step, row = divmod(index, self._rows)
        position = step * self._batch_size + self._index * self._rows + row
        if position < len(self._windows):
            return self._windows[position]
        return self._windows.empty()


def permutation(seed: int, stream: int, size: int) -> Int[np.ndarray, " size"]:
    """A pseudo-random order of ``range(size)``, the same with every version of numpy.

    Sorts the raw output of the Philox counter generator, which numpy keeps stable across
    versions, unlike its ``permutation``.
    """
    draws = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(size)
    return np.argsort(draws, kind="stable")
