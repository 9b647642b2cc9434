"""Tiny decoders that the tests of models share."""

import functools
from typing import Any

import jax
import numpy as np

from models import decoder
from models.params import Constant, ParamSpec


def config(**changes: Any) -> decoder.Config:
    """Three layers with grouped heads."""
    fields = {
        "vocab_size": 40, "hidden_size": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 4, "intermediate_size": 24, "max_length": 32,
    }  # fmt: skip
    return decoder.Config(**(fields | changes))


@functools.cache
def weights(cfg: decoder.Config, seed: int = 0) -> decoder.Params:
    """Random stacked weights, biases and norms too, made once per config and seed."""
    rng = np.random.default_rng(seed)

    def one(spec: ParamSpec) -> jax.Array:
        constant = spec.init.value if isinstance(spec.init, Constant) else 0.0
        return jax.numpy.asarray(constant + 0.25 * rng.normal(size=spec.shape), spec.dtype)

    return jax.tree.map(one, decoder.specs(cfg))


def tokens(rows: int = 2, length: int = 10, vocab: int = 40, seed: int = 0) -> jax.Array:
    """Random token ids (rows, length)."""
    rng = np.random.default_rng(seed)
    return jax.numpy.asarray(rng.integers(0, vocab, (rows, length)), "int32")
