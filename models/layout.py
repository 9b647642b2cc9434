"""How a model's matrices lie in memory while it decodes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import decoder
from models.layers import Linear
from models.load import Model
from ops.platform import target_platform
from ops.weights import Transposed


def for_decoding(model: Model) -> Model:
    """A model with its layers unstacked and its matrices laid out by rows; see :func:`by_rows`."""
    return dataclasses.replace(model, params=by_rows(decoder.unstack(model.params)))


def by_rows(tree: Any) -> Any:
    """Weights with every matrix of a :class:`~models.layers.Linear` kept as ``(out, in)``.

    On a CPU a pass over 2 to about 64 tokens, such as one that verifies a draft, then takes a tenth
    to a sixth less; a pass over one token takes what it took (``experiments.bench_layout``).
    Stacked layers, matrices that a codec holds, and everything on another platform stay as they
    are. Only for decoding on one device: training, export and sharding want plain matrices.

    Args:
        tree: of a decoder whose layers are unstacked (:func:`models.decoder.unstack`), or of a
            drafter. Its matrices are copied.
    """
    if target_platform() != "cpu":
        return tree

    def turn(node: Any) -> Any:
        if not isinstance(node, Linear) or not isinstance(node.w, jax.Array) or node.w.ndim != 2:
            return node
        return dataclasses.replace(node, w=Transposed(jnp.array(node.w.T)))

    return jax.tree.map(turn, tree, is_leaf=lambda node: isinstance(node, Linear))
