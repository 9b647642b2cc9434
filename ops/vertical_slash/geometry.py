"""Where a run of queries and the three segments of its keys lie.

Everything here is in slots of the row, so a diagonal is named by the slot that the run's last
query meets on it, and is the same number in every segment it passes through.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int

INTER, SUCCESSIVE, INTRA = range(3)
"""The segments in the order of their slots."""


@flax.struct.dataclass
class Geometry:
    """A run of queries within one chunk of c slots, for every row of a batch.

    Row i's queries stand at positions first[i] .. first[i] + counts[i] - 1. Segment x of its keys
    lies in slots bases[x, i] <= j < ends[x, i]: all chunks before the last, the chunk before the
    queries' own, and the queries' own up to the last query. A segment that does not exist is
    empty.
    """

    first: Any  # (b,) int32
    counts: Any  # (b,) int32
    bases: Any  # (3, b) int32
    ends: Any  # (3, b) int32

    @property
    def end(self) -> Int[Array, " b"]:
        """Slots up to and with the last query's."""
        return self.first + self.counts

    @property
    def straight(self) -> Int[Array, "3 b"]:
        """The diagonal of distance 0 in each segment's own frame.

        Distances are counted from the last query to its own slot in the intra segment, and in the
        others as if their end met the run's first query.
        """
        return jnp.where(_rows(INTRA), self.ends, self.ends + self.counts[None]) - 1

    def diagonals(self, s: int) -> Array:
        """(3, b, s) bool: the diagonals that a segment takes up."""
        slots = jnp.arange(s, dtype=jnp.int32)[None, None]
        last = jnp.where(_rows(INTRA), self.ends, self.ends + self.counts[None])[..., None]
        exists = (self.bases < self.ends)[..., None]
        return exists & (slots >= self.bases[..., None]) & (slots < last)

    def columns(self, s: int) -> Array:
        """(3, b, s) bool: the slots of a segment."""
        slots = jnp.arange(s, dtype=jnp.int32)[None, None]
        return (slots >= self.bases[..., None]) & (slots < self.ends[..., None])


def geometry(first: Int[Array, " b"], counts: Int[Array, " b"], stride: int) -> Geometry:
    """The segments of runs that do not cross a multiple of the stride."""
    own = first // stride * stride
    before = jnp.maximum(own - stride, 0)
    zero = jnp.zeros_like(own)
    return Geometry(
        first=first,
        counts=counts,
        bases=jnp.stack([zero, before, own]),
        ends=jnp.stack([before, own, first + counts]),
    )


def _rows(segment: int) -> Array:
    return (jnp.arange(3) == segment)[:, None]
