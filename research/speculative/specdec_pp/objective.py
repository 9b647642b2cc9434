"""SpecDec++'s labels and loss: mixed texts, soft labels, weighted binary cross-entropy.

Source: arXiv 2405.19715 and its released training code.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORED = -100.0
"""Label of a position that does not count."""


def acceptance_labels(
    target_logp: Float[Array, "*batch"], draft_logp: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """``min(1, p / q)`` of drafted tokens from their float32 log-probabilities."""
    return jnp.exp(jnp.minimum(0.0, target_logp - draft_logp))


def mix_tokens(
    taken: Bool[Array, "*batch"],
    target_tokens: Int[Array, "*batch"],
    drafted: Int[Array, "*batch"],
    labels: Float[Array, "*batch"],
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """The text that the head is trained on, and its labels.

    Where ``taken`` the target's own token stands and nothing is learnt; elsewhere the drafted one.
    The head so meets its own draft's tokens in the prefix, as when it is used, while the labels
    keep the laws after the target's text: both are intended.
    """
    return jnp.where(taken, target_tokens, drafted), jnp.where(taken, IGNORED, labels)


def acceptance_loss(
    logits: Float[Array, "*batch 2"], labels: Float[Array, "*batch"], rejection_weight: float
) -> Float[Array, ""]:
    """Soft binary cross-entropy with rejections weighted, over positions that count.

    ``sum[w (1 - y)(-log P_rejected) + y (-log P_accepted)] / (w sum(1 - y) + sum y)``; 0 if nothing
    counts. With ``rejection_weight`` 1 and labels of 0 and 1 it is the plain one.
    """
    counts = labels >= 0
    y = jnp.where(counts, labels, 0.0)
    accepted = jnp.where(counts, y, 0.0)
    rejected = jnp.where(counts, rejection_weight * (1.0 - y), 0.0)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    total = -jnp.sum(rejected * log_p[..., 0] + accepted * log_p[..., 1])
    weight = jnp.sum(rejected + accepted)
    return total / jnp.where(weight > 0, weight, 1.0)
