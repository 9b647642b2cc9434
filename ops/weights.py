"""Multiplication by a weight that may be a plain array or a codec's leaf.

Wherever a model holds a weight matrix, a leaf type of a weight codec may stand instead (quantised,
entropy-coded, sparse, or simply laid out differently). Models never look inside: they call
:func:`matmul` and :func:`take`, and the leaf does the rest.
"""

import math
from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ops.platform import target_platform

Weight = Any
"""An array, a ``ParamSpec``, a ``ShapeDtypeStruct`` or a :class:`WeightLeaf`."""


FEW, PARTS = 64, 8
"""Up to how many rows a product with a matrix by rows is cut into parts on a CPU, and how many."""
LANES = 8
"""What a number of rows beyond half of it is filled up to a multiple of, there."""


class WeightLeaf:
    """What a codec's leaf offers in place of an ``(in, out)`` matrix.

    Subclasses are ``flax.struct.dataclass`` pytrees.
    """

    @abstractmethod
    def matmul(self, x: Array, transpose: bool) -> Array:
        """``x @ W``, or ``x @ W.T`` if ``transpose``; contracts the last axis of ``x``."""

    @abstractmethod
    def take(self, ids: Array) -> Array:
        """Rows of ``W`` (an embedding look-up): shape ``ids.shape + (out,)``."""

    @abstractmethod
    def nbits(self) -> int:
        """Information kept, in bits, without padding."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the buffers as allocated, padding included."""


class BlockLeaf:
    """A codec's leaf that stands for a whole layer rather than for one matrix."""

    @abstractmethod
    def open(self) -> Any:
        """The layer's parameters, decoded."""


def open_block(block: Any) -> Any:
    """A layer's parameters, decoded first if a codec holds the layer as one :class:`BlockLeaf`."""
    return block.open() if isinstance(block, BlockLeaf) else block


def matmul(
    x: Float[Array, "*batch inner"], w: Weight, transpose: bool = False
) -> Float[Array, "*batch outer"]:
    """``x @ w``, or ``x @ w.T`` if ``transpose``, for a plain ``(in, out)`` matrix or a leaf."""
    if isinstance(w, WeightLeaf):
        return w.matmul(x, transpose)
    return times_rows(x, w) if transpose else _product(x, w, 0)


def _product(x: Array, w: Array, axis: int) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (axis,)), ((), ())))


def times_rows(
    x: Float[Array, "*batch inner"], rows: Float[Array, "outer inner"]
) -> Float[Array, "*batch outer"]:
    """``x @ rows.T``.

    XLA's CPU compiler multiplies 2 to about 64 rows of x with such a matrix in two thirds of the
    time if the matrix is cut into parts, and 26 of them take it longer than 32.
    """
    count, (outer, inner) = math.prod(x.shape[:-1]), rows.shape
    parts = math.gcd(outer, PARTS)
    few = isinstance(count, int) and 1 < count <= FEW  # an exported program's sizes may be symbols
    if not few or parts == 1 or target_platform() != "cpu":
        return _product(x, rows, 1)
    split = rows.reshape(parts, outer // parts, inner)
    filling = -count % LANES if 2 * count > LANES else 0
    filled = jnp.pad(x.reshape(count, inner), ((0, filling), (0, 0)))
    found = jnp.einsum("mi,koi->kmo", filled, split)
    return jnp.moveaxis(found, 0, 1)[:count].reshape(*x.shape[:-1], outer)


def take(w: Weight, ids: Int[Array, "*ids"]) -> Float[Array, "*ids outer"]:
    """Rows ``ids`` of an embedding matrix, plain or a leaf."""
    if isinstance(w, WeightLeaf):
        return w.take(ids)
    return jnp.take(w, ids, axis=0)


@struct.dataclass
class Transposed(WeightLeaf):
    """An ``(in, out)`` matrix kept as ``(out, in)``; see :func:`models.layout.by_rows`."""

    rows: Weight

    def matmul(self, x: Array, transpose: bool) -> Array:
        """See :meth:`WeightLeaf.matmul`."""
        return _product(x, self.rows, 0) if transpose else times_rows(x, self.rows)

    def take(self, ids: Array) -> Array:
        """See :meth:`WeightLeaf.take`."""
        return jnp.moveaxis(jnp.take(self.rows, ids, axis=1), 0, -1)

    def nbits(self) -> int:
        """See :meth:`WeightLeaf.nbits`."""
        return 8 * self.rows.nbytes

    def nbytes(self) -> int:
        """See :meth:`WeightLeaf.nbytes`."""
        return self.rows.nbytes
