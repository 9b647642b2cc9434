"""How well a draft layer follows its target, at every position and for every step of a draft."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models import decoder, longspec
from models.attention import AttentionPolicy, Step

STEPS = 4
"""Steps of a draft that are measured: step i lacks the target's newest i entries."""


@struct.dataclass
class Outcomes:
    """Teacher-forced, so every step reads the text and not what the drafter would have written."""

    hits: Any  # (steps, b, t) bool, the drafter's best token is the target's
    nats: Any  # (steps, b, t) float32, the drafter's loss on the next token
    target_nats: Any  # (b, t) float32, the target's own


def target_entries(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: AttentionPolicy,
    tokens: Int[Array, "b t"],
    step: Step,
) -> tuple[Float[Array, "b t g wide"], Float[Array, "b t g d"]]:
    """The target's last keys (as cached) and values; its last layer runs no further than there."""
    below = decoder.LayerChoice(stop=cfg.num_layers - 1)
    out = decoder.forward(params, cfg, tokens, step=step, policy=policy, layers=below)
    where = longspec.place(policy, cfg, step)
    return longspec.last_layer_entries(params, cfg, out.pre_norm, where)


def draft_hidden(
    params: longspec.Params,
    draft: longspec.LongSpecConfig,
    target: decoder.Params,
    cfg: decoder.Config,
    policy: AttentionPolicy,
    tokens: Int[Array, "b t"],
    step: Step,
    entries: tuple[Array, Array],
    shift: Int[Array, ""] | int,
) -> Float[Array, "b t width"]:
    """What the target's head reads of the drafter at every token of a text."""
    where = longspec.place(policy, cfg, step)
    embeds = longspec.embed(target, cfg, tokens, where)
    return longspec.forward(params, draft, cfg, embeds, where, entries, shift)


def outcomes(
    params: longspec.Params,
    draft: longspec.LongSpecConfig,
    target: decoder.Params,
    cfg: decoder.Config,
    policy: AttentionPolicy,
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    step: Step,
) -> Outcomes:
    """All steps of a draft over texts; the logits of one step exist at a time."""
    out = decoder.forward(target, cfg, tokens, step=step, policy=policy)
    best, target_nats = _read(decoder.unembed(target, cfg, out.hidden), targets)
    entries = target_entries(target, cfg, policy, tokens, step)

    def one(shift: Array) -> tuple[Bool[Array, "b t"], Float[Array, "b t"]]:
        hidden = draft_hidden(params, draft, target, cfg, policy, tokens, step, entries, shift)
        chosen, nats = _read(decoder.unembed(target, cfg, hidden), targets)
        return chosen == best, nats

    hits, nats = jax.lax.map(one, jnp.arange(1, STEPS + 1, dtype=jnp.int32))
    return Outcomes(hits, nats, target_nats)


def _read(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"]
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """The best token, and the loss on the given one."""
    given = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1) - given
