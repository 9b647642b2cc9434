"""Acceptance of drafted tokens at one node, and along a chain: the arithmetic of exactness.

A drafted token x, really drawn from q, is kept with probability min(1, p(x)/q(x)); after a
rejection the target's law shrinks to norm(max(p - q, 0)). A token of a fixed set has q = 1.

Sources: Leviathan et al. arXiv 2211.17192 and Chen et al. 2302.01318 (chain); SpecInfer 2305.09781
(siblings with replacement); EAGLE 2401.15077 (without replacement).
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SiblingRule = Literal["deterministic", "swor", "with_replacement"]
"""How siblings came about: a fixed set, draws without replacement, or independent draws."""


def first(nodes: Bool[Array, " n"]) -> Int[Array, ""]:
    """The lowest node of a mask that has one."""
    return jnp.argmax(nodes).astype(jnp.int32)


def residual(p: Float[Array, "*b v"], q: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """norm(max(p - q, 0)), or p where rounding leaves nothing."""
    rest = jnp.maximum(p - q, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def accepts(u: Array, p: Array, q: Array) -> Array:
    """Accept with probability min(1, p/q); q = 0 can only be rounding, then accept iff p > 0."""
    ratio = jnp.where(q > 0, p / jnp.where(q > 0, q, 1.0), 1.0)
    return (p > 0) & (u <= ratio)


def _without_repeats(nodes: Bool[Array, " n"], tokens: Int[Array, " n"]) -> Bool[Array, " n"]:
    """``nodes`` without those whose token an earlier one of them carries."""
    n = tokens.shape[0]
    same = (tokens[:, None] == tokens[None, :]) & nodes[None, :]
    return nodes & ~jnp.any(same & jnp.tri(n, k=-1, dtype=bool), axis=1)


def try_siblings(
    tokens: Int[Array, " n"],
    children: Bool[Array, " n"],
    p: Float[Array, " v"],
    q: Float[Array, " v"] | None,
    rule: SiblingRule,
    uniform: Callable[[Array], Array],
) -> tuple[Array, Array, Array]:
    """Try the children in node order against ``p``, which shrinks with each rejection.

    ``uniform(j)`` is the number that decides the j-th child tried. Returns the accepted token or
    -1, the law of the token that follows if none is accepted, and how many were tried. Repeated
    siblings are skipped unless draws are independent, where each repetition counts. A child to
    which ``q`` gives no mass was never drawn from it and is skipped.
    """
    if rule != "with_replacement":
        children = _without_repeats(children, tokens)
    if q is None:
        q = jnp.zeros_like(p)
    else:
        children = children & (q[tokens] > 0)

    def going(carry: Any) -> Array:
        return jnp.any(carry[0]) & (carry[1] < 0)

    def attempt(carry: Any) -> Any:
        left, _, p, q, tried = carry
        child = first(left)
        token = tokens[child]
        law = jax.nn.one_hot(token, p.shape[0], dtype=p.dtype) if rule == "deterministic" else q
        accepted = accepts(uniform(tried), p[token], law[token])
        p = jnp.where(accepted, p, residual(p, law))
        if rule == "swor":
            q = q.at[token].set(0.0)
            total = jnp.sum(q)
            q = q / jnp.where(total > 0, total, 1.0)
        left = left & (jnp.arange(tokens.shape[0]) != child)
        return left, jnp.where(accepted, token, -1), p, q, tried + 1

    start = (children, jnp.asarray(-1, jnp.int32), p, q, jnp.asarray(0, jnp.int32))
    _, token, p, _, tried = jax.lax.while_loop(going, attempt, start)
    return token, p, tried


def verify_chain_with_uniforms(
    target_probs: Float[Array, "b k1 v"],
    draft_probs: Float[Array, "b k v"],
    draft_tokens: Int[Array, "b k"],
    uniforms: Float[Array, "b k"],
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Int[Array, " b"], Float[Array, "b v"]]:
    """Number of accepted tokens of drafted chains, and the law of the token that follows.

    Token k is kept if all before it are and ``uniforms <= p/q``. The law is the residual
    norm(max(p - q, 0)) after a rejection, and p itself when all are accepted or when the chain
    ends early because the next slot is not ``valid`` (all are if that is None).

    Source: Leviathan et al. arXiv 2211.17192, algorithm 1.
    """
    p, q = target_probs.astype(jnp.float32), draft_probs.astype(jnp.float32)
    valid = jnp.ones(draft_tokens.shape, bool) if valid is None else valid
    token = jnp.maximum(draft_tokens, 0)[..., None]
    p_token = jnp.take_along_axis(p[:, :-1], token, axis=-1)[..., 0]
    q_token = jnp.take_along_axis(q, token, axis=-1)[..., 0]
    kept = accepts(uniforms, p_token, q_token) & valid
    accepted = jnp.sum(jnp.cumprod(kept.astype(jnp.int32), axis=-1), axis=-1)
    last = accepted[:, None, None]
    p_next = jnp.take_along_axis(p, last, axis=1)[:, 0]
    q_next = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), last, axis=1)[:, 0]
    rejected = jnp.take_along_axis(jnp.pad(valid, ((0, 0), (0, 1))), accepted[:, None], axis=1)
    return accepted, jnp.where(rejected, residual(p_next, q_next), p_next)
