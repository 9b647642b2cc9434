"""Teacher-forced accuracy of drafting heads on held-out text.

Head i's guess at position s is scored against the text's token s + i + 2 (i from 0), given the true
tokens before it. For text that the target generated greedily that token is the target's argmax.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.cache import init_cache
from models import decoder, eagle
from models.attention import Step
from research.speculative.clover.objective import align


@struct.dataclass
class Hits:
    """Counts per head: guesses made, and how many had the token first or among the first three."""

    total: Any  # (heads,)
    top1: Any  # (heads,)
    top3: Any  # (heads,)

    def __add__(self, other: "Hits") -> "Hits":
        return Hits(self.total + other.total, self.top1 + other.top1, self.top3 + other.top3)

    def rates(self) -> dict[str, float]:
        """``top1/head1`` and so on, as fractions."""
        result = {}
        for i in range(self.total.shape[0]):
            made = max(float(self.total[i]), 1.0)
            result[f"top1/head{i + 1}"] = float(self.top1[i]) / made
            result[f"top3/head{i + 1}"] = float(self.top3[i]) / made
        return result


def count_hits(
    outputs: Float[Array, "heads b t width"],
    matrices: Float[Array, "#heads vocab width"],
    labels: Int[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Hits:
    """Hits of all heads; a token outside the draft vocabulary (label -1) is a miss.

    ``outputs`` are not aligned; ``labels`` and ``mask`` are as for the losses. Ranks count strictly
    larger logits, so ties favour the guess.
    """
    aligned = align(outputs)
    rows = jnp.arange(mask.shape[1])
    total, top1, top3 = [], [], []
    for i, hidden in enumerate(aligned):
        matrix = matrices[min(i, matrices.shape[0] - 1)]
        logits = jnp.einsum("btw,vw->btv", hidden, matrix, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)
        rank = jnp.sum(logits > chosen, axis=-1)
        weight = mask * (rows >= i)[None].astype(mask.dtype)
        known = weight * (labels >= 0).astype(mask.dtype)
        total.append(jnp.sum(weight))
        top1.append(jnp.sum(known * (rank < 1)))
        top3.append(jnp.sum(known * (rank < 3)))
    return Hits(jnp.stack(total), jnp.stack(top1), jnp.stack(top3))


def eagle_rollout(
    params: eagle.Params,
    target: decoder.Config,
    features: Float[Array, "b t width"],
    embeds: Float[Array, "b t width"],
    heads: int,
) -> Float[Array, "heads b t width"]:
    """The EAGLE-like drafter's ``heads`` successive outputs from every position at once.

    Step i continues each position s by its own earlier outputs and the true tokens. As in drafting
    it sees the true pairs up to s and, of the guessed ones, only its own: a mask over a cache with
    one block of positions per step.
    """
    b, t, _ = features.shape
    cache = init_cache(eagle.layer_config(target), b, heads * t, features.dtype)
    row = jnp.arange(t, dtype=jnp.int32)
    seen = row[:, None] >= row[None]
    outputs = []
    for i in range(heads):
        if i:
            seen = jnp.concatenate([seen, jnp.eye(t, dtype=bool)], axis=1)
        positions = jnp.broadcast_to(row[None] + i, (b, t))
        cache, start = cache.append_scratch(positions)
        step = Step(
            positions=positions,
            start=start,
            slot_positions=cache.positions,
            tree=jnp.broadcast_to(seen[None], (b, *seen.shape)),
            tree_start=cache.length,
            mode="decode",
        )
        features, layers = eagle.forward(params, target, features, embeds, step, cache.layers)
        cache = dataclasses.replace(cache, layers=layers)
        outputs.append(features)
        embeds = jnp.pad(embeds[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.stack(outputs)
