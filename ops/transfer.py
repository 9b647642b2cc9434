"""Verification that pulls the target's law towards the drafter's: RAPID's knowledge transfer.

The drafter of RAPID knows something that the target may not (it reads a short retrieved context),
so acceptance compares with a target law moved by one gradient step of T^2 KL(q||p), of size eta.

Lossless only for eta = 0. At a drafted index the emitted token has the law
m + (1 - sum m) norm(max(p - m, 0)), m = min(q, p_hat): above p wherever q and p_hat both are.

Source: arXiv 2502.20330 and its official code.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from ops.acceptance import accepts, residual

Guard = Literal["teacher", "shifted"]
GUARDS = ("teacher", "shifted", None)


@struct.dataclass
class Transfer:
    """How far, and where, the target's law is moved. Build it with :meth:`make`.

    ``guard`` says which tokens move: ``teacher``, those with q >= alpha max q (the official code);
    ``shifted``, those whose moved probability is at least alpha times the greatest (the paper, by
    a published note); None, all.
    """

    eta: Any
    alpha: Any
    guard: Guard | None = struct.field(pytree_node=False, default="teacher")

    @classmethod
    def make(
        cls, eta: float = 10.0, alpha: float = 0.1, guard: Guard | None = "teacher"
    ) -> "Transfer":
        """Checked settings.

        Raises:
            ValueError: a negative eta, alpha outside [0, 1], or an unknown guard.
        """
        if eta < 0 or not 0 <= alpha <= 1 or guard not in GUARDS:
            raise ValueError(
                f"transfer needs eta of 0 (lossless) or more, alpha within 0 and 1 and a guard of "
                f"{', '.join(map(str, GUARDS))}; got {eta}, {alpha} and {guard!r}."
            )
        return cls(np.float32(eta), np.float32(alpha), guard)


def shift_logits(
    logits: Float[Array, "*b v"],
    p: Float[Array, "*b v"],
    q: Float[Array, "*b v"],
    transfer: Transfer,
) -> Float[Array, "*b v"]:
    """``logits`` + eta (q - p) where the guard lets a token move; -inf stays.

    Args:
        logits: the target's, over temperature, -inf for tokens that its warping removes.
        p: the law of ``logits``.
        q: the drafter's law.
    """
    possible = logits > -jnp.inf
    moved = logits + jnp.where(possible, transfer.eta * (q - p), 0.0)
    if transfer.guard is None:
        return moved
    law = q if transfer.guard == "teacher" else jax.nn.softmax(moved, axis=-1)
    plausible = law >= transfer.alpha * jnp.max(law, axis=-1, keepdims=True)
    return jnp.where(plausible, moved, logits)


def shifted_law(
    p: Float[Array, "*b v"], q: Float[Array, "*b v"], transfer: Transfer
) -> Float[Array, "*b v"]:
    """p_hat: the target's law after the transfer."""
    logits = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)
    return jax.nn.softmax(shift_logits(logits, p, q, transfer), axis=-1)


def emitted_law(
    p: Float[Array, "*b v"], q: Float[Array, "*b v"], transfer: Transfer
) -> Float[Array, "*b v"]:
    """The exact law of the token emitted at a drafted index that is reached."""
    both = jnp.minimum(q, shifted_law(p, q, transfer))
    rest = 1.0 - jnp.sum(both, axis=-1, keepdims=True)
    return both + rest * residual(p, both)


def verify_transfer_with_uniforms(
    target_probs: Float[Array, "b k1 v"],
    draft_probs: Float[Array, "b k v"],
    draft_tokens: Int[Array, "b k"],
    uniforms: Float[Array, "b k"],
    transfer: Transfer,
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Int[Array, " b"], Float[Array, "b v"]]:
    """Number of accepted tokens of drafted chains, and the law of the token that follows.

    Token k is kept if all before it are and ``uniforms <= p_hat/q``. After a rejection the law is
    norm(max(p - min(q, p_hat), 0)); with all accepted, or where the chain ends early because the
    next slot is not ``valid``, it is the target's own p.
    """
    p, q = target_probs.astype(jnp.float32), draft_probs.astype(jnp.float32)
    valid = jnp.ones(draft_tokens.shape, bool) if valid is None else valid
    p_hat = shifted_law(p[:, :-1], q, transfer)
    token = jnp.maximum(draft_tokens, 0)[..., None]
    hat_token = jnp.take_along_axis(p_hat, token, axis=-1)[..., 0]
    q_token = jnp.take_along_axis(q, token, axis=-1)[..., 0]
    kept = accepts(uniforms, hat_token, q_token) & valid
    accepted = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=-1), axis=-1)
    last = accepted[:, None, None]
    p_next = jnp.take_along_axis(p, last, axis=1)[:, 0]
    both = jnp.pad(jnp.minimum(q, p_hat), ((0, 0), (0, 1), (0, 0)))
    both_next = jnp.take_along_axis(both, last, axis=1)[:, 0]
    rejected = jnp.take_along_axis(jnp.pad(valid, ((0, 0), (0, 1))), accepted[:, None], axis=1)
    return accepted, jnp.where(rejected, residual(p_next, both_next), p_next)


def verify_transfer_greedily(
    target_logits: Float[Array, "b k1 v"],
    draft_probs: Float[Array, "b k v"],
    draft_tokens: Int[Array, "b k"],
    transfer: Transfer,
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Number of accepted tokens of chains drafted greedily, and the token that follows.

    Every token, also the one after the accepted ones, is the argmax of the moved logits; beyond
    the last drafted token there is nothing to move towards. The official code has no greedy rule
    (it verifies greedy drafts by chance); this one is ours.

    Args:
        draft_probs: the drafter's laws at temperature 1.
    """
    valid = jnp.ones(draft_tokens.shape, bool) if valid is None else valid
    logits, q = target_logits.astype(jnp.float32), draft_probs.astype(jnp.float32)
    head = logits[:, :-1]
    moved = shift_logits(head, jax.nn.softmax(head, axis=-1), q, transfer)
    moved = jnp.where(valid[..., None], moved, head)
    best = jnp.argmax(jnp.concatenate([moved, logits[:, -1:]], axis=1), axis=-1).astype(jnp.int32)
    kept = (best[:, :-1] == draft_tokens) & valid
    accepted = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=-1), axis=-1)
    return accepted, jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
