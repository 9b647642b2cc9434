"""k drafts from one pass per token, compiled whole. An approximation: no draft is exact.

Every step feeds one mixed embedding per prompt, so the cache has one row per prompt and grows by
one entry per token, whatever k is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inference.cache import Cache
from inference.drafter import NoDrafter
from inference.engine import Engine, as_ids, bucket
from models import decoder
from models.attention import EmbeddingPolicy, Step
from ops.sampling import SamplingParams
from research.speculative.superposed.drafts import (
    Drafts,
    Superposition,
    advance,
    draft_log_scores,
    draft_weights,
    init_drafts,
    keep_likeliest,
    last_tokens,
    mix_embeddings,
)
from research.speculative.superposed.ngrams import NGramTables


@dataclasses.dataclass(frozen=True)
class DraftTexts:
    """The k best texts of every prompt, best first, and what they took.

    Attributes:
        tokens: new tokens of each text, an end token included.
        scores: (p, k) mean over a text's tokens of the scores by which it was chosen.
        passes: passes of the model after the prompt, each over ``rows_per_prompt`` rows.
        lossless: whether scores are log-likelihoods of the texts under the model. Superposed
            drafts share their passes, so theirs are not: grade the texts with a model.
    """

    tokens: list[list[list[int]]]
    scores: np.ndarray
    passes: int
    rows_per_prompt: int
    lossless: bool = False

    @property
    def perplexities(self) -> np.ndarray:
        """exp of minus the mean score: (p, k), ascending."""
        return np.exp(-self.scores.astype(np.float64))


def superposed_generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    settings: Superposition | None = None,
    tables: NGramTables | None = None,
    eos: Sequence[int] = (),
) -> DraftTexts:
    """``settings.drafts`` continuations of every prompt by up to ``new_tokens`` tokens each.

    Args:
        engine: the model, without a drafter.
        prompts: token ids; lengths may differ, each row is as if it were alone.
        settings: default those published for three drafts.
        tables: n-grams of the model's tokenizer; None turns smoothing off.
        eos: ids that end a text.

    Raises:
        ValueError: an engine with a drafter or with positions in its embeddings, tables that do
            not fit, more tokens kept than there are, or what :meth:`Engine.generate` refuses.
    """
    settings = Superposition.make() if settings is None else settings
    check_tables(engine.cfg, settings, tables)
    drafts, cache, extent = start_drafts(engine, prompts, new_tokens, settings.drafts)
    _, drafts = _superpose(
        engine.params,
        engine.cfg,
        engine.policy_in_force,
        cache,
        drafts,
        settings,
        tables,
        as_ids(eos),
        jnp.asarray(new_tokens, jnp.int32),
        extent,
    )
    return best_texts(drafts, prompts, new_tokens, rows_per_prompt=1)


def check_tables(cfg: decoder.Config, settings: Superposition, tables: NGramTables | None) -> None:
    """Raise ValueError unless tables and settings fit each other and the model."""
    if settings.kept > cfg.vocab_size:
        raise ValueError(f"{settings.kept} tokens to keep of {cfg.vocab_size}: keep fewer.")
    if tables is None:
        return
    if tables.vocab_size != cfg.vocab_size:
        raise ValueError(
            f"the n-gram tables are over {tables.vocab_size} tokens, the model over "
            f"{cfg.vocab_size}: count a corpus with the model's tokenizer."
        )
    if len(settings.weights) >= tables.max_order:
        raise ValueError(
            f"{len(settings.weights)} weights need n-grams of {len(settings.weights) + 1} tokens, "
            f"the tables have up to {tables.max_order}: give fewer weights or count longer ones."
        )


def start_drafts(
    engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, k: int
) -> tuple[Drafts, Cache, int]:
    """Drafts and the cache after all of the prompt but its last token, and the slots to read.

    Raises:
        ValueError: see :func:`superposed_generate`.
    """
    engine.check(prompts, new_tokens, None)
    if not isinstance(engine.drafter, NoDrafter) or isinstance(engine.policy, EmbeddingPolicy):
        raise ValueError(
            "drafts are made from mixed embeddings, by the model alone: give an engine without a "
            "drafter and without a policy that adds positions to embeddings."
        )
    state, _ = engine.start(prompts, new_tokens, SamplingParams.make())
    drafts = init_drafts(state.tokens, state.length, k)
    longest = max(len(prompt) for prompt in prompts)
    return drafts, state.cache, min(bucket(longest + new_tokens), state.cache.capacity)


def one_pass(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    inputs: Callable[[Array], Array],
    lengths: Int[Array, " p"],
    extent: int,
) -> tuple[Cache, Float[Array, "p v"]]:
    """Logits after one more entry per cache row; ``inputs(positions)`` is its (p, width) input."""
    positions = cache.next_position[:, None]
    cache, start = cache.append_scratch(positions)
    step = Step(
        positions=positions,
        start=start,
        slot_positions=cache.positions,
        lengths=lengths,
        extent=extent,
        mode="decode",
    )
    out = decoder.forward(
        params,
        cfg,
        embeds=inputs(positions)[:, None],
        step=step,
        policy=policy,
        cache=cache.layers,
    )
    cache = dataclasses.replace(cache, layers=out.cache).commit(None, jnp.ones_like(start))
    return cache, decoder.unembed(params, cfg, out.hidden[:, 0])


def superposed_step(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    drafts: Drafts,
    settings: Superposition,
    tables: NGramTables | None,
    eos: Int[Array, " e"],
    first: Any,
    limit: Int[Array, " p"],
    extent: int,
) -> tuple[Cache, Drafts, Float[Array, "p v"]]:
    """One token for all drafts; also returns the model's logits for the superposed input."""
    tokens, weights = last_tokens(drafts, 1)[..., 0], draft_weights(drafts.scores)
    cache, logits = one_pass(
        params,
        cfg,
        policy,
        cache,
        lambda positions: mix_embeddings(params, cfg, tokens, weights, positions),
        limit,
        extent,
    )
    ids, log_p = keep_likeliest(logits, settings.temperature, settings.kept)
    gains = draft_log_scores(drafts, ids, log_p, settings, tables, first)
    # The drafts share one lineage of keys and values, so the cache stays as it is.
    drafts, _ = advance(drafts, jnp.broadcast_to(ids[:, None], gains.shape), gains, eos)
    return cache, drafts, logits


