"""EXSPEC's pool of sequences: which rows go together next, in the padded form of the paper.

Rows keep the left padding that they got, so what has to be equal is the PADDED length; rows with a
cache and without one are kept apart. The rule is that of :mod:`inference.scheduler`.

Source: arXiv 2510.22876 and its official code.
"""

import dataclasses
from collections.abc import Sequence

from inference.scheduler import first_full_group


@dataclasses.dataclass
class Row:
    """One row: its length without and with padding, whether it has a cache, whether it goes on."""

    content: int
    padded: int
    cached: bool = False
    active: bool = True


class SequencePool:
    """All rows of a job, a window over the unfinished ones, and steps of ``batch`` rows.

    Args:
        lengths: of the prompts.
        window: unfinished rows that are looked at.
        batch: rows per step.
        by_length: look at short prompts first. Rows keep their numbers.

    Raises:
        ValueError: no prompts, an empty one, or a window smaller than the batch.
    """

    def __init__(self, lengths: Sequence[int], window: int, batch: int, by_length: bool = False):
        if not lengths or min(lengths) < 1 or not 1 <= batch <= window:
            raise ValueError(
                f"a pool needs prompts of 1 token or more and 1 <= batch <= window, got "
                f"{len(lengths)} prompts, batch {batch}, window {window}."
            )
        self.rows = [Row(n, n) for n in lengths]
        self.batch, self.size = batch, window
        numbers = range(len(lengths))
        self._order = sorted(numbers, key=lambda i: lengths[i]) if by_length else list(numbers)

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return not any(row.active for row in self.rows)

    @property
    def window(self) -> list[int]:
        """The rows that are looked at, in order."""
        return [i for i in self._order if self.rows[i].active][: self.size]

    def next_batch(self) -> tuple[list[int], bool]:
        """The rows of the next step, and whether they were grouped by length.

        If not, they are realigned here: each is padded to the longest content among them. This is
        the only place where padding changes.

        Raises:
            ValueError: all rows have finished.
        """
        window = self.window
        if not window:
            raise ValueError("every row of the pool has finished: there is no next batch.")
        keys = [(self.rows[i].padded, self.rows[i].cached) for i in window]
        places, same = first_full_group(keys, self.batch)
        chosen = [window[place] for place in places]
        if not same:
            longest = max(self.rows[i].content for i in chosen)
            for i in chosen:
                self.rows[i].padded = longest
        return chosen, same

    def needs_prefill(self, rows: Sequence[int]) -> bool:
        """Whether these rows must be run from the start: one of them has no cache yet."""
        return not all(self.rows[i].cached for i in rows)

    def write_back(
        self, rows: Sequence[int], committed: Sequence[int], finished: Sequence[bool]
    ) -> None:
        """What a step added to its rows, and which of them are at their end.

        Raises:
            ValueError: a row that had finished before.
        """
        for i, count, end in zip(rows, committed, finished, strict=True):
            row = self.rows[i]
            if not row.active:
                raise ValueError(f"row {i} has finished: it cannot take part in a step.")
            row.content, row.padded = row.content + count, row.padded + count
            row.active, row.cached = not end, not end
