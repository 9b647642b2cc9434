"""Multiplication by a weight that may be a plain array or a codec's leaf.

Wherever a model holds a weight matrix, a leaf type of a weight codec may stand instead (quantised,
entropy-coded, sparse, or simply laid out differently). Models never look inside: they call
:func:`matmul` and :func:`take`, and the leaf does the rest.
"""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Weight = Any
"""An array, a ``ParamSpec``, a ``ShapeDtypeStruct`` or a :class:`WeightLeaf`."""


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
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1 if transpose else 0,)), ((), ())))


def take(w: Weight, ids: Int[Array, "*ids"]) -> Float[Array, "*ids outer"]:
    """Rows ``ids`` of an embedding matrix, plain or a leaf."""
    if isinstance(w, WeightLeaf):
        return w.take(ids)
    return jnp.take(w, ids, axis=0)
