"""Queries that come in three rotations, as dual chunk attention has them (see `ops.dual_chunk`).

Slot j holds position j, so that a block of slots whose size divides the stride lies in one chunk,
and all its keys want the same rotation of a query.
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


def kernel_block(stride: int | None, most: int, multiple: int = 128) -> int:
    """Slots per key block: at most `most`, and within one chunk if there is a stride.

    Raises:
      ValueError: `most` or the stride is off the grid of TPU blocks.
    """
    if most % multiple:
        raise ValueError(f"TPU block sizes must be multiples of {multiple}; got {most}")
    if stride is not None and stride % multiple:
        raise ValueError(
            f"the kernels of dual chunk attention need a stride that is a multiple of {multiple}; "
            f"got {stride}: choose chunk_size - local_size so, or implementation='xla'"
        )
    return most if stride is None else math.gcd(most, stride)
