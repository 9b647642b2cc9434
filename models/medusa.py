"""Medusa's heads: independent guesses of several tokens ahead from one hidden state.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
Heads", arXiv 2401.10774. Head i (from 0) reads the target's hidden state of position t after the
final norm and predicts token ``t + 2 + i``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.draft_head import DraftVocabulary, draft_logits, head_rows
from models.layers import Linear
from models.params import Constant, Normal, ParamSpec, init
from ops.tree import StaticTree
from ops.weights import Weight


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """Shape of the heads and weights of their loss.

    Attributes:
        num_heads: tokens guessed.
        shared_head: score with the target's frozen head, on the block's output plus a low-rank
            linear map of it, instead of giving every head a matrix of its own. A departure from
            the paper for vocabularies that are large beside the model.
        rank: rank of that map.
        draft_vocab: tokens that own matrices score, if not all; the draft vocabulary's size.
        decay: each head's loss weighs this much of the one before (the paper's 0.8; the released
            code sums plainly, 1.0).
    """

    num_heads: int = 4
    shared_head: bool = False
    rank: int = 64
    draft_vocab: int | None = None
    decay: float = 0.8

    def __post_init__(self):
        if self.num_heads < 1 or self.rank < 1:
            raise ValueError(
                f"Medusa needs num_heads and rank of at least 1, got {self.num_heads}, {self.rank}."
            )


@struct.dataclass
class Params:
    """Stacked over heads: a residual block, and either matrices or low-rank maps."""

    blocks: Any  # Linear (heads, width, width), (heads, width)
    matrices: Weight = None  # (heads, vocab, width)
    down: Weight = None  # (heads, width, rank)
    up: Weight = None  # (heads, rank, width)


def specs(cfg: MedusaConfig, target: decoder.Config) -> Params:
    """The abstract parameters of the heads for a target."""
    k, width = cfg.num_heads, target.hidden_size
    blocks = Linear(
        ParamSpec((k, width, width), (None, None, "embed"), Constant(0.0)),
        ParamSpec((k, width), (None, "embed"), Constant(0.0)),
    )
    if cfg.shared_head:
        return Params(
            blocks,
            down=ParamSpec((k, width, cfg.rank), (None, "embed", None), Normal(width**-0.5)),
            up=ParamSpec((k, cfg.rank, width), (None, None, "embed"), Constant(0.0)),
        )
    vocab = target.vocab_size if cfg.draft_vocab is None else cfg.draft_vocab
    return Params(blocks, matrices=ParamSpec((k, vocab, width), (None, "vocab", "embed")))


def init_from_target(
    target_params: decoder.Params,
    target: decoder.Config,
    cfg: MedusaConfig,
    key: jax.Array,
    vocabulary: DraftVocabulary | None = None,
) -> Params:
    """Initial weights: blocks that do nothing, and every matrix a copy of the target's head.

    Raises:
        ValueError: own matrices whose ``draft_vocab`` is not the size of ``vocabulary``.
    """
    check_vocabulary(cfg, vocabulary)
    params = init(specs(cfg, target), key)
    if cfg.shared_head:
        return params
    if vocabulary is None:
        rows = head_rows(target_params, target, jnp.arange(target.vocab_size))
    else:
        rows = vocabulary.rows
    copies = jnp.tile(rows.astype(jnp.float32)[None], (cfg.num_heads, 1, 1))
    return dataclasses.replace(params, matrices=copies)


def check_vocabulary(cfg: MedusaConfig, vocabulary: DraftVocabulary | None) -> None:
    """Raise ValueError if own matrices are not as wide as the draft vocabulary."""
    size = None if vocabulary is None else vocabulary.ids.shape[0]
    if not cfg.shared_head and cfg.draft_vocab != size:
        raise ValueError(
            f"the heads score draft_vocab={cfg.draft_vocab} tokens but the draft vocabulary has "
            f"{size}: make them equal, or None for all tokens."
        )


def head_hidden(
    params: Params, cfg: MedusaConfig, hidden: Float[Array, "*batch width"]
) -> Float[Array, "heads *batch width"]:
    """What each head's matrix reads: ``h + silu(R h + b)``, plus the low-rank map if shared."""
    lead = (cfg.num_heads,) + (1,) * (hidden.ndim - 1) + (-1,)
    inner = jnp.einsum("...i,kio->k...o", hidden, params.blocks.w)
    out = hidden[None] + jax.nn.silu(inner + params.blocks.b.reshape(lead).astype(inner.dtype))
    if params.down is None:
        return out
    low = jnp.einsum("k...i,kir->k...r", out, params.down)
    return out + jnp.einsum("k...r,kro->k...o", low, params.up)


def head_logits(
    params: Params,
    cfg: MedusaConfig,
    target_params: decoder.Params,
    target: decoder.Config,
    vocabulary: DraftVocabulary | None,
    hidden: Float[Array, "*batch width"],
) -> Float[Array, "heads *batch d"]:
    """Float32 logits of all heads over the draft vocabulary (None: over all tokens)."""
    out = head_hidden(params, cfg, hidden)
    if params.matrices is None:
        return draft_logits(target_params, target, vocabulary, out)
    return jnp.einsum("k...i,kvi->k...v", out, params.matrices).astype(jnp.float32)


def draft_flops(
    cfg: MedusaConfig, target: decoder.Config, tree: StaticTree, vocabulary: int | None = None
) -> float:
    """FLOPs of one draft: products only, two per multiply-add.

    Every head that the tree's depth needs runs once. ``vocabulary`` is the number of tokens that
    a head scores; None: all.
    """
    width = target.hidden_size
    vocabulary = target.vocab_size if vocabulary is None else vocabulary
    low_rank = 4.0 * width * cfg.rank if cfg.shared_head else 0.0
    return tree.max_depth * (2.0 * width**2 + low_rank + 2.0 * width * vocabulary)
