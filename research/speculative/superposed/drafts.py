"""Superposed Decoding's arithmetic: weights, the mix of embeddings, scores, and which drafts go on.

Rows p are prompts, k drafts of each, j the tokens kept of the model's law. Scores are natural
logarithms, float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from models import decoder
from ops.sampling import Number
from research.speculative.superposed.ngrams import NGramTables

WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
"""Weights of the orders 2 to 6 in the mixture of n-grams; they are not normalised."""
PENALTY = 200.0
"""What a draft without any known n-gram loses."""


@struct.dataclass
class Superposition:
    """How drafts are made. Build it with :meth:`make`; all but ``drafts`` and ``kept`` are data."""

    alpha: Number  # share of the n-grams in a draft's score
    temperature: Number  # of the model's law, far below 1
    weights: Any  # (orders,), order 2 first
    penalty: Number
    interpolate_first: Any  # bool: n-grams count at the first token too
    drafts: int = struct.field(pytree_node=False)
    kept: int = struct.field(pytree_node=False)

    @classmethod
    def make(
        cls,
        drafts: int = 3,
        kept: int | None = None,
        alpha: float = 0.54,
        temperature: float = 0.06,
        weights: Sequence[float] = WEIGHTS,
        penalty: float = PENALTY,
        interpolate_first: bool = True,
    ) -> "Superposition":
        """Checked settings; ``kept`` is by default three times ``drafts``.

        Raises:
            ValueError: a number out of its range, or fewer tokens kept than drafts need.
        """
        kept = 3 * drafts if kept is None else kept
        if drafts < 1 or kept < max(drafts, 2):
            raise ValueError(
                f"{drafts} drafts from {kept} kept tokens: the first step takes a different token "
                "for each draft and one of them may end, so keep at least 2 and at least as many "
                "as there are drafts."
            )
        if not 0 <= alpha <= 1 or not (np.isfinite(temperature) and temperature > 0):
            raise ValueError(
                f"alpha must lie within 0 and 1 and temperature above 0, got {alpha} and "
                f"{temperature}."
            )
        if len(weights) == 0 or min(weights) < 0 or penalty < 0:
            raise ValueError("weights (at least one) and penalty must not be negative.")
        return cls(
            np.float32(alpha),
            np.float32(temperature),
            np.asarray(weights, np.float32),
            np.float32(penalty),
            np.bool_(interpolate_first),
            drafts,
            kept,
        )


# Named by what differs from 3 drafts of 10 tokens after prompts of 15.
PUBLISHED = {
    "drafts-2": Superposition.make(2, 6, 0.62, 0.06),
    "drafts-3": Superposition.make(3, 9, 0.54, 0.06),
    "drafts-4": Superposition.make(4, 12, 0.52, 0.06),
    "drafts-5": Superposition.make(5, 15, 0.60, 0.06),
    "drafts-6": Superposition.make(6, 18, 0.52, 0.06),
    "drafts-10": Superposition.make(10, 30, 0.54, 0.12),
    "tokens-5": Superposition.make(3, 15, 0.52, 0.06),
    "tokens-15": Superposition.make(3, 15, 0.48, 0.06),
    "tokens-20": Superposition.make(3, 15, 0.50, 0.04),
    "prompt-5": Superposition.make(3, 15, 0.34, 0.12),
    "prompt-25": Superposition.make(3, 15, 0.50, 0.12),
    "prompt-40": Superposition.make(3, 9, 0.55, 0.10),
    "orders-4": Superposition.make(3, 9, 0.55, 0.10, WEIGHTS[:3]),
}
"""The settings published for Llama-2-7B. For prompts of 40 tokens ``kept`` is ours: 3 per draft."""


@struct.dataclass
class Drafts:
    """The k drafts of every prompt, and the best k texts that have ended so far."""

    tokens: Any  # (p, k, s) int32, the prompt included
    length: Any  # (p,) int32, the same for all drafts of a prompt
    scores: Any  # (p, k), -inf for a draft that is missing
    finished_tokens: Any  # (p, k, s)
    finished_lengths: Any  # (p, k), the end token included
    finished_scores: Any  # (p, k), -inf where nothing has ended


def init_drafts(tokens: Int[Array, "p s"], length: Int[Array, " p"], k: int) -> Drafts:
    """Before the first token all drafts are the prompt, so only the first one counts."""
    shape = (tokens.shape[0], k)
    spread = jnp.broadcast_to(tokens[:, None], (*shape, tokens.shape[1]))
    missing = jnp.full(shape, -jnp.inf, jnp.float32)
    return Drafts(
        tokens=spread,
        length=length,
        scores=missing.at[:, 0].set(0.0),
        finished_tokens=jnp.array(spread),
        finished_lengths=jnp.zeros(shape, jnp.int32),
        finished_scores=missing,
    )


def last_tokens(drafts: Drafts, count: int) -> Int[Array, "p k count"]:
    """The last tokens of each draft, prompt included, padded on the left with -1."""
    index = drafts.length[:, None] - count + jnp.arange(count)[None]
    index = jnp.broadcast_to(index[:, None], (*drafts.scores.shape, count))
    found = jnp.take_along_axis(drafts.tokens, jnp.maximum(index, 0), axis=2)
    return jnp.where(index >= 0, found, -1)


def draft_weights(scores: Float[Array, "p k"]) -> Float[Array, "p k"]:
    """gamma: the drafts' probabilities among themselves; 0 for a missing one."""
    return jax.nn.softmax(scores, axis=-1)


