"""Superposed Decoding's bookkeeping against a trace of the official class, with given logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.speculative.superposed.drafts import (
    Superposition,
    advance,
    draft_log_scores,
    draft_weights,
    init_drafts,
    keep_likeliest,
    last_tokens,
)
from research.speculative.superposed.ngrams import tables_from_rows
from tests.goldens import golden

MASKED = -1e6
"""The official store of finished texts holds fillers with scores below this."""


def tables_of(want):
    rows = want["ngram_rows"]
    orders = []
    for n in np.unique(rows[:, 0]):
        of = rows[rows[:, 0] == n]
        # Keys are padded on the left to five entries.
        orders.append((of[:, 6 - (n - 1) : 7], of[:, 7]))
    return tables_from_rows(orders, int(want["cfg"][0]))


@pytest.mark.parametrize("smoothing", ["geom", "none"])
def test_trace(smoothing):
    want = golden("superposed", "trace")
    vocab, prompts, k, steps, kept, size, _ = (int(x) for x in want["cfg"])
    settings = Superposition.make(
        k, kept, float(want["alpha"]), float(want["temp"]), want["lambdas"].tolist(),
        float(want["penalty"]),
    )  # fmt: skip
    tables = jax.tree.map(jnp.asarray, tables_of(want)) if smoothing == "geom" else None
    tokens = np.full((prompts, size + steps), -1, np.int32)
    tokens[:, :size] = want["prompt"]
    drafts = init_drafts(jnp.asarray(tokens), jnp.full((prompts,), size), k)
    eos = jnp.asarray([int(want["eos_id"])], jnp.int32)

    @jax.jit
    def step(drafts, logits, first):
        ids, log_p = keep_likeliest(logits, settings.temperature, settings.kept)
        gains = draft_log_scores(drafts, ids, log_p, settings, tables, first)
        return advance(drafts, jnp.broadcast_to(ids[:, None], gains.shape), gains, eos)[0]

    for t in range(steps):
        drafts = step(drafts, jnp.asarray(want[f"{smoothing}_logits"][t]), t == 0)
        alive = want[f"{smoothing}_alive_score"][t]
        np.testing.assert_array_equal(drafts.tokens, want[f"{smoothing}_alive_seq"][t])
        np.testing.assert_allclose(drafts.scores, alive, atol=1e-4)
        scores = want[f"{smoothing}_finished_score"][t]
        real = scores > MASKED
        np.testing.assert_array_equal(np.isfinite(drafts.finished_scores), real)
        np.testing.assert_allclose(drafts.finished_scores[real], scores[real], atol=1e-4)
        texts = np.asarray(drafts.finished_tokens)[real]
        np.testing.assert_array_equal(texts, want[f"{smoothing}_finished_seq"][t][real])
        last, gamma = last_tokens(drafts, 1)[..., 0], draft_weights(drafts.scores)
        rows = jnp.arange(prompts)[:, None]
        sparse = jnp.zeros((prompts, vocab)).at[rows, last].add(gamma)
        np.testing.assert_allclose(sparse, want[f"{smoothing}_token_weights"][t], atol=1e-4)
        mixed = np.einsum("pk,pkd->pd", gamma, want["embedding"][np.asarray(last)])
        np.testing.assert_allclose(mixed, want[f"{smoothing}_superposed_embedding"][t], atol=1e-4)
    ours = np.exp(-np.asarray(drafts.scores) / steps)
    np.testing.assert_allclose(ours, want[f"{smoothing}_final_alive_ppl"], rtol=1e-4)
