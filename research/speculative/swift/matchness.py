"""How well a model without some sub-layers predicts what the whole one wrote.

The supervision of SWIFT's search (arXiv 2410.06916): one parallel pass over text that is there.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from inference.cache import Cache
from inference.drafter import Target
from inference.drafters.scratch import run_scratch
from models import decoder
from models.decoder import LayerChoice
from research.speculative.swift.search import SkipSet


def _windows(tokens: Int[Array, "b l"], begin: Int[Array, " b"], window: int) -> Int[Array, "b w"]:
    index = begin[:, None] + jnp.arange(window)[None]
    return jnp.take_along_axis(tokens, index, axis=1, mode="clip")


@functools.partial(jax.jit, static_argnames=("window", "extent"))
def window_logits(
    target: Target,
    cache: Cache,
    tokens: Int[Array, "b l"],
    begin: Int[Array, " b"],
    limit: Int[Array, " b"],
    skip: SkipSet,
    window: int,
    extent: int,
) -> Float[Array, "b w v"]:
    """Logits of ``window`` tokens of each text from ``begin`` on, without the skipped sub-layers.

    One parallel pass over the committed cache of everything before. The cache given is not changed.
    """
    inputs = jnp.maximum(_windows(tokens, begin, window), 0)
    layers = LayerChoice(skip_attention=skip.attention, skip_mlp=skip.mlp)
    out, _ = run_scratch(target, cache.up_to(begin), inputs, limit, extent, layers)
    return decoder.unembed(target.params, target.cfg, out.hidden)


@functools.partial(jax.jit, static_argnames=("window", "extent"))
def matchness(
    target: Target,
    cache: Cache,
    tokens: Int[Array, "b l"],
    begin: Int[Array, " b"],
    limit: Int[Array, " b"],
    skip: SkipSet,
    window: int,
    extent: int,
) -> Float[Array, " b"]:
    """The share of a window's tokens but the first that the skipped model predicts, per row."""
    logits = window_logits(target, cache, tokens, begin, limit, skip, window, extent)
    texts = _windows(tokens, begin, window)
    return jnp.mean(jnp.argmax(logits[:, :-1], axis=-1) == texts[:, 1:], axis=-1)
