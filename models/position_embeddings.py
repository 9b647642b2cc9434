"""What is added to token embeddings to say where they stand, at whole and at real positions.

A text longer than a table of learned positions is read by interpolating between its rows, as
positional tables of vision transformers are resized. Sinusoids are those of arXiv 1706.03762.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.weights import Weight, take


def sinusoids(positions: Array, width: int) -> Float[Array, "*rows width"]:
    """sin and cos of ``position / 10000**(2j / width)`` in turn, float32; ``width`` is even."""
    rates = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[..., None] * rates.reshape((1,) * positions.ndim + (-1,))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, width)


def learned(table: Weight, positions: Array) -> Float[Array, "*rows width"]:
    """Rows of a table: by number, or at real positions on the line between two rows."""
    if jnp.issubdtype(positions.dtype, jnp.integer):
        return take(table, positions.astype(jnp.int32))
    below = jnp.floor(positions)
    share = (positions - below)[..., None].astype(table.dtype)
    first = below.astype(jnp.int32)
    # A position on the last row has nothing above it.
    second = jnp.minimum(first + 1, table.shape[0] - 1)
    return take(table, first) * (1 - share) + take(table, second) * share


def resized(grid: Float[Array, "h w width"], shape: tuple[int, int]) -> Float[Array, "p q width"]:
    """A table over a grid resized to another grid, linearly, corners on corners."""
    h, w = grid.shape[:2]
    for axis, (old, new) in enumerate(((h, shape[0]), (w, shape[1]))):
        at = jnp.arange(new, dtype=jnp.float32) * ((old - 1) / max(new - 1, 1))
        rows = jnp.moveaxis(grid, axis, 0)
        flat = learned(rows.reshape(old, -1), at)
        grid = jnp.moveaxis(flat.reshape(new, *rows.shape[1:]), 0, axis)
    return grid


def grid_sinusoids(shape: tuple[int, int], width: int) -> Float[Array, "h w width"]:
    """Sinusoids of a grid: half of the channels tell the row, half the column.

    Raises:
        ValueError: ``width`` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sinusoids of a grid need a width that 4 divides, got {width}.")
    rows, columns = (sinusoids(jnp.arange(n), width // 2) for n in shape)
    halves = (
        jnp.broadcast_to(rows[:, None], (*shape, width // 2)),
        jnp.broadcast_to(columns[None], (*shape, width // 2)),
    )
    return jnp.concatenate(halves, -1)
