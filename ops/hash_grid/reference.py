"""The multiresolution hash grid, exactly as instant-ngp's tiny-cuda-nn computes it.

Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding",
arXiv 2201.05989, and the grid encoding of tiny-cuda-nn, whose integer arithmetic is kept bit for
bit: vertices are int32 reinterpreted as uint32, so negative coordinates wrap around.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

PRIMES = (1, 2654435761, 805459861, 3674653429)
"""What the vertex numbers of each axis are multiplied with (modulo 2^32) before the XOR."""

UINT32_MAX = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class HashGridConfig:
    """A grid of several resolutions whose vertices hold features in one table.

    Attributes:
        n_dims: coordinates per point, 1 to 4.
        n_levels: resolutions, in geometric progression.
        n_features: features per vertex and level.
        log2_size: a level has at most 2^log2_size rows; finer ones are hashed.
        base_res: vertices (not cells) per axis of the coarsest level.
        max_res: vertices per axis of the finest level, up to float32 rounding.

    Raises:
        ValueError: a setting out of its range.
    """

    n_dims: int
    n_levels: int
    n_features: int
    log2_size: int
    base_res: int
    max_res: int

    def __post_init__(self):
        if not 1 <= self.n_dims <= len(PRIMES):
            raise ValueError(f"a hash grid has 1 to {len(PRIMES)} dimensions, got {self.n_dims}.")
        if self.n_levels < 1 or self.n_features < 1:
            raise ValueError(
                "a hash grid needs at least one level and one feature, got "
                f"n_levels={self.n_levels}, n_features={self.n_features}."
            )
        if not 3 <= self.log2_size <= 30:
            raise ValueError(f"log2_size is {self.log2_size}: choose 3 to 30.")
        if not 1 <= self.base_res <= self.max_res <= 2**24:
            raise ValueError(
                f"resolutions must satisfy 1 <= base_res <= max_res <= 2^24, got {self.base_res} "
                f"and {self.max_res}."
            )


class HashGridMeta(NamedTuple):
    """Per-level constants, computed once on the host (see :func:`hashgrid_meta`)."""

    scales: np.ndarray  # float32 (levels,): cells per unit of the coordinate
    resolutions: np.ndarray  # int32 (levels,): vertices per axis
    sizes: np.ndarray  # int32 (levels,): rows of the level
    offsets: np.ndarray  # int32 (levels + 1,): first row of each level; the last is the total

    @property
    def rows(self) -> int:
        """Rows of the whole table."""
        return int(self.offsets[-1])


def hashgrid_meta(cfg: HashGridConfig) -> HashGridMeta:
    """Scales, resolutions, sizes and offsets of all levels.

    The scales are float32 throughout, because resolutions are rounded up from them: where float32
    gives 255.00003, float64 would give one vertex fewer.

    Raises:
        ValueError: the table would have 2^31 rows or more.
    """
    one = np.float32(1)
    levels = max(cfg.n_levels - 1, 1)
    growth = np.float32(np.exp((np.log(cfg.max_res) - np.log(cfg.base_res)) / levels))
    log2_growth = np.log2(growth)
    number = np.arange(cfg.n_levels, dtype=np.float32)
    scales = np.float32(cfg.base_res) * np.exp2(number * log2_growth) - one
    resolutions = np.ceil(scales).astype(np.int64) + 1
    # Python integers: a power of a fine resolution overflows int64.
    vertices = [int(res) ** cfg.n_dims for res in resolutions]
    sizes = [min(-(-count // 8) * 8, 2**cfg.log2_size) for count in vertices]
    offsets = np.cumsum([0, *sizes])
    if offsets[-1] >= 2**31:
        raise ValueError(f"the table would have {offsets[-1]} rows: lower log2_size or n_levels.")
    return HashGridMeta(
        scales.astype(np.float32),
        resolutions.astype(np.int32),
        np.asarray(sizes, np.int32),
        offsets.astype(np.int32),
    )


def hashgrid_row(
    vertex: UInt32[Array, "*batch d"], resolution: int, size: int
) -> UInt32[Array, "*batch"]:
    """Row of a vertex within a level of ``size`` rows: dense where the vertices fit, else hashed.

    Dense rows count axis 0 fastest. ``resolution`` and ``size`` are static. All arithmetic is
    modulo 2^32, and both kinds end with a remainder by ``size``: a vertex outside of a dense level
    wraps around.
    """
    return _row([vertex[..., axis] for axis in range(vertex.shape[-1])], resolution, size)


def _row(vertex: Sequence[Array], resolution: int, size: int) -> Array:
    """:func:`hashgrid_row` of vertices given axis by axis."""
    # A dense level so fine that its vertices cannot be numbered in uint32 is hashed.
    if min(resolution ** len(vertex), UINT32_MAX) <= size:
        parts = [v * jnp.uint32(resolution**axis) for axis, v in enumerate(vertex)]
        row = functools.reduce(jnp.add, parts)
    else:
        parts = [v * jnp.uint32(prime) for v, prime in zip(vertex, PRIMES, strict=False)]
        row = functools.reduce(jnp.bitwise_xor, parts)
    return row % jnp.uint32(size)


def hashgrid_indices(
    x: Float[Array, "*batch d"], cfg: HashGridConfig
) -> tuple[UInt32[Array, "*batch levels corners"], Float[Array, "*batch levels corners"]]:
    """Rows within their level and weights of the 2^d corners of each point's cells.

    Bit k of a corner's number is set for the upper vertex along axis k. The weights are those of
    linear interpolation: not negative, with sum 1, and differentiable by ``x`` inside a cell.

    Args:
        x: float32 coordinates, nominally in [0, 1]; others, also negative ones, wrap around.

    Raises:
        ValueError: ``x`` has another number of coordinates than the grid.
    """
    check_points(x, cfg)
    meta = hashgrid_meta(cfg)
    bits = np.asarray(list(itertools.product((0, 1), repeat=cfg.n_dims)), np.uint32)[:, ::-1]
    bits = bits.T.reshape(cfg.n_dims, *(1,) * (x.ndim - 1), -1)  # (d, ..., corners)
    rows, weights = [], []
    for scale, resolution, size in zip(
        meta.scales, meta.resolutions.tolist(), meta.sizes.tolist(), strict=True
    ):
        position = fused_multiply_add(x, scale, 0.5)
        cell = jnp.floor(position)
        upper = position - jax.lax.stop_gradient(cell)
        # By way of int32: the conversion of a negative float to uint32 is undefined.
        lowest = jax.lax.bitcast_convert_type(cell.astype(jnp.int32), jnp.uint32)
        axes = range(cfg.n_dims)
        vertex = [lowest[..., axis, None] + bits[axis] for axis in axes]
        rows.append(_row(vertex, resolution, size))
        sides = [upper[..., axis, None] for axis in axes]
        weights.append(
            math.prod(jnp.where(bits[axis] == 1, sides[axis], 1 - sides[axis]) for axis in axes)
        )
    return jnp.stack(rows, axis=-2), jnp.stack(weights, axis=-2)


def interpolate(
    table: Float[Array, "rows features"],
    index: Int[Array, "*batch levels corners"],
    weights: Float[Array, "*batch levels corners"],
) -> Float[Array, "*batch channels"]:
    """Weighted sums of table rows, level-major, feature-minor. ``index`` counts in the table.

    Corner by corner, so that all corners' features never exist at once. The gradient with respect
    to the table is a scatter-add of the cotangent at the same rows.
    """
    out = jnp.zeros((*index.shape[:-1], table.shape[1]), table.dtype)
    for corner in range(index.shape[-1]):
        out += table[index[..., corner]] * weights[..., corner, None].astype(table.dtype)
    return out.reshape(*index.shape[:-2], -1)


def check_points(x: Array, cfg: HashGridConfig) -> None:
    """Raise ValueError if points do not fit the grid."""
    if x.shape[-1] != cfg.n_dims:
        raise ValueError(
            f"the grid has n_dims={cfg.n_dims} but the points have {x.shape[-1]} coordinates."
        )


def fused_multiply_add(
    x: Float[Array, "*shape"], scale: np.float32, shift: float
) -> Float[Array, "*shape"]:
    """``scale * x + shift`` rounded once, as a GPU's fma does, for float32 ``x``.

    A second rounding moves a position by up to 2^-16 of a cell at resolution 256, which is more
    than two implementations may differ by. Factors are split into halves of 12 bits, so that every
    partial product is exact and a compiler may or may not contract products and sums.
    """
    high = np.float32(scale).view(np.uint32) & np.uint32(0xFFFFF000)
    scale_high = high.view(np.float32)
    scale_low = np.float32(scale) - scale_high
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    x_high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    x_low = x - x_high  # carries the gradient: the bits of x_high have none
    total, error = _two_sum(scale_high * x_high, jnp.float32(shift))
    low, low_error = _two_sum(scale_high * x_low, scale_low * x_high)
    low, sum_error = _two_sum(low, error)
    total, error = _two_sum(total, low)
    return total + (error + (low_error + sum_error + scale_low * x_low))


def _two_sum(
    a: Float[Array, "*shape"], b: Float[Array, "*#shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The rounded sum and its rounding error, whichever of the two is larger."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
