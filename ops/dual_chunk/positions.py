"""Where queries and keys stand for their rotation in dual chunk attention (arXiv 2402.17463).

Notation of this folder: C the chunk size, w the local size, c = C - w the stride. Token i lies in
chunk i // c. Keys are rotated once, at i mod c. A query has three rotations: for keys of its own
chunk (intra), of the chunk before (successive) and of all earlier ones (inter).
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int


@flax.struct.dataclass
class ChunkPositions:
    """Positions to rotate at, each shaped like the tokens' own.

    The critical ones serve the estimate of sparse attention: they are not clamped, so that
    relative positions stay true distances across the border of a query's chunk.
    """

    key: Any  # r = i mod c
    intra: Any  # r
    successive: Any  # min(r + c, C)
    inter: Any  # min(2c - 1, C)
    critical_successive: Any  # r + c
    critical_inter: Any  # r + C
    chunk: Any  # i // c


def check_sizes(chunk_size: int, local_size: int) -> int:
    """The stride c = chunk_size - local_size.

    Raises:
      ValueError: sizes that leave no stride.
    """
    if chunk_size < 1 or not 0 <= local_size < chunk_size:
        raise ValueError(
            f"dual chunk attention needs 0 <= local_size < chunk_size, got chunk_size {chunk_size} "
            f"and local_size {local_size}: a usual choice is 3/4 and 1/8 of the trained length."
        )
    return chunk_size - local_size


def chunk_positions(
    positions: Int[Array, "*rows t"], chunk_size: int, local_size: int
) -> ChunkPositions:
    """The rotations of dual chunk attention for tokens at `positions`.

    Relative positions are true distances within a chunk, and to the chunk before while i mod c is
    at most w; beyond they are between w + 1 and C, so nothing exceeds C.

    Raises:
      ValueError: see `check_sizes`.
    """
    stride = check_sizes(chunk_size, local_size)
    chunk = positions // stride
    within = positions - chunk * stride
    return ChunkPositions(
        key=within,
        intra=within,
        successive=jnp.minimum(within + stride, chunk_size),
        inter=jnp.full_like(within, min(2 * stride - 1, chunk_size)),
        critical_successive=within + stride,
        critical_inter=within + chunk_size,
        chunk=chunk,
    )
