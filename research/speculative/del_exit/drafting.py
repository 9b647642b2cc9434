"""A chain drafted by the target's own first layers, into its own cache.

Source: LayerSkip, arXiv 2404.16710. Keys and values of these layers stay in the scratch slots, and
the stream after every layer is kept, so that the target's pass goes on where the draft ended.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from inference.cache import Cache
from inference.drafter import Context, Target
from inference.drafters.scratch import run_scratch
from models import decoder
from models.decoder import LayerChoice
from models.layers import normalize
from ops.sampling import Use, request_key, sample


@struct.dataclass
class Drafted:
    """A chain in the making, and what is left of its making."""

    tokens: Any  # (b, n), the root first
    valid: Any
    states: Any  # (layers + 1, b, n, width), of the layers that drafted
    laws: Any = None  # (b, n, v)
    cache: Any = None

    def write(self, i: Array, states: Array, open_: Array, token: Array, law: Any) -> "Drafted":
        """With node ``i`` run, and node ``i + 1`` in the rows that still draft."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.at[:, i + 1].set(token, mode="drop"),
            valid=self.valid.at[:, i + 1].set(open_, mode="drop"),
            states=self.states.at[:, :, i].set(states),
            laws=None if law is None else self.laws.at[:, i].set(law),
        )


def draft_chain(
    exits: Int[Array, " b"],
    depth: Int[Array, ""],
    longest: Int[Array, " b"],
    threshold: Float[Array, " b"],
    target: Target,
    cache: Cache,
    root: Int[Array, " b"],
    context: Context,
    size: int,
    sampled: bool,
) -> Drafted:
    """Token by token through the target's first layers; the last drafted token is run too.

    Args:
        exits: each row's exit, whose token is drafted.
        depth: the deepest of them: so many layers run for all rows.
        longest: tokens to draft at most.
        threshold: a row's draft ends with a token of less confidence; NaN ends none.
        size: static, nodes with the root.
        sampled: static, draw the tokens of rows that sample.
    """
    batch, rows = root.shape[0], jnp.arange(root.shape[0])

    def step(carry: tuple) -> tuple:
        i, open_, cache, drafted = carry
        out, cache = run_scratch(
            target,
            cache,
            drafted.tokens[:, i][:, None],
            context.limit,
            context.extent,
            LayerChoice(stop=depth),
            all_hidden=True,
        )
        states = out.hidden_states[:, :, 0]
        token, confidence, law = jax.lax.cond(
            jnp.any(open_),
            lambda x: choose_token(target, x, context, i, sampled),
            lambda x: jax.tree.map(jnp.zeros_like, choose_token(target, x, context, i, sampled)),
            states[exits, rows],
        )
        drafted = drafted.write(i, states, open_, token, law)
        ended = confidence < threshold
        if context.eos is not None:
            ended |= jnp.any(token[:, None] == context.eos[None], axis=1)
        return i + 1, open_ & ~ended & (i + 2 <= longest), cache, drafted

    def going(carry: tuple) -> Array:
        i, _, _, drafted = carry
        return (i < size) & jnp.any(drafted.valid[:, jnp.minimum(i, size - 1)])

    layers, width = target.cfg.num_layers, target.params.final_norm.scale.shape[0]
    laws = (batch, size, target.cfg.vocab_size)
    dtype = target.params.final_norm.scale.dtype
    empty = Drafted(
        tokens=jnp.zeros((batch, size), jnp.int32).at[:, 0].set(root),
        valid=jnp.zeros((batch, size), bool).at[:, 0].set(True),
        states=jnp.zeros((layers + 1, batch, size, width), dtype),
        laws=jnp.zeros(laws, jnp.float32) if sampled else None,
    )
    start = (jnp.zeros((), jnp.int32), longest > 0, cache, empty)
    # Positions and scratch are of the loop alone; entries below are left for the target's pass.
    _, _, written, drafted = jax.lax.while_loop(going, step, start)
    return dataclasses.replace(drafted, cache=dataclasses.replace(cache, layers=written.layers))


def choose_token(
    target: Target, states: Float[Array, "b width"], context: Context, i: Array, sampled: bool
) -> tuple[Int[Array, " b"], Float[Array, " b"], Any]:
    """The next drafted token, how sure the exit is of it, and the law it is from."""
    hidden = normalize(states, target.params.final_norm, target.cfg.norm_eps)
    logits = decoder.unembed(target.params, target.cfg, hidden)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sure = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
    if not sampled:
        return best, sure, None
    sampling = context.sampling.per_row(logits.shape[0])
    laws = sampling.warp(logits)
    # Depth as sibling: exits and thresholds also follow tokens that were not decided on, so the
    # same index needs a fresh draw in a later round.
    keys = jax.vmap(lambda seed, at: request_key(seed, at + i, Use.DRAFT, i))(
        context.seeds, context.length
    )
    drawn = jax.vmap(sample)(keys, laws)
    likely = jnp.take_along_axis(laws, drawn[:, None], axis=1)[:, 0]
    hot = sampling.temperature > 0
    return jnp.where(hot, drawn, best), jnp.where(hot, likely, sure), laws
