"""What SpecDec++'s head is trained on: mixed texts, the draft model's states, acceptance labels.

The target writes the texts. At each of their positions the draft model draws one token, whose label
is the probability that the target would keep it there. Then the text is mixed once: most positions
get the drawn token, some keep the target's, and the frozen draft model's states over the mixed text
are stored (:mod:`train.data.hidden`), so that training never runs it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inference.cache import init_cache
from inference.drafters.draft_model import check_tokenizer
from models import decoder
from models.attention import Step
from models.load import Model
from ops.sampling import Use, request_key, sample
from research.speculative.specdec_pp.objective import IGNORED, acceptance_labels, mix_tokens
from train.data.hidden import HiddenTexts, Split, Text, padded_batches, write_hidden

MIX = 0.15
"""The paper's share of the target's own tokens in a mixed text."""


@functools.partial(jax.jit, static_argnames=("target_cfg", "draft_cfg"))
def draw_drafts(
    target: decoder.Params,
    target_cfg: decoder.Config,
    draft: decoder.Params,
    draft_cfg: decoder.Config,
    tokens: Int[Array, "b t"],
    seeds: Int[Array, " b"],
) -> tuple[Int[Array, "b t"], Float[Array, "b t"], Float[Array, "b t"]]:
    """One token per position from the draft model's law after the text before it.

    Returns:
        The tokens, and their log-probabilities by target and draft model after the same text,
        float32. The first position has no text before it: it keeps its token, with 0 for both.
    """

    def log_laws(params: decoder.Params, cfg: decoder.Config) -> Float[Array, "b t v"]:
        hidden = decoder.forward(params, cfg, tokens).hidden[:, :-1]
        return jax.nn.log_softmax(decoder.unembed(params, cfg, hidden), axis=-1)

    log_p, log_q = log_laws(target, target_cfg), log_laws(draft, draft_cfg)
    index = jnp.arange(1, tokens.shape[1])

    def one(seed: Array, at: Array, law: Array) -> Array:
        return sample(request_key(seed, at, Use.DRAFT), jnp.exp(law))

    drawn = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, 0))(seeds, index, log_q)

    def of(laws: Array) -> Array:
        return jnp.take_along_axis(laws, drawn[..., None], axis=-1)[..., 0]

    before = ((0, 0), (1, 0))
    drafted = jnp.concatenate([tokens[:, :1], drawn], axis=1)
    return drafted, jnp.pad(of(log_p), before), jnp.pad(of(log_q), before)


@functools.partial(jax.jit, static_argnames="cfg")
def leaf_states(
    params: decoder.Params,
    cfg: decoder.Config,
    tokens: Int[Array, "b t"],
    leaves: Int[Array, "b t"],
) -> Float[Array, "b t width"]:
    """Pre-norm states of ``leaves``, each in its place after the unmixed text; float16.

    ``params`` are unstacked. A leaf sees the text before it and itself.
    """
    b, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    earlier = jnp.tri(t, k=-1, dtype=bool)
    cache = init_cache(cfg, b, 2 * t, params.final_norm.scale.dtype)
    out: Any = None
    own = jnp.eye(t, dtype=bool)
    for row, seen in ((tokens, earlier | own), (leaves, jnp.concatenate([earlier, own], axis=1))):
        cache, start = cache.append_scratch(positions)
        step = Step(
            positions=positions,
            start=start,
            slot_positions=cache.positions,
            tree=jnp.broadcast_to(seen[None], (b, *seen.shape)),
            tree_start=cache.length,
            mode="decode",
        )
        out = decoder.forward(params, cfg, row, step=step, cache=cache.layers)
        cache = dataclasses.replace(cache, layers=out.cache)
    return out.pre_norm.astype(jnp.float16)


def write_acceptance(
    folder: str | pathlib.Path,
    target: Model,
    draft: Model,
    texts: Sequence[Text],
    mix: float = MIX,
    seed: int = 0,
    batch: int = 16,
) -> None:
    """Label, mix and write; ``texts`` are the target's own at temperature 1.

    Args:
        mix: the share of the target's tokens in the mixed texts. At 1 no drafted token would be
            left to learn from; instead the drafted ones are read one at a time after the target's
            own text, the ablation in which no prefix has a drafted token.
        seed: of the draws and of the mixing, both made once.

    Raises:
        ValueError: models with different tokenizers, a ``mix`` outside 0 to 1, or as of
            :func:`train.data.hidden.write_hidden`.
        FileExistsError, OSError: see there.
    """
    check_tokenizer(draft, target)
    if not 0 <= mix <= 1:
        raise ValueError(f"mix is a share of tokens between 0 and 1, got {mix}.")
    drafted, labels = _draw_all(target, draft, texts, seed, batch)
    of_prompt = [np.arange(len(text.tokens)) < text.prompt_length for text in texts]
    if mix < 1:
        rng = np.random.default_rng([seed, len(texts)])
        taken = [prompt | (rng.random(len(prompt)) < mix) for prompt in of_prompt]
        tokens = [np.asarray(text.tokens, np.int32) for text in texts]
        mixed, kept = mix_tokens(
            *(jnp.asarray(np.concatenate(parts)) for parts in (taken, tokens, drafted, labels))
        )
        ends = np.cumsum([len(t) for t in tokens])[:-1]
        texts = [
            Text(row.tolist(), text.prompt_length, text.prompt)
            for row, text in zip(np.split(np.asarray(mixed), ends), texts, strict=True)
        ]
        labels = np.split(np.asarray(kept), ends)
    else:
        labels = [np.where(p, IGNORED, y) for p, y in zip(of_prompt, labels, strict=True)]
    unstacked = decoder.unstack(draft.params)

    def alone(chosen: Sequence[int], tokens: Array) -> Array:
        leaves = np.zeros(tokens.shape, np.int32)
        for row, i in enumerate(chosen):
            leaves[row, : len(drafted[i])] = drafted[i]
        return leaf_states(unstacked, draft.cfg, tokens, jnp.asarray(leaves))

    write_hidden(
        folder,
        draft.params,
        draft.cfg,
        texts,
        batch,
        states=None if mix < 1 else alone,
        per_token={"labels": [np.asarray(y, np.float32) for y in labels]},
    )


def _draw_all(
    target: Model, draft: Model, texts: Sequence[Text], seed: int, batch: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Drafted tokens and labels of every text, prompts included."""
    drafted: list[Any] = [None] * len(texts)
    labels: list[Any] = [None] * len(texts)
    seeds = np.random.default_rng(seed).integers(0, 2**31 - 1, len(texts)).astype(np.int32)
    for chosen, tokens in padded_batches([t.tokens for t in texts], batch):
        of_rows = np.zeros(batch, np.int32)
        of_rows[: len(chosen)] = seeds[chosen]
        drawn, log_p, log_q = draw_drafts(
            target.params, target.cfg, draft.params, draft.cfg,
            jnp.asarray(tokens), jnp.asarray(of_rows),
        )  # fmt: skip
        y = np.asarray(acceptance_labels(log_p, log_q))
        for row, i in enumerate(chosen):
            size = len(texts[i].tokens)
            drafted[i], labels[i] = np.asarray(drawn)[row, :size], y[row, :size]
    return drafted, labels


