"""Features of points from a hash grid: at once, or by rows and weights found beforehand."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from ops.hash_grid.reference import (
    HashGridConfig,
    check_points,
    hashgrid_indices,
    hashgrid_meta,
    interpolate,
)


@struct.dataclass
class Lookup:
    """Where points read a table, and with what weights.

    It depends on the points only. A fixed set of points (the pixels of an image) makes it once,
    and a training step is then one gather.
    """

    index: Any  # (*batch, levels, corners) int32, rows of the whole table
    weights: Any  # (*batch, levels, corners)


def hashgrid_lookup(x: Float[Array, "*batch d"], cfg: HashGridConfig) -> Lookup:
    """Rows of the whole table and weights for every point, level and corner.

    Memory: ``8 * levels * 2^d`` bytes per point.

    Raises:
        ValueError: ``x`` has another number of coordinates than the grid.
    """
    rows, weights = hashgrid_indices(x, cfg)
    offsets = jnp.asarray(hashgrid_meta(cfg).offsets[:-1, None])
    index = rows.astype(jnp.int32) + jnp.broadcast_to(offsets, rows.shape)
    return Lookup(index, weights)


def hashgrid_gather(
    table: Float[Array, "rows features"], lookup: Lookup
) -> Float[Array, "*batch channels"]:
    """Features (levels * features per point, level-major) of points whose lookup is known."""
    return interpolate(table, lookup.index, lookup.weights)


def hashgrid_encode(
    table: Float[Array, "rows features"], x: Float[Array, "*batch d"], cfg: HashGridConfig
) -> Float[Array, "*batch channels"]:
    """Features of points: ``levels * n_features`` channels, level-major, feature-minor.

    Continuous in ``x`` everywhere except where a dense level wraps around (its last half cell), and
    differentiable by ``table`` and, inside cells, by ``x``.

    Args:
        table: the levels' rows one after the other, see :func:`hashgrid_meta`.
        x: float32 coordinates, nominally in [0, 1].

    Raises:
        ValueError: points or table that do not fit the grid.
    """
    check_points(x, cfg)
    wanted = (hashgrid_meta(cfg).rows, cfg.n_features)
    if table.shape != wanted:
        raise ValueError(f"the table has shape {table.shape} but this grid needs {wanted}.")
    return hashgrid_gather(table, hashgrid_lookup(x, cfg))
