"""What superposed drafts are compared with: a beam search, and n-grams without a model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from inference.cache import Cache
from inference.engine import Engine, as_ids
from models import decoder
from research.speculative.superposed.drafts import Drafts, advance, last_tokens
from research.speculative.superposed.generate import (
    DraftTexts,
    best_texts,
    one_pass,
    start_drafts,
)
from research.speculative.superposed.ngrams import NGramTables


def beam_search(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    beams: int = 3,
    eos: Sequence[int] = (),
) -> DraftTexts:
    """The k best texts by beam search: every beam has its own row in the cache.

    Scores are log-likelihoods, not normalised by length during the search but at its end.

    Raises:
        ValueError: no beam, or what :func:`start_drafts` refuses.
    """
    if beams < 1:
        raise ValueError(f"a beam search needs at least one beam, got {beams}.")
    drafts, cache, extent = start_drafts(engine, prompts, new_tokens, beams)
    cache = cache.take_rows(jnp.repeat(jnp.arange(len(prompts)), beams))
    drafts = _search(
        engine.params,
        engine.cfg,
        engine.policy_in_force,
        cache,
        drafts,
        as_ids(eos),
        jnp.asarray(new_tokens, jnp.int32),
        extent,
    )
    texts = best_texts(drafts, prompts, new_tokens, rows_per_prompt=beams)
    return dataclasses.replace(texts, lossless=True)


@functools.partial(jax.jit, static_argnames=("cfg", "extent"))
def _search(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    drafts: Drafts,
    eos: Int[Array, " e"],
    new_tokens: Int[Array, ""],
    extent: int,
) -> Drafts:
    p, k = drafts.scores.shape
    limit = jnp.repeat(drafts.length + new_tokens, k)

    def step(_: Array, carry: tuple[Cache, Drafts]) -> tuple[Cache, Drafts]:
        cache, drafts = carry
        tokens = last_tokens(drafts, 1).reshape(p * k, 1)
        cache, logits = one_pass(
            params,
            cfg,
            policy,
            cache,
            lambda positions: decoder.embed(params, cfg, tokens, positions)[:, 0],
            limit,
            extent,
        )
        # No beam can have more than all 2k places.
        gains, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(2 * k, cfg.vocab_size))
        drafts, source = advance(drafts, ids.reshape(p, k, -1), gains.reshape(p, k, -1), eos)
        rows = (jnp.arange(p)[:, None] * k + source).reshape(-1)
        return cache.take_rows(rows), drafts

    return jax.lax.fori_loop(0, new_tokens, step, (cache, drafts))[1]


def ngram_generate(
    tables: NGramTables,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    weights: Sequence[float],
) -> list[list[int]]:
    """Continuations by the n-grams alone: each token is the likeliest of their mixture.

    Where no key was ever seen it is the token with the lowest id.

    Raises:
        ValueError: more weights than the tables have orders.
    """
    if len(weights) >= tables.max_order:
        raise ValueError(f"{len(weights)} weights for n-grams up to {tables.max_order}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), lengths.max() + new_tokens), -1, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = np.asarray(
        _continue(
            tables, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(weights), new_tokens
        )
    )
    return [
        row[size : size + new_tokens].tolist()
        for row, size in zip(out, lengths.tolist(), strict=True)
    ]


@functools.partial(jax.jit, static_argnames="new_tokens")
def _continue(
    tables: NGramTables,
    tokens: Int[Array, "p s"],
    lengths: Int[Array, " p"],
    weights: Any,
    new_tokens: int,
) -> Int[Array, "p s"]:
    size, vocab = weights.shape[0], tables.vocab_size
    everything = jnp.broadcast_to(jnp.arange(vocab)[None], (tokens.shape[0], vocab))

    def step(i: Array, tokens: Array) -> Array:
        at = (lengths + i)[:, None]
        index = at - size + jnp.arange(size)[None]
        context = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
        context = jnp.where(index >= 0, context, -1)
        best = jnp.argmax(tables.mixture(context, everything, weights), axis=-1)
        return jnp.where(jnp.arange(tokens.shape[1])[None] == at, best[:, None], tokens)

    return jax.lax.fori_loop(0, new_tokens, step, tokens)
