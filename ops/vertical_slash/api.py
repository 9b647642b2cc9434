"""From queries and keys to the plan of their attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ops.block_sparse import SparsePlan
from ops.vertical_slash.blocks import share_of, to_plan
from ops.vertical_slash.estimate import column_and_diagonal_mass
from ops.vertical_slash.geometry import Geometry, geometry
from ops.vertical_slash.select import (
    Selection,
    by_segment,
    keep_columns,
    keep_diagonals,
    raised,
)

LAST_QUERIES = 64
"""Queries that the estimate is made from."""


def select(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    where: Geometry,
    vertical: Int[Array, "#b h"],
    slash: Int[Array, "#b h"],
    *,
    stride: int,
    scale: float | Float[Array, ""] | None = None,
    most: tuple[int, int],
    every: Bool[Array, " b"] | None = None,
    axis: str | None = None,
) -> Selection:
    """Columns and diagonals that matter to the last 64 queries of each row (arXiv 2407.02490).

    Args:
      q: queries in their critical rotations, intra, successive and inter, not clamped. Row i's
        first ``where.counts[i]`` are real.
      k: keys as they are cached.
      where: the run of queries, which does not cross a multiple of the stride.
      vertical, slash: budgets per head, data. A vertical budget of exactly 30 is raised to 130.
      stride: of dual chunk attention.
      scale: the factor on scores that the attention uses, default d ** -0.5. It changes the order.
      most: static bounds of the two budgets; what a budget has above is not used.
      every: rows that attend to everything.
      axis: a mesh axis that splits a row's slots; ``k`` is then this device's run of them, and what
        is selected is that of the whole row, on every device alike.
    """
    scaled_by = q.shape[-1] ** -0.5 if scale is None else scale
    size = min(LAST_QUERIES, q.shape[2])
    index = where.counts[:, None] - size + jnp.arange(size, dtype=jnp.int32)[None]
    valid, index = index >= 0, jnp.maximum(index, 0)
    columns, diagonals = column_and_diagonal_mass(
        jnp.take_along_axis(q, index[None, :, :, None, None], axis=2),
        k,
        where.first[:, None] + index,
        valid,
        stride=stride,
        scale=scaled_by,
        axis=axis,
    )
    return by_segment(
        keep_columns(columns, raised(vertical), where.end, most[0]),
        keep_diagonals(diagonals, slash, where.end, most[1]),
        where,
        every,
    )


def vertical_slash_plan(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    first: Int[Array, " b"],
    counts: Int[Array, " b"],
    vertical: Int[Array, "#b h"],
    slash: Int[Array, "#b h"],
    *,
    stride: int,
    scale: float | Float[Array, ""] | None = None,
    most: tuple[int, int],
    every: Bool[Array, " b"] | None = None,
    axis: str | None = None,
) -> SparsePlan:
    """The plan of t queries at positions from `first` on, within one chunk; see `select`.

    With an `axis` it lists the slots of the row that are among this device's.

    Raises:
      ValueError: a stride below 1, or a bound below 1.
    """
    if stride < 1 or min(most) < 1:
        raise ValueError(
            f"vertical-slash attention needs a stride and bounds of 1 or more, got stride {stride} "
            f"and bounds {most}."
        )
    where = geometry(first, counts, stride)
    selection = select(
        q, k, where, vertical, slash, stride=stride, scale=scale, most=most, every=every, axis=axis
    )
    plan = to_plan(selection, where, q.shape[2])
    if axis is None:
        return plan
    return share_of(plan, jax.lax.axis_index(axis) * k.shape[1], k.shape[1])
