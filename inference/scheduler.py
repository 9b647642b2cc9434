"""Which rows of a pool take part in the next device step.

With ragged rows any rows may go together at no cost, so the default is all of them. The rule of
EXSPEC (arXiv 2510.22876) chooses rows of equal length, which bounds the slots that attention reads.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Scheduler(Protocol):
    """A choice among the unfinished rows of a pool."""

    @property
    def batch(self) -> int | None:
        """Rows per step; None: all of the pool, as they lie."""
        ...

    def choose(self, lengths: Sequence[int]) -> tuple[list[int], bool]:
        """Places of the chosen rows, and whether they were grouped by length.

        ``lengths`` are of the unfinished rows, in the order in which they came. As many are chosen
        as a step takes, fewer only if there are no more.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Together:
    """All rows in every step."""

    batch: None = None

    def choose(self, lengths: Sequence[int]) -> tuple[list[int], bool]:
        """All places."""
        return list(range(len(lengths))), False


@dataclasses.dataclass(frozen=True)
class SameLength:
    """EXSPEC: the first ``batch`` rows of equal length in a window, else the window's first.

    Attributes:
        batch: rows per step.
        window: unfinished rows to look at, the earliest first.
        block: lengths count as equal within blocks of so many tokens; 1 is the paper's rule, a
            larger one what bounds the blocks that attention reads.

    Raises:
        ValueError: a window smaller than the batch, or sizes below 1.
    """

    batch: int
    window: int
    block: int = 1

    def __post_init__(self):
        if not 1 <= self.batch <= self.window or self.block < 1:
            raise ValueError(
                f"grouping needs 1 <= batch <= window and a block of at least 1, got batch "
                f"{self.batch}, window {self.window}, block {self.block}."
            )

    def choose(self, lengths: Sequence[int]) -> tuple[list[int], bool]:
        """See the class."""
        blocks = [-(-length // self.block) for length in lengths[: self.window]]
        return first_full_group(blocks, self.batch)


def first_full_group(keys: Sequence[Hashable], batch: int) -> tuple[list[int], bool]:
    """The places of the first ``batch`` equal keys, and True; or the first places, and False.

    Keys are read in order and the group that first reaches ``batch`` is taken at once: groups that
    stay smaller are not used. The fallback has fewer places if there are fewer keys.
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        group = groups.setdefault(key, [])
        group.append(place)
        if len(group) == batch:
            return group, True
    return list(range(min(batch, len(keys)))), False