def mix_embeddings(
    params: decoder.Params,
    cfg: decoder.Config,
    tokens: Int[Array, "p k"],
    weights: Float[Array, "p k"],
    positions: Int[Array, "p 1"],
) -> Float[Array, "p width"]:
    """The superposed input: the weighted sum of the embeddings of the drafts' last tokens."""
    each = decoder.embed(params, cfg, tokens, jnp.broadcast_to(positions, tokens.shape))
    return jnp.sum(weights[..., None].astype(each.dtype) * each, axis=1)


def keep_likeliest(
    logits: Float[Array, "*b v"], temperature: Number, kept: int
) -> tuple[Int[Array, "*b j"], Float[Array, "*b j"]]:
    """The ``kept`` likeliest tokens and the logarithms of their renormalised law.

    Taken in log space, so that a kept token never has probability 0.
    """
    top, ids = jax.lax.top_k(logits.astype(jnp.float32) / temperature, kept)
    return ids, jax.nn.log_softmax(top, axis=-1)


def ngram_log_scores(
    log_p: Float[Array, "p j"], g: Float[Array, "p k j"], alpha: Number, penalty: Number
) -> Float[Array, "p k j"]:
    """(1 - alpha) log p + alpha log g where an n-gram is known, else -inf.

    A draft for which no kept token is known keeps the model's order, lowered by ``penalty``.
    """
    known = g > 0
    model = jnp.broadcast_to((1 - alpha) * log_p[:, None], g.shape)
    both = jnp.where(known, model + alpha * jnp.log(jnp.where(known, g, 1.0)), -jnp.inf)
    return jnp.where(jnp.any(known, axis=-1, keepdims=True), both, model - penalty)


def draft_log_scores(
    drafts: Drafts,
    ids: Int[Array, "p j"],
    log_p: Float[Array, "p j"],
    settings: Superposition,
    tables: NGramTables | None,
    first: Any,
) -> Float[Array, "p k j"]:
    """What each kept token adds to each draft's score.

    Without ``tables`` (smoothing off) that is log p for all drafts. ``first``: whether this is the
    first generated token.
    """
    shape = (*drafts.scores.shape, ids.shape[-1])
    plain = jnp.broadcast_to(log_p[:, None], shape)
    if tables is None:
        return plain
    context = last_tokens(drafts, settings.weights.shape[0])
    g = tables.mixture(
        context, jnp.broadcast_to(ids[:, None], shape), jnp.asarray(settings.weights)
    )
    smoothed = ngram_log_scores(log_p, g, settings.alpha, settings.penalty)
    return jnp.where(first & ~settings.interpolate_first, plain, smoothed)


def advance(
    drafts: Drafts, ids: Int[Array, "p k j"], gains: Float[Array, "p k j"], eos: Int[Array, " e"]
) -> tuple[Drafts, Int[Array, "p k"]]:
    """One token for every draft: the best 2k of all candidates, shared out by whether they end.

    The k best that do not end go on; those that end compete for the k places of finished texts.
    Also the step of a beam search, whose beams have candidates of their own.

    Returns:
        The drafts, and which former draft each one continues.
    """
    p, k, j = ids.shape
    total = (drafts.scores[..., None] + gains).reshape(p, k * j)
    best, flat = jax.lax.top_k(total, 2 * k)
    source = flat // j
    token = jnp.take_along_axis(ids.reshape(p, k * j), flat, axis=1)
    at = drafts.length[:, None, None] == jnp.arange(drafts.tokens.shape[2])[None, None]
    texts = jnp.take_along_axis(drafts.tokens, source[..., None], axis=1)
    texts = jnp.where(at, token[..., None], texts)
    ends = jnp.any(token[..., None] == eos[None, None], axis=-1)
    # Masks rather than large negative numbers, whose rounding would eat the scores.
    scores, alive = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), k)
    ended = jnp.concatenate([drafts.finished_scores, jnp.where(ends, best, -jnp.inf)], axis=1)
    finished_scores, finished = jax.lax.top_k(ended, k)
    lengths = jnp.broadcast_to(drafts.length[:, None] + 1, best.shape)
    every = jnp.concatenate([drafts.finished_tokens, texts], axis=1)
    every_length = jnp.concatenate([drafts.finished_lengths, lengths], axis=1)
    new = dataclasses.replace(
        drafts,
        tokens=jnp.take_along_axis(texts, alive[..., None], axis=1),
        length=drafts.length + 1,
        scores=scores,
        finished_tokens=jnp.take_along_axis(every, finished[..., None], axis=1),
        finished_lengths=jnp.take_along_axis(every_length, finished, axis=1),
        finished_scores=finished_scores,
    )
    return new, jnp.take_along_axis(source, alive, axis=1)
