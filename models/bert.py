"""BERT as an encoder of sentences: post-norm layers, mean over the tokens, unit length.

Sources: Devlin et al., "BERT", arXiv 1810.04805; pooling of Reimers and Gurevych, "Sentence-BERT",
arXiv 1908.10084. Inference only. A checkpoint is a Hugging Face folder, such as all-MiniLM-L6-v2.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import struct
from jaxtyping import Array, Float, Int

from models.layers import (
    MLP,
    Attention,
    Layer,
    Linear,
    Norm,
    finish_post_norm,
    linear,
    normalize,
)
from models.safetensors_io import Safetensors


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network.

    Attributes:
        heads: of the attention; they divide the width.
        max_length: tokens of the longest text, its two marks included.
    """

    num_layers: int
    heads: int
    max_length: int
    norm_eps: float = 1e-12


@struct.dataclass
class Params:
    """Embeddings and the stacked layers; a layer's two norms stand after its parts.

    ``positions`` holds the embedding of the first (only) segment, too.
    """

    tokens: Any  # (v, width)
    positions: Any  # (max_length, width)
    norm: Norm
    layers: Layer  # every leaf with a leading axis of layers


@functools.partial(jax.jit, static_argnames="cfg")
def embed(
    params: Params, cfg: Config, tokens: Int[Array, "b t"], lengths: Int[Array, " b"]
) -> Float[Array, "b width"]:
    """Unit vectors of texts: the mean over each row's first ``lengths`` states, normalised."""
    h = params.tokens[tokens] + params.positions[None, : tokens.shape[1]]
    h = normalize(h, params.norm, cfg.norm_eps)

    def step(h: Array, layer: Layer) -> tuple[Array, None]:
        return _layer(layer, cfg, h, lengths), None

    h, _ = jax.lax.scan(step, h, params.layers)
    real = (jnp.arange(tokens.shape[1])[None] < lengths[:, None])[..., None]
    mean = jnp.sum(jnp.where(real, h, 0.0), axis=1) / lengths[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _layer(
    layer: Layer, cfg: Config, h: Float[Array, "b t width"], lengths: Int[Array, " b"]
) -> Float[Array, "b t width"]:
    b, t, width = h.shape
    attn = layer.attn
    q, k, v = (linear(h, p).reshape(b, t, cfg.heads, -1) for p in (attn.q, attn.k, attn.v))
    mixed = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
    return finish_post_norm(layer, h, mixed.reshape(b, t, width), cfg.norm_eps)


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """From texts to unit vectors, ``batch`` at a time.

    A text of more than ``cfg.max_length`` tokens is refused: cut it first.
    """

    params: Params
    cfg: Config
    tokenizer: tokenizers.Tokenizer
    batch: int = 32

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width) float32.

        Raises:
            ValueError: a text of too many tokens.
        """
        ids = [self.tokenizer.encode(text).ids for text in texts]
        if (longest := max(map(len, ids), default=0)) > self.cfg.max_length:
            raise ValueError(
                f"a text has {longest} tokens and the encoder reads {self.cfg.max_length}: cut "
                "texts into smaller chunks."
            )
        found = []
        for start in range(0, len(ids), self.batch):
            rows = ids[start : start + self.batch]
            # Few shapes, so few compilations: batches are full and lengths powers of two.
            size = min(1 << (max(map(len, rows)) - 1).bit_length(), self.cfg.max_length)
            padded = np.zeros((self.batch, size), np.int32)
            lengths = np.ones(self.batch, np.int32)
            for i, row in enumerate(rows):
                padded[i, : len(row)], lengths[i] = row, len(row)
            vectors = embed(self.params, self.cfg, jnp.asarray(padded), jnp.asarray(lengths))
            found.append(np.asarray(vectors)[: len(rows)])
        return np.concatenate(found) if found else np.zeros((0, self.params.tokens.shape[1]))


def load(directory: str | pathlib.Path) -> SentenceEncoder:
    """A Hugging Face folder with ``config.json``, ``tokenizer.json`` and safetensors.

    The pooler, which sentence encoders do not use, is left out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of model, an activation or positions that BERT does not have here,
            a tensor that is missing or of another shape, or a damaged file.
    """
    folder = pathlib.Path(directory)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: name the folder of a BERT encoder.")
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise ValueError(f"{folder} holds a damaged config or tokenizer ({error}).") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    wanted = {
        "model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"
    }  # fmt: skip
    for key, value in wanted.items():
        if held.get(key, value) != value:
            raise ValueError(f"{folder}: {key} is {held[key]!r}, and only {value!r} is supported.")
    cfg = Config(
        held["num_hidden_layers"], held["num_attention_heads"], held["max_position_embeddings"],
        held["layer_norm_eps"],
    )  # fmt: skip
    reader = _Reader(Safetensors(folder), held["hidden_size"], held["intermediate_size"])
    layers = [reader.layer(i) for i in range(cfg.num_layers)]
    name, width = "embeddings.token_type_embeddings.weight", reader.width
    segment = reader.array(name, (held["type_vocab_size"], width))[0]
    positions = reader.array("embeddings.position_embeddings.weight", (cfg.max_length, width))
    params = Params(
        tokens=reader.array("embeddings.word_embeddings.weight", (held["vocab_size"], width)),
        positions=positions + segment[None],
        norm=reader.norm("embeddings.LayerNorm"),
        layers=jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
    )
    return SentenceEncoder(params, cfg, tokenizer)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Tensors by Hugging Face's names, checked and transposed."""

    source: Safetensors
    width: int
    inner: int

    def array(self, name: str, shape: tuple[int, ...]) -> Array:
        """One tensor in float32."""
        if name not in self.source.names():
            raise ValueError(f"{self.source.label} lacks {name}: it is no BERT encoder.")
        if self.source.shape(name) != shape:
            raise ValueError(
                f"{name} in {self.source.label} has shape {self.source.shape(name)}, and the "
                f"config asks for {shape}."
            )
        return jnp.asarray(self.source.read(name).astype(np.float32))

    def linear(self, name: str, rows: int, columns: int) -> Linear:
        """A map from ``rows`` to ``columns`` channels, kept as (out, in)."""
        weight = self.array(f"{name}.weight", (columns, rows))
        return Linear(weight.T, self.array(f"{name}.bias", (columns,)))

    def norm(self, name: str) -> Norm:
        """A layer norm."""
        shape = (self.width,)
        return Norm(self.array(f"{name}.weight", shape), self.array(f"{name}.bias", shape))

    def layer(self, number: int) -> Layer:
        """One layer."""
        at, width = f"encoder.layer.{number}", self.width
        q, k, v = (
            self.linear(f"{at}.attention.self.{part}", width, width)
            for part in ("query", "key", "value")
        )
        return Layer(
            attn_norm=self.norm(f"{at}.attention.output.LayerNorm"),
            attn=Attention(q, k, v, self.linear(f"{at}.attention.output.dense", width, width)),
            mlp_norm=self.norm(f"{at}.output.LayerNorm"),
            mlp=MLP(
                up=self.linear(f"{at}.intermediate.dense", width, self.inner),
                down=self.linear(f"{at}.output.dense", self.inner, width),
            ),
        )
