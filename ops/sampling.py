"""Warping of logits into sampling laws, drawing from them, and random keys per request.

Every law is float32. A drawn token depends only on the request's seed, the index of the token in
its text, the use of the draw and the sibling rank, never on the batch or the round it falls in.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

Number = Any
"""A Python number, or an array of them (traced or not)."""


class Use(enum.IntEnum):
    """What a random draw is for; part of its key, so that no two uses share randomness."""

    TARGET = 0  # a token drawn from the target's own law, by plain decoding or by a verifier
    DRAFT = 1  # a drafted token
    ACCEPT = 2  # the uniform number that accepts or rejects a drafted token
    RESIDUAL = 3  # the token that follows the accepted ones


def request_key(
    seed: Number, token_index: Number, use: Number, sibling: Number = 0
) -> Key[Array, ""]:
    """The key of one draw of one request: four nested ``fold_in`` steps.

    Args:
        seed: the request's seed, an integer.
        token_index: index in the request's text of the token that the draw decides.
        use: a :class:`Use`.
        sibling: rank of the drafted token among its siblings.

    Each token index is decided once, and a drafted token that was never compared with the target
    has revealed nothing, so a key that returns in a later round for the same index is still fresh.
    """
    key = jax.random.key(seed)
    for part in (token_index, use, sibling):
        key = jax.random.fold_in(key, part)
    return key


def _ordered(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Float32 as int32 with the same order (negative zero counts as less than zero)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _keep_heaviest(
    x: Float[Array, "*rows v"], weight: Float[Array, "*rows v"], target: Float[Array, "*rows"]
) -> Bool[Array, "*rows v"]:
    """Entries of ``x`` not below the largest threshold whose kept weight reaches ``target``.

    Bisection over the 32 bits of the threshold: exact, and on CPU and TPU several times cheaper
    than sorting a vocabulary. ``target`` is positive; if no threshold reaches it all are kept.
    """
    order = _ordered(x)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        kept = jnp.sum(jnp.where(order >= middle[..., None], weight, 0.0), axis=-1)
        reached = kept >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    info = jnp.iinfo(jnp.int32)
    low = jnp.full(target.shape, info.min, jnp.int32)
    high = jnp.full(target.shape, info.max, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return order >= low[..., None]


def _per_row(value: Number, rows: tuple[int, ...]) -> Float[Array, "*rows"]:
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), rows)


def warp_logits(
    logits: Float[Array, "*rows v"],
    temperature: Number,
    top_k: Number | None = None,
    top_p: Number | None = None,
) -> Float[Array, "*rows v"]:
    """Probabilities after temperature, then top-k, then top-p; float32.

    Args:
        logits: any float type.
        temperature: non-negative; 0 gives the one-hot law of the argmax (lowest index on ties).
        top_k: how many tokens to keep, 0 for all; None leaves the step out of the program.
        top_p: keep the smallest set of most likely tokens with at least this mass, 1.0 for all;
            None leaves the step out of the program.

    Each control is a scalar or has the shape of ``logits`` without its last axis, and may be
    traced. Departure from implementations that sort: tokens tied at the boundary of top-k or
    top-p are all kept, so that the law does not depend on the numbering of the vocabulary.
    """
    rows = logits.shape[:-1]
    logits = logits.astype(jnp.float32)
    heat = _per_row(temperature, rows)
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(heat > 0, heat, 1.0)[..., None]
    if top_k is not None:
        count = _per_row(top_k, rows)
        kept = _keep_heaviest(scaled, jnp.ones_like(scaled), jnp.maximum(count, 1.0))
        scaled = jnp.where(kept | (count <= 0)[..., None], scaled, -jnp.inf)
    probs = jax.nn.softmax(scaled, axis=-1)
    if top_p is not None:
        mass = _per_row(top_p, rows)
        kept = _keep_heaviest(probs, probs, mass)
        probs = jnp.where(kept | (mass >= 1)[..., None], probs, 0.0)
        probs = probs / jnp.sum(probs, axis=-1, keepdims=True)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.where((heat > 0)[..., None], probs, greedy)


@struct.dataclass
class SamplingParams:
    """How tokens are drawn from logits. Build it with :meth:`make`, which checks the values.

    The three numbers are traced data, scalars or one per row; the two switches are static and
    leave a step that no row uses out of the compiled program.
    """

    temperature: Number
    top_k: Number
    top_p: Number
    use_top_k: bool = struct.field(pytree_node=False, default=False)
    use_top_p: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def make(
        cls, temperature: Number = 0.0, top_k: Number = 0, top_p: Number = 1.0
    ) -> "SamplingParams":
        """Checked parameters; the defaults are greedy decoding.

        Raises:
            ValueError: temperature negative or not finite, top_k negative or not whole, or top_p
                outside (0, 1].
        """
        heat, count, mass = (np.asarray(x, np.float64) for x in (temperature, top_k, top_p))
        if not np.all(np.isfinite(heat) & (heat >= 0)):
            raise ValueError(
                f"temperature must be 0 (greedy) or a positive number, got {temperature}."
            )
        if not np.all((count >= 0) & (count == np.floor(count))):
            raise ValueError(f"top_k must be a whole number, 0 for no limit, got {top_k}.")
        if not np.all((mass > 0) & (mass <= 1)):
            raise ValueError(
                f"top_p must lie above 0 and at most at 1 (1.0 for no limit), got {top_p}."
            )
        return cls(
            temperature=heat.astype(np.float32),
            top_k=np.asarray(np.minimum(count, np.iinfo(np.int32).max), np.int32),
            top_p=mass.astype(np.float32),
            use_top_k=bool(np.any(count > 0)),
            use_top_p=bool(np.any(mass < 1)),
        )

    def warp(self, logits: Float[Array, "*rows v"]) -> Float[Array, "*rows v"]:
        """The law that these parameters make of ``logits``; see :func:`warp_logits`."""
        return warp_logits(
            logits,
            self.temperature,
            self.top_k if self.use_top_k else None,
            self.top_p if self.use_top_p else None,
        )

    def per_row(self, batch: int) -> "SamplingParams":
        """The same parameters with every number spread to shape ``(batch,)``."""
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (batch,)), self)


def sample(key: Key[Array, ""], probs: Float[Array, " v"]) -> Int[Array, ""]:
    """One token drawn from ``probs``; a one-hot law gives its token surely."""
    return jnp.argmax(_race(key, probs)).astype(jnp.int32)


def _race(key: Key[Array, ""], probs: Float[Array, " v"]) -> Float[Array, " v"]:
    """Scores whose largest entries, in order, are draws without replacement; -inf where p is 0.

    Minus the time that an exponential clock of rate p takes. The order is that of the Gumbel trick,
    ``log p - log(-log u)``, for one logarithm in place of three.
    """
    least = jnp.finfo(jnp.float32).tiny
    u = jax.random.uniform(key, probs.shape, jnp.float32, minval=least, maxval=1.0)
    return jnp.log(u) / probs


def sample_without_replacement(
    key: Key[Array, ""], probs: Float[Array, " v"], count: int
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """``count`` distinct tokens in the order drawn, and which of them exist.

    Successive draws, each from the law without the tokens drawn before. Where the law has fewer
    tokens than ``count`` the rest is -1 and not valid: such a slot must not be offered to a
    verifier.

    Raises:
        ValueError: ``count`` exceeds the size of the vocabulary.
    """
    if count > probs.shape[-1]:
        raise ValueError(
            f"cannot draw {count} distinct tokens out of {probs.shape[-1]}: ask for fewer."
        )
    _, tokens = jax.lax.top_k(_race(key, probs), count)
    valid = probs[tokens] > 0
    return jnp.where(valid, tokens, -1).astype(jnp.int32), valid