class AcceptanceWindows:
    """The answers of a split in windows of ``length`` positions, for random access.

    An element has ``pre_norm`` (length, width) float16, the draft model's states of drafted tokens,
    and ``labels`` (length,) float32, below 0 where nothing is to be learnt. Windows without labels
    follow until there is a ``multiple`` of them.

    Raises:
        ValueError: a length below 1, a folder without labels, or a split without texts.
    """

    def __init__(self, texts: HiddenTexts, split: Split, length: int, multiple: int = 1):
        if length < 1:
            raise ValueError(f"windows need a length of at least 1, got {length}.")
        self.texts, self.length = texts, length
        self.labels = texts.per_token("labels")
        self.windows = []
        for text in texts.chosen(split).tolist():
            first, end = (int(x) for x in texts.offsets[text : text + 2])
            begin = first + int(texts.prompts[text, 1])
            self.windows += [(at, min(at + length, end)) for at in range(begin, end, length)]
        if not self.windows:
            raise ValueError(
                f"{texts.folder} has no text in the split {split!r}: write more prompts."
            )
        self.size = -(-len(self.windows) // multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        states = np.zeros((self.length, self.texts.pre_norm.shape[1]), np.float16)
        labels = np.full(self.length, IGNORED, np.float32)
        if index < len(self.windows):
            start, end = self.windows[index]
            states[: end - start] = self.texts.pre_norm[start:end]
            labels[: end - start] = self.labels[start:end]
        return {"pre_norm": states, "labels": labels}
