"""New tokens through a model's layers, or some of them, into scratch slots of its cache."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from inference.cache import Cache
from inference.drafter import Target
from models import decoder
from models.attention import Step


def run_scratch(
    target: Target,
    cache: Cache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None,
    extent: int | None,
    layers: decoder.LayerChoice | None = None,
    all_hidden: bool = False,
) -> tuple[decoder.Output, Cache]:
    """The pass over ``tokens`` behind what the cache holds, and the cache with them as scratch.

    Args:
        lengths: text length that length-dependent rotations are for; None takes the length so far.
        extent: slots that attention reads.
        layers: which layers and sub-layers run; the scratch entries of others stay as they were.
        all_hidden: return the stream after every layer.
    """
    ahead = cache.scratch[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = cache.next_position[:, None] + ahead
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        lengths=lengths,
        extent=extent,
        mode="decode",
    )
    out = decoder.forward(
        target.params,
        target.cfg,
        tokens,
        step=step,
        policy=target.policy,
        cache=cache.layers,
        layers=layers,
        all_hidden=all_hidden,
    )
    return out, dataclasses.replace(cache, layers=out.cache)
