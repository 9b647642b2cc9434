"""Loss by position on long text, beside the loss on the same tokens within the trained length."""

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from models import decoder
from models.attention import Step
from models.load import Model
from train.data.corpus import load_corpus

CHUNK_ROWS = 2048
"""Tokens whose logits exist at a time."""

_BEGIN = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*", re.DOTALL)
_END = re.compile(r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG")


def read_text(name: str, split: str = "test") -> str:
    """A file's text without Project Gutenberg's frame, or a split of a corpus by name.

    Raises:
        ValueError, FileNotFoundError: see :func:`train.data.corpus.load_corpus`.
    """
    path = pathlib.Path(name)
    if not path.is_file():
        return "\n\n".join(document.text for document in load_corpus(name, split))
    text = path.read_text(encoding="utf-8-sig")
    if begin := _BEGIN.search(text):
        text = text[begin.end() :]
    if end := _END.search(text):
        text = text[: end.start()]
    return text


def cut_windows(
    ids: Sequence[int], count: int, length: int, seed: int
) -> Int32[np.ndarray, "count tokens"]:
    """``count`` windows of ``length + 1`` tokens from random places, none twice.

    Raises:
        ValueError: the text has too few tokens.
    """
    places = len(ids) - length
    if places < count:
        raise ValueError(
            f"the text has {len(ids)} tokens, and {count} windows of {length + 1} are asked for: "
            "give a longer text, fewer windows, or shorter lengths."
        )
    starts = np.random.default_rng([seed, length]).choice(places, count, replace=False)
    array = np.asarray(ids, np.int32)
    return np.stack([array[start : start + length + 1] for start in np.sort(starts)])


@functools.partial(jax.jit, static_argnames="cfg")
def position_nats(
    params: decoder.Params, cfg: decoder.Config, policy: Any, tokens: Int[Array, "b window"]
) -> Float[Array, "b t"]:
    """Nats of every token but the first.

    One program for each length and structure of a policy. Rotations that depend on the length are
    those of the whole window.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rows, length = inputs.shape
    row = jnp.arange(length, dtype=jnp.int32)[None]
    step = Step(
        jnp.broadcast_to(row, inputs.shape),
        lengths=jnp.full((rows,), length, jnp.int32),
        mode="prefill",
    )
    out = decoder.forward(params, cfg, inputs, step=step, policy=policy)
    size = max(n for n in range(1, length + 1) if length % n == 0 and (n == 1 or rows * n <= 2048))

    def nats(chunk: tuple[Array, Array]) -> Array:
        hidden, wanted = chunk
        logits = decoder.unembed(params, cfg, hidden)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, length // size, size, *x.shape[2:]), 1, 0)

    chunks = jax.lax.map(nats, (split(out.hidden), split(targets)))
    return jnp.moveaxis(chunks, 0, 1).reshape(rows, length)


def check_batches(windows: int, batch: int) -> None:
    """Raise ValueError unless the windows are a multiple of the batch."""
    if windows % batch:
        raise ValueError(f"{windows} windows in batches of {batch}: make it a multiple.")


def window_nats(
    model: Model, policy: Any, windows: Int32[np.ndarray, "count tokens"], batch: int
) -> Float[np.ndarray, "count t"]:
    """Nats by window and position, ``batch`` windows at a time.

    Raises:
        ValueError: see :func:`check_batches`.
    """
    check_batches(len(windows), batch)
    parts = []
    for start in range(0, len(windows), batch):
        nats = position_nats(
            model.params, model.cfg, policy, jnp.asarray(windows[start : start + batch])
        )
        parts.append(np.asarray(nats, np.float64))
    return np.concatenate(parts)


def in_range_nats(
    model: Model, windows: Int32[np.ndarray, "count tokens"], trained: int, batch: int
) -> Float[np.ndarray, "count t"]:
    """Nats of the same tokens when the model never sees more than ``trained`` of them.

    Windows of the trained length advance by half of it; of each but the first only the second half
    counts, so every token beyond has between half of the trained length and all of it before it.
    """
    length = windows.shape[1] - 1
    trained = min(trained, length)
    policy, nats = decoder.default_policy(model.cfg), np.empty((len(windows), length))
    half = max(1, trained // 2)
    starts = [*range(0, length - trained, half), length - trained]
    for start in starts:
        piece = windows[:, start : start + trained + 1]
        values = window_nats(model, policy, piece, batch)
        new = 0 if start == 0 else trained - half
        nats[:, start + new : start + trained] = values[:, new:]
    return nats


def bucket_edges(length: int, width: int) -> list[int]:
    """Ends of the buckets of ``0 .. length - 1``: ``width`` each, the last may be less."""
    return [*range(width, length, width), length]


def bucket_means(nats: Float[np.ndarray, "count t"], width: int) -> list[float]:
    """The mean of each bucket over all windows."""
    edges = bucket_edges(nats.shape[1], width)
    return [float(nats[:, a:b].mean()) for a, b in zip([0, *edges], edges, strict=False)]
