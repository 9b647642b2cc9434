"""The likeliest token of many hidden states and how likely it is, without their logits.

For methods that read tokens out of every layer: states times vocabulary would be large, and only
two numbers of each row are wanted. The vocabulary is read in blocks with running sums, as in an
online softmax.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import decoder
from models.draft_head import head_rows
from models.layers import normalize


def likeliest_tokens(
    params: decoder.Params,
    cfg: decoder.Config,
    states: Float[Array, "*batch width"],
    block: int = 1024,
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """Argmax (the lowest id on ties) and its softmax probability, float32, of ``unembed``.

    Args:
        states: hidden states before the final norm, which is applied to them.
        block: tokens of the vocabulary that are scored at a time; static.
    """
    hidden = normalize(states, params.final_norm, cfg.norm_eps).reshape(-1, states.shape[-1])
    block = min(block, cfg.vocab_size)

    def add(carry: tuple[Array, Array, Array], start: Array) -> tuple[Any, None]:
        top, token, total = carry
        ids = start + jnp.arange(block, dtype=jnp.int32)
        rows = head_rows(params, cfg, jnp.minimum(ids, cfg.vocab_size - 1))
        logits = (hidden @ rows.T).astype(jnp.float32)
        logits = jnp.where((ids < cfg.vocab_size)[None], logits, -jnp.inf)
        best = jnp.argmax(logits, axis=-1)
        here = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
        higher = jnp.maximum(top, here)
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[:, None]).sum(-1)
        return (higher, jnp.where(here > top, ids[best], token), total), None

    count = hidden.shape[0]
    empty = (
        jnp.full((count,), -jnp.inf, jnp.float32),
        jnp.zeros((count,), jnp.int32),
        jnp.zeros((count,), jnp.float32),
    )
    starts = jnp.arange(0, cfg.vocab_size, block, dtype=jnp.int32)
    (_, token, total), _ = jax.lax.scan(add, empty, starts)
    shape = states.shape[:-1]
    return token.reshape(shape), (1 / total).reshape(shape)