@functools.partial(jax.jit, static_argnames=("cfg", "extent"), donate_argnames=("cache", "drafts"))
def _superpose(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: Any,
    cache: Cache,
    drafts: Drafts,
    settings: Superposition,
    tables: NGramTables | None,
    eos: Int[Array, " e"],
    new_tokens: Int[Array, ""],
    extent: int,
) -> tuple[Cache, Drafts]:
    limit = drafts.length + new_tokens

    def step(i: Array, carry: tuple[Cache, Drafts]) -> tuple[Cache, Drafts]:
        return superposed_step(
            params, cfg, policy, *carry, settings, tables, eos, i == 0, limit, extent
        )[:2]

    return jax.lax.fori_loop(0, new_tokens, step, (cache, drafts))


def best_texts(
    drafts: Drafts, prompts: Sequence[Sequence[int]], new_tokens: int, rows_per_prompt: int
) -> DraftTexts:
    """The k best of going and finished texts by the mean score of their own tokens."""
    host = jax.tree.map(np.asarray, drafts)
    k = host.scores.shape[1]
    sizes = np.array([len(prompt) for prompt in prompts])[:, None]
    finished = np.maximum(host.finished_lengths - sizes, 1)
    means = np.concatenate(
        [host.scores / max(new_tokens, 1), host.finished_scores / finished], axis=1
    )
    texts = np.concatenate([host.tokens, host.finished_tokens], axis=1)
    ends = np.concatenate(
        [np.broadcast_to(host.length[:, None], host.scores.shape), host.finished_lengths], axis=1
    )
    best = np.argsort(-means, axis=1, kind="stable")[:, :k]
    chosen = [
        [
            texts[row, i, len(prompt) : ends[row, i]].tolist()
            for i in best[row]
            if np.isfinite(means[row, i])
        ]
        for row, prompt in enumerate(prompts)
    ]
    return DraftTexts(chosen, np.take_along_axis(means, best, axis=1), new_tokens, rows_per_prompt)
