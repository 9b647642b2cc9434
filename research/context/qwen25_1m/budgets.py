"""Budgets per layer and head: an offline search among candidates, then refinement by recall.

The search is MInference's (arXiv 2407.02490): of some patterns of similar cost, keep the one that
retains most. The refinement is Qwen2.5-1M's (arXiv 2501.15383): at the length that is served, heads
whose recall is too low get more, until it is high enough.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

CANDIDATES = ((30, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))
"""Columns and diagonals that are searched among."""

DEFAULT = (1000, 6096)
"""What a head has that was not searched for."""

A_SHAPE = (1024, 4096)
"""Sink and local window of the pattern without selection. From memory."""

BLOCKS = 100
"""Blocks of keys of the block-sparse pattern. From memory."""

STEP = 2048
"""What a refinement adds to both budgets."""

CAP = (22032, 18532)
"""The largest budgets of the released 7B model, about."""


def scaled(budget: tuple[int, int], factor: float) -> tuple[int, int]:
    """A budget for another length of text; at least one of each."""
    vertical, slash = (max(1, round(x * factor)) for x in budget)
    return vertical, slash


def best_candidates(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The index, in the order given, of the candidate with the highest score for every head.

    Args:
        scores: retained attention mass (layers, h) by candidate; the first one wins ties.

    Raises:
        ValueError: no candidates.
    """
    if not scores:
        raise ValueError("the search needs candidates: give the scores of at least one.")
    return np.argmax(np.stack(list(scores.values())), axis=0)


@dataclasses.dataclass(frozen=True)
class Refined:
    """Budgets after refinement, (layers, h), what they retain, and how many passes it took.

    ``passes`` is how many times recall was measured.
    """

    vertical: np.ndarray
    slash: np.ndarray
    recall: np.ndarray
    passes: int

    @property
    def total(self) -> int:
        """Columns and diagonals of all heads."""
        return int(self.vertical.sum() + self.slash.sum())


def refine(
    recall: Callable[[np.ndarray, np.ndarray], np.ndarray],
    vertical: np.ndarray,
    slash: np.ndarray,
    *,
    threshold: float = 0.9,
    step: int = STEP,
    cap: tuple[int, int] = CAP,
) -> Refined:
    """Raise both budgets of every head whose recall is below the threshold, until none can be.

    No budget is ever lowered, one above the cap stays as it is. Ends because each pass but the last
    raises something.

    Args:
        recall: measures the heads' recall (layers, h) under budgets (layers, h).
        vertical, slash: where it starts.
        threshold: wanted recall. The one behind the released budgets is not public.
        step: what is added to both.
        cap: the largest budgets given.

    Raises:
        ValueError: a step below 1 or a threshold outside 0 .. 1.
    """
    if step < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"step must be 1 or more and threshold a share, got {step}, {threshold}.")
    vertical, slash = np.array(vertical), np.array(slash)
    passes = 0
    while True:
        measured = np.asarray(recall(vertical, slash))
        passes += 1
        more = [
            np.where(measured < threshold, np.maximum(x, np.minimum(x + step, most)), x)
            for x, most in zip((vertical, slash), cap, strict=True)
        ]
        if all(np.array_equal(a, b) for a, b in zip(more, (vertical, slash), strict=True)):
            return Refined(vertical, slash, measured, passes)
        vertical, slash = more


def refine_uniformly(
    recall: Callable[[np.ndarray, np.ndarray], np.ndarray],
    vertical: np.ndarray,
    slash: np.ndarray,
    *,
    threshold: float = 0.9,
    step: int = STEP,
    cap: tuple[int, int] = CAP,
) -> Refined:
    """The rival: all heads get more as long as any is below the threshold. As :func:`refine`."""

    def worst(vertical: np.ndarray, slash: np.ndarray) -> np.ndarray:
        each = np.asarray(recall(vertical, slash))
        measured.append(each)
        return np.full_like(each, each.min())

    measured: list[np.ndarray] = []
    out = refine(worst, vertical, slash, threshold=threshold, step=step, cap=cap)
    return dataclasses.replace(out, recall=measured[-1])
