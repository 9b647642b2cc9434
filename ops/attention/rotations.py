"""Queries that come in three rotations, as dual chunk attention has them (see `ops.dual_chunk`).

Slots hold consecutive positions from a multiple of the block's size on, so that a block whose size
divides the stride lies in one chunk, and all its keys want the same rotation of a query.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def rotation_of(q_chunk: Int[Array, "..."], k_chunk: Int[Array, "..."]) -> Int[Array, "..."]:
    """Which of a query's rotations a key wants: 0 intra, 1 successive, 2 inter."""
    return jnp.clip(q_chunk - k_chunk, 0, 2)


def pick(three: Any, which: Any) -> Any:
    """Entry `which` of three arrays, elementwise."""
    return jnp.where(which == 0, three[0], jnp.where(which == 1, three[1], three[2]))


def pick_rows(three: Any, which: Any) -> Any:
    """Rows of queries in a kernel, each in its own rotation: which is int32 [rows, 1].

    Selected in float32: masks of 32-bit numbers do not fit the tiles of narrower ones.
    """
    return pick([x.astype(jnp.float32) for x in three], which).astype(three[0].dtype)


def kernel_block(
    stride: int | None, most: int, share: int | None = None, multiple: int = 128
) -> int:
    """Slots per key block: at most `most`, and within one chunk if there is a stride.

    Args:
      share: slots, if they are a share of a row's, which may begin at any multiple of their number.

    Raises:
      ValueError: `most`, the stride or the share is off the grid of TPU blocks.
    """
    if most % multiple:
        raise ValueError(f"TPU block sizes must be multiples of {multiple}; got {most}")
    if stride is not None and stride % multiple:
        raise ValueError(
            f"the kernels of dual chunk attention need a stride that is a multiple of {multiple}; "
            f"got {stride}: choose chunk_size - local_size so, or implementation='xla'"
        )
    if share is not None and share % multiple:
        raise ValueError(
            f"the kernels of dual chunk attention need shares of a multiple of {multiple} slots; "
            f"got {share}: choose a longer cache or fewer devices, or implementation='xla'"
        )
    return most if stride is None else math.gcd(most, stride, share or 0)
