"""A random corpus of repeating n-grams, and counting one by one."""

import collections
import itertools

import numpy as np

from tests.inference.models import VOCAB


def corpus(seed: int, documents: int = 12, kinds: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Random documents over few tokens, so that n-grams repeat; some are very short."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 60, documents)
    sizes[0] = 60
    ids = rng.permutation(VOCAB)[rng.integers(0, kinds, sizes.sum())]
    return ids, np.concatenate([[0], np.cumsum(sizes)])


def brute_force(ids, offsets, order: int) -> collections.Counter:
    """Every n-gram of every document, counted one by one."""
    counts = collections.Counter()
    for begin, end in itertools.pairwise(offsets):
        for t in range(begin, end - order + 1):
            counts[tuple(ids[t : t + order].tolist())] += 1
    return counts
