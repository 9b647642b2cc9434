"""Which keys each block of queries attends to: ranges of slots, and single slots."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool

BLOCK = 64
"""Queries that share a list, and the longest range of keys."""


@flax.struct.dataclass
class SparsePlan:
    """For b rows, h query heads and n blocks of 64 queries, counted from the call's first query.

    A block's queries see the union of its ranges and columns as far as causality lets them. No
    slot is listed twice, and none at or after a row's length. Ranges ascend, and so do columns.
    A range lies in one chunk of dual chunk attention or in several that are at least two before
    the queries', so that all its keys want the same of a query's three rotations; which one
    follows from slot // stride against position // stride. Entries at and after a count are 0;
    blocks past a row's last query have counts of 0.

    Attributes:
      starts, stops: int32 [b, h, n, R], slots start <= j < stop, at most 64 of them, perhaps none.
      range_counts: int32 [b, h, n], how many of the R ranges are meant.
      columns: int32 [b, h, n, C], single slots outside all ranges of the block.
      column_counts: int32 [b, h, n], how many of the C columns are meant.
    """

    starts: Any
    stops: Any
    range_counts: Any
    columns: Any
    column_counts: Any

    @property
    def meant_ranges(self) -> Bool[Array, "b h n R"]:
        """Which ranges are meant."""
        return _below(self.range_counts, self.starts.shape[3])

    @property
    def meant_columns(self) -> Bool[Array, "b h n C"]:
        """Which columns are meant."""
        return _below(self.column_counts, self.columns.shape[3])

    def validate(self, b: int, t: int, h: int) -> None:
        """Checks the shapes against b rows of t queries with h heads.

        Raises:
          ValueError: a field does not fit, with the shape that would.
        """
        lead = (b, h, -(-t // BLOCK))
        for name in ("starts", "stops", "columns"):
            shape = jnp.shape(getattr(self, name))
            if shape[:3] != lead or len(shape) != 4:
                raise ValueError(
                    f"SparsePlan.{name} has shape {shape}: {b} rows of {t} queries with {h} heads "
                    f"need {lead} and a list."
                )
        for name in ("range_counts", "column_counts"):
            shape = jnp.shape(getattr(self, name))
            if shape != lead:
                raise ValueError(
                    f"SparsePlan.{name} has shape {shape}: {b} rows of {t} queries with {h} heads "
                    f"need {lead}."
                )
        if jnp.shape(self.starts) != jnp.shape(self.stops):
            raise ValueError("SparsePlan needs as many starts as stops.")


def _below(counts: Array, size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)[None, None, None] < counts[..., None]
