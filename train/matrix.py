"""Matrix products whose weight gradient is laid out for speed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from models import decoder
from ops.weights import Weight, WeightLeaf


@struct.dataclass
class TrainedMatrix(WeightLeaf):
    """A plain ``(in, out)`` matrix while it is trained.

    Its gradient is ``x.T @ dy``, and CPUs need the left factor of a product contiguous along the
    contracted axis, so one of the two is copied transposed. Automatic differentiation always
    copies ``dy``; this copies the narrower one, and ``x`` once for all matrices that read it.
    """

    w: Weight

    def matmul(self, x: Array, transpose: bool) -> Array:
        """See :meth:`WeightLeaf.matmul`."""
        return _product(x, self.w.T if transpose else self.w)

    def take(self, ids: Array) -> Array:
        """See :meth:`WeightLeaf.take`."""
        return jnp.take(self.w, ids, axis=0)

    def nbits(self) -> int:
        """See :meth:`WeightLeaf.nbits`."""
        return 8 * self.w.nbytes

    def nbytes(self) -> int:
        """See :meth:`WeightLeaf.nbytes`."""
        return self.w.nbytes


def wrap_matrices(layers: Any) -> Any:
    """``layers`` with the weight of every ``Linear`` (a leaf named ``w``) as a trained matrix."""

    def wrap(path: tuple, leaf: Any) -> Any:
        return TrainedMatrix(leaf) if getattr(path[-1], "name", None) == "w" else leaf

    return jax.tree_util.tree_map_with_path(wrap, layers)


def wrap_decoder(params: decoder.Params) -> decoder.Params:
    """A decoder whose layers have their matrices as trained ones."""
    segments = (dataclasses.replace(s, layers=wrap_matrices(s.layers)) for s in params.segments)
    return dataclasses.replace(params, segments=tuple(segments))


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w), (x, w)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] <= dy.shape[-1]:
        return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))
    return dx, jax.lax.dot_general(dy, x, ((rows, rows), ((), ()))).T


_product.defvjp(_forward, _backward)
