"""Tiny models, and drafters with known behaviour, that the tests of decoding share."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from inference.cache import Cache, init_cache
from inference.drafter import static_draft
from inference.engine import Engine, make_engine
from inference.loop import prefill_chunk, propose
from models import decoder, params
from models.attention import Step
from models.hf import save_hf
from models.tokenizer import Tokenizer
from ops.sampling import SamplingParams
from ops.tree import chain_tree

VOCAB = 24
NEW = 20
PROMPT_LENGTHS = (1, 2, 3, 7)
ROUNDING = 1e-4
"""Largest difference of logits computed with other shapes; ties closer than this may flip."""


def config(**changes: Any) -> decoder.Config:
    """Two layers with grouped heads; small enough to compile in a second."""
    fields = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 32, "max_length": 160,
        "init_stddev": 0.3,
    }  # fmt: skip
    return decoder.Config(**(fields | changes))


@functools.cache
def weights(cfg: decoder.Config, seed: int = 0) -> decoder.Params:
    """Random unstacked weights, made once per config and seed."""
    return decoder.unstack(params.init(decoder.specs(cfg), jax.random.key(seed)))


@functools.cache
def near() -> decoder.Params:
    """Nearly the weights of :func:`config`'s model, unstacked.

    As a draft model it makes rounds that end after none, some and all of the drafted tokens.
    """
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.08 * jnp.asarray(rng.normal(size=x.shape), x.dtype), weights(config())
    )


def engine(cfg: decoder.Config | None = None, **settings: Any) -> Engine:
    """An engine over a tiny model, prefilling by 16 tokens."""
    cfg = config() if cfg is None else cfg
    return make_engine(weights(cfg), cfg, **({"prefill_size": 16} | settings))


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """One random prompt per length, by default of ``PROMPT_LENGTHS``."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths or PROMPT_LENGTHS]


def assert_needs_no_laws(eng: Engine) -> None:
    """Where no row samples, the drafter drafts what it drafts anyway, but keeps no laws."""
    greedy = SamplingParams.make()
    state, seeds = eng.start(prompts(2, 3, 7), NEW, greedy)

    @functools.partial(jax.jit, static_argnames="known")
    def draft(weights: Any, params: Any, state: Any, known: bool) -> Any:
        args = (weights, eng.cfg, eng.drafter, params, state, seeds, greedy, 128)
        return propose(*args, greedy=known)[0]

    drafts = [draft(eng.params, eng.drafter_params, state, known) for known in (False, True)]
    assert drafts[0].probs is not None and drafts[1].probs is None
    assert np.asarray(drafts[0].valid).sum() > 3, "something was drafted"
    for name in ("tokens", "valid", "parent"):
        np.testing.assert_array_equal(getattr(drafts[0], name), getattr(drafts[1], name))


@functools.partial(jax.jit, static_argnames="cfg")
def _forward(p: Any, cfg: decoder.Config, tokens: jax.Array, length: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    out = decoder.forward(p, cfg, tokens, step=Step(positions, lengths=length))
    return decoder.unembed(p, cfg, out.hidden)


def forward_logits(cfg: decoder.Config, tokens: Any, length: int | None = None) -> np.ndarray:
    """(t, v) logits of one text in one pass without any cache.

    ``length`` is the text length that length-dependent rotations are for.
    """
    # Padding comes last, so no token sees it, and few shapes are compiled.
    padded = np.zeros((1, 32 if len(tokens) <= 32 else cfg.max_length), np.int32)
    padded[0, : len(tokens)] = tokens
    lengths = jnp.asarray([length or len(tokens)], jnp.int32)
    return np.asarray(_forward(weights(cfg), cfg, jnp.asarray(padded), lengths))[0, : len(tokens)]


def assert_greedy(
    cfg: decoder.Config, prompt: list[int], new: list[int], length: int | None = None
):
    """Every new token is the argmax of a pass over the whole text, up to rounding."""
    logits = forward_logits(cfg, prompt + new, length)[len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.asarray(new)[:, None], axis=1)[:, 0]
    assert np.all(chosen >= logits.max(axis=1) - ROUNDING)


def prefilled(p: Any, cfg: decoder.Config, texts: list[list[int]], capacity: int = 32) -> Cache:
    """A cache of all tokens of each text but the last, which is the root."""
    tokens = np.zeros((len(texts), capacity), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    cache, _ = prefill_chunk(
        p, cfg, decoder.default_policy(cfg), init_cache(cfg, len(texts), capacity),
        jnp.asarray(tokens), jnp.asarray([len(text) - 1 for text in texts], jnp.int32), None,
        extent=capacity, outputs=frozenset(),
    )  # fmt: skip
    return cache


@dataclasses.dataclass(frozen=True)
class ScriptedDrafter:
    """Drafts a chain from a table: the token for text index i of row b is ``params[b, i]``."""

    length: int = 4
    needs: frozenset[str] = frozenset()

    @property
    def width(self) -> int:
        return self.length + 1

    @property
    def max_depth(self) -> int:
        return self.length

    def init(self, params: Any, target: Any, request: Any, prompt: Any, capacity: int) -> None:
        """Nothing to remember."""

    def propose(self, params: Any, state: Any, target: Any, cache: Any, root: Any, context: Any):
        index = context.length[:, None] + jnp.arange(self.length)[None]
        drafted = jnp.take_along_axis(params, jnp.minimum(index, params.shape[1] - 1), axis=1)
        tokens = jnp.concatenate([root[:, None], drafted], axis=1)
        return static_draft(chain_tree(self.length), tokens), state, cache

    def observe(self, *args: Any) -> None:
        """Nothing to learn."""


def script(texts: list[list[int]], size: int = 64) -> Any:
    """Texts as a table for :class:`ScriptedDrafter`, padded with token 0."""
    table = np.zeros((len(texts), size), np.int32)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = text
    return jnp.asarray(table)


def letters(shift: int = 0) -> Tokenizer:
    """A tokenizer of the letters a to x, the last of which ends a text."""
    vocabulary = {chr(97 + (i + shift) % VOCAB): i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, eos_token="x")


def save_model(folder: pathlib.Path, cfg: decoder.Config, tokenizer: Tokenizer) -> None:
    """A model directory with the test weights of ``cfg``."""
    files = folder.with_name(folder.name + "_tokenizer")
    tokenizer.save(files)
    save_hf(folder, weights(cfg), cfg, files)
