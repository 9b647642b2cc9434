"""Texts graded by a model: perplexity given the prompt, and how much drafts differ."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import decoder
from models.load import Model

Texts = list[list[list[int]]]
"""New tokens by prompt and draft."""


def grade(grader: Model, prompts: Sequence[Sequence[int]], texts: Texts) -> np.ndarray:
    """(prompts, drafts) perplexity of each text under the grader, given its prompt."""
    k = max(len(drafts) for drafts in texts)
    rows = [
        (list(prompt), text)
        for prompt, drafts in zip(prompts, texts, strict=True)
        for text in [*drafts, *[drafts[-1]] * (k - len(drafts))]
    ]
    size = max(len(prompt) + len(text) for prompt, text in rows)
    tokens, scored = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size - 1), bool)
    for i, (prompt, text) in enumerate(rows):
        whole = [*prompt, *text]
        tokens[i, : len(whole)] = whole
        scored[i, len(prompt) - 1 : len(whole) - 1] = True
    losses = np.concatenate(
        [_losses(grader.params, grader.cfg, jnp.asarray(part)) for part in _batches(tokens)]
    )[: len(rows)]
    means = np.sum(np.where(scored, losses, 0), axis=1) / scored.sum(axis=1)
    return np.exp(means.astype(np.float64)).reshape(len(prompts), k)


def _batches(tokens: np.ndarray, size: int = 128) -> list[np.ndarray]:
    padding = -len(tokens) % size
    padded = np.concatenate([tokens, np.zeros((padding, tokens.shape[1]), np.int32)])
    return np.split(padded, len(padded) // size)


@functools.partial(jax.jit, static_argnames="cfg")
def _losses(params: Any, cfg: decoder.Config, tokens: Any) -> Any:
    """(rows, length - 1) negative log-likelihood of each token but the first."""
    logits = decoder.unembed(params, cfg, decoder.forward(params, cfg, tokens).hidden)
    laws = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(laws, tokens[:, 1:, None], axis=-1)[..., 0]


def distinct(texts: Texts, n: int) -> float:
    """Distinct n-grams among the drafts of a prompt as a share of all of theirs, over prompts."""
    shares = []
    for drafts in texts:
        grams = [tuple(t[i : i + n]) for t in drafts for i in range(len(t) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return float(np.mean(shares))
