"""Real learning curves, made here: tiny language models trained at many learning rates at once.

    python -m experiments.curve_runs --out=runs/curves.npz

Every run is a network of one hidden layer that guesses the next byte of Python source from the
eight before it, trained by Adam at a learning rate of its own between 1e-4 and 1. All runs train
side by side (`jax.vmap`) and are evaluated 100 times on the same held-out bytes. The file holds
`bytes_mlp/valid_loss` (runs, evaluations) in nats per byte, NaN once a run has diverged, and
`bytes_mlp/hp` (runs, 1), the learning rates; :mod:`experiments.curve_files` reads it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import struct
from jaxtyping import Array, Float, Int, Integer, Key

from models.layers import Linear, linear
from models.params import Constant, Normal, ParamSpec, init
from train.data.corpus import load_corpus

CONTEXT, EMBED, HIDDEN, BYTES = 8, 16, 128, 256
TASK = "bytes_mlp"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained; see the flags."""

    corpus: str
    runs: int
    evaluations: int
    steps: int
    batch: int
    seed: int


@struct.dataclass
class Network:
    """Byte embeddings, a hidden layer over those of the context, and logits."""

    embed: Any
    hidden: Linear
    out: Linear


def specs() -> Network:
    """The abstract parameters of one run."""
    inputs = CONTEXT * EMBED

    def dense(rows: int, columns: int) -> Linear:
        w = ParamSpec((rows, columns), (None, None), Normal(rows**-0.5))
        return Linear(w, ParamSpec((columns,), (None,), Constant(0.0)))

    embed = ParamSpec((BYTES, EMBED), (None, None), Normal(1.0))
    return Network(embed, dense(inputs, HIDDEN), dense(HIDDEN, BYTES))


def mean_loss(params: Network, text: Int[Array, "b n"]) -> Float[Array, ""]:
    """Mean loss, in nats, of the last byte of windows of ``CONTEXT + 1``."""
    embedded = params.embed[text[:, :-1]].reshape(text.shape[0], -1)
    logits = linear(jnp.tanh(linear(embedded, params.hidden)), params.out)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, text[:, -1]))


def windows(key: Key[Array, ""], text: Integer[Array, " n"], count: int) -> Int[Array, "count m"]:
    """Windows that begin at random."""
    start = jax.random.randint(key, (count,), 0, text.shape[0] - CONTEXT)
    return text[start[:, None] + jnp.arange(CONTEXT + 1)[None]].astype(jnp.int32)


def read_bytes(corpus: str, split: str, size: int) -> np.ndarray:
    """The first ``size`` bytes of a corpus' split.

    Raises:
        ValueError: it has fewer than a thousand.
    """
    parts: list[bytes] = []
    for document in load_corpus(corpus, split):
        parts.append(document.text.encode())
        if sum(map(len, parts)) >= size:
            break
    text = b"".join(parts)[:size]
    if len(text) < 1000:
        raise ValueError(f"the {split} split of {corpus} has {len(text)} bytes: give a larger one.")
    return np.frombuffer(text, np.uint8)


def learning_rates(settings: Settings) -> np.ndarray:
    """One per run: log-uniform from 1e-4 to 1."""
    rng = np.random.default_rng(settings.seed)
    return 10 ** rng.uniform(-4, 0, settings.runs)


def run(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Validation losses (runs, evaluations) and learning rates (runs,)."""
    train_text = jnp.asarray(read_bytes(settings.corpus, "train", 4_000_000))
    valid_text = jnp.asarray(read_bytes(settings.corpus, "validation", 400_000))
    held = windows(jax.random.key(settings.seed + 1), valid_text, 4096)
    rates = learning_rates(settings)
    key = jax.random.key(settings.seed)
    seeds = jax.random.split(jax.random.fold_in(key, 0), settings.runs)
    params = jax.vmap(lambda k: init(specs(), k))(seeds)
    rule = optax.scale_by_adam()
    state = jax.vmap(rule.init)(params)
    scale = jnp.asarray(rates, jnp.float32)

    def update(params: Any, state: Any, rate: Array, text: Array) -> tuple[Any, Any]:
        change, state = rule.update(jax.grad(mean_loss)(params, text), state)
        return jax.tree.map(lambda p, c: p - rate * c, params, change), state

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def between(params: Any, state: Any, key: Array) -> tuple[Any, Any, Array]:
        """The updates before one evaluation, and its losses. All runs see the same batches."""

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            text = windows(key, train_text, settings.batch)
            return jax.vmap(update, in_axes=(0, 0, 0, None))(*carry, scale, text), None

        keys = jax.random.split(key, settings.steps)
        (params, state), _ = jax.lax.scan(step, (params, state), keys)
        return params, state, jax.vmap(mean_loss, in_axes=(0, None))(params, held)

    losses = []
    for i in range(settings.evaluations):
        params, state, value = between(params, state, jax.random.fold_in(key, 1 + i))
        losses.append(np.asarray(value))
        if (i + 1) % 10 == 0:
            print(f"evaluation {i + 1} of {settings.evaluations}: best {min(losses[-1]):.3f}")
    curves = np.stack(losses, 1)
    # From the first value that is not finite on, a run has diverged.
    return np.where(np.cumsum(~np.isfinite(curves), 1) > 0, np.nan, curves), rates


def main(_: Sequence[str]) -> None:
    """Train and write."""
    logging.set_verbosity(logging.WARNING)
    settings = Settings(
        **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(Settings)}
    )
    curves, rates = run(settings)
    out = pathlib.Path(flags.FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"{TASK}/valid_loss": curves, f"{TASK}/hp": rates[:, None]}
    np.savez(out, **arrays)
    print(f"saved {len(curves)} runs of {curves.shape[1]} evaluations to {out}")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("corpus", "python_stdlib", "Text: python_stdlib or text:PATH.")
    flags.DEFINE_integer("runs", 40, "Learning rates.", lower_bound=1)
    flags.DEFINE_integer("evaluations", 100, "Evaluations of each run.", lower_bound=2)
    flags.DEFINE_integer("steps", 10, "Updates before every evaluation.", lower_bound=1)
    flags.DEFINE_integer("batch", 128, "Windows per update.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of learning rates, weights and batches.")
    flags.DEFINE_string("out", "runs/curves.npz", "The file to write.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
