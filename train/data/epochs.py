"""Every element once per epoch, each epoch in an order of its own, by number and without state."""

import functools

import numpy as np
from jaxtyping import Int64

from train.data.packing import permutation


class Epochs:
    """Endless elements of ``range(size)``; their order depends only on the seed and the epoch."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError(f"epochs over {size} elements: give at least 1.")
        self._size = size
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, size))

    def __getitem__(self, number: int) -> int:
        """Element ``number`` of the endless sequence."""
        epoch, visit = divmod(number, self._size)
        return int(self._order(epoch)[visit])

    def run(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """``count`` elements from number ``start`` on."""
        return np.asarray([self[number] for number in range(start, start + count)], np.int64)
