"""Clover-2's regressive heads, and Clover-1 as reconstructed.

A drafter that guesses several tokens ahead with almost no attention: every head folds the token
guessed before into a recurrent state by one-key attention. Hidden state ``g_s`` of the target
(before its final norm) goes with the next token ``x_{s+1}``; head 1 then predicts ``x_{s+2}``.

Sources: Clover arXiv 2405.00263, Clover-2 arXiv 2408.00264. Token embeddings are rows of the
target's head, which like the head itself stay with the target and are never trained.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.attention import Step
from models.flops import layer_flops
from models.layers import Linear, Norm, layer_specs, linear, norm_specs, normalize
from models.params import Constant, ParamSpec, init, validate
from ops.tree import StaticTree
from ops.weights import open_block

VARIANTS = ("clover2", "clover1")


@dataclasses.dataclass(frozen=True)
class CloverConfig:
    """Shape of the heads and weights of their loss.

    Attributes:
        num_heads: heads trained. Clover-2 shares weights from the second head on, so it can draft
            deeper than it was trained for; Clover-1 cannot.
        num_layers: layers of the augmenting block; 0 leaves the block out (an ablation).
        v_weight, p_weight: weights of the regression and of the soft cross-entropy.
        decay: each head weighs this much of the one before.
        variant: ``clover2``, or ``clover1`` as reconstructed (see :data:`CLOVER1`).
        regressive: carry guessed tokens in the state; False is an ablation.
        distill: learn from the target's hidden states and laws; False: from the text's tokens.
        token_scale: factor of the token embeddings wherever their size matters (not in the cosine),
            1 in the papers. Another one changes how fast the maps that read them are learnt, not
            what they can express: rows of the head are small beside hidden states, which takes
            very many updates to make up for.
    """

    num_heads: int = 5
    num_layers: int = 2
    v_weight: float = 10.0
    p_weight: float = 1.0
    decay: float = 0.7
    variant: str = "clover2"
    regressive: bool = True
    distill: bool = True
    token_scale: float = 1.0

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(
                f"unknown variant {self.variant!r}: choose one of {', '.join(VARIANTS)}."
            )
        if self.num_heads < 1 or self.num_layers < 0:
            raise ValueError(
                f"Clover needs num_heads of at least 1 and num_layers of at least 0, got "
                f"{self.num_heads} and {self.num_layers}."
            )


CLOVER1 = CloverConfig(num_heads=4, num_layers=1, variant="clover1", distill=False)
"""Clover-1: one augmenting layer, residual heads, cross-entropy on the text's tokens."""


@struct.dataclass
class AttentionDecoder:
    """Attention of a state over one key, a token's embedding: with one key there is no softmax."""

    norm: Any
    q: Any
    k: Any
    v: Any


@struct.dataclass
class Params:
    """Trained weights. ``augment`` holds the block's layers and norm; it has no embedding.

    Clover-2 has ``entry`` (before the block), ``first`` and ``later`` (output maps of head 1 and
    of the others); Clover-1 has ``blocks``, one residual map per head. ``regressive`` is None
    without regression.
    """

    augment: Any
    output_norm: Any
    regressive: Any = None  # AttentionDecoder
    entry: Any = None  # AttentionDecoder
    first: Any = None  # Linear
    later: Any = None  # Linear
    blocks: Any = None  # Linear (heads, width, width)


@dataclasses.dataclass(frozen=True)
class NearIdentity:
    """The identity (if ``diagonal``) in the upper square of a matrix, plus noise in [0, noise)."""

    diagonal: float = 1.0
    noise: float = 0.01

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        noise = jax.random.uniform(key, shape, jnp.float32, 0.0, self.noise)
        return (self.diagonal * jnp.eye(*shape, dtype=jnp.float32) + noise).astype(dtype)


def augment_config(cfg: CloverConfig, target: decoder.Config) -> decoder.Config:
    """The augmenting block as a decoder: layers like the target's last one."""
    windows = None if target.windows is None else (target.windows[-1],) * cfg.num_layers
    return dataclasses.replace(target, num_layers=cfg.num_layers, windows=windows)


def specs(cfg: CloverConfig, target: decoder.Config) -> Params:
    """The abstract parameters of the heads for a target.

    Raises:
        ValueError: the target's width is not a multiple of its number of heads.
    """
    width = target.hidden_size
    if width % target.num_heads:
        raise ValueError(
            f"Clover splits the width {width} by the target's {target.num_heads} heads, which does "
            f"not divide: choose another target."
        )

    def near_identity(rows: int, diagonal: float = 1.0) -> Linear:
        w = ParamSpec((rows, width), (None, "embed"), NearIdentity(diagonal))
        return Linear(w, ParamSpec((width,), ("embed",), Constant(0.0)))

    def attention_decoder() -> AttentionDecoder:
        norm = Norm(ParamSpec((width,), (None,), Constant(1.0)))
        return AttentionDecoder(
            norm, near_identity(width), near_identity(width), near_identity(width, 0.0)
        )

    block = augment_config(cfg, target)
    segments = tuple(
        decoder.Segment(layer_specs(block), stacked=False) for _ in range(cfg.num_layers)
    )
    params = Params(
        augment=decoder.Params(None, segments, norm_specs(target, width)),
        output_norm=norm_specs(target, width),
        regressive=attention_decoder() if cfg.regressive else None,
    )
    if cfg.variant == "clover1":
        heads = cfg.num_heads
        w = ParamSpec((heads, width, width), (None, None, "embed"), Constant(0.0))
        return dataclasses.replace(
            params, blocks=Linear(w, ParamSpec((heads, width), (None, "embed"), Constant(0.0)))
        )
    return dataclasses.replace(
        params,
        entry=attention_decoder(),
        first=near_identity(width),
        later=near_identity(2 * width),
    )


def init_from_target(
    target_params: decoder.Params, target: decoder.Config, cfg: CloverConfig, key: jax.Array
) -> Params:
    """Initial weights: every layer of the block a copy of the target's last, norms its final norm.

    Raises:
        ValueError: the target's last layer has codec leaves, which cannot be trained.
    """
    wanted = specs(cfg, target)
    params = init(wanted, key)
    last = target_params.segments[-1]
    layer = open_block(last.layers)
    if last.stacked:
        layer = jax.tree.map(lambda x: x[-1], layer)

    def copy(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)

    segments = tuple(
        dataclasses.replace(segment, layers=copy(layer)) for segment in params.augment.segments
    )
    norm = copy(target_params.final_norm)
    block = dataclasses.replace(params.augment, segments=segments, final_norm=norm)
    params = dataclasses.replace(params, augment=block, output_norm=copy(norm))
    validate(params, wanted)
    return params


def cosine_weights(
    q: Float[Array, "*batch heads d"], k: Float[Array, "*batch heads d"], eps: float
) -> Float[Array, "*batch heads"]:
    """Cosine of each head's query and key, float32, in [-1, 1]."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)

    def inverse_norm(x: Array) -> Array:
        return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), eps**2))

    return jnp.sum(q * k, axis=-1) * inverse_norm(q) * inverse_norm(k)


def attention_decoder(
    params: AttentionDecoder,
    target: decoder.Config,
    x: Float[Array, "*batch width"],
    y: Float[Array, "*batch width"],
    value_scale: float = 1.0,
) -> Float[Array, "*batch width"]:
    """``x`` plus the values of token embedding ``y``, weighted per head by a cosine.

    ``value_scale`` multiplies ``y`` for the values.
    """

    def heads(z: Array) -> Array:
        return z.reshape(*z.shape[:-1], target.num_heads, -1)

    q = heads(linear(normalize(x, params.norm, target.norm_eps), params.q))
    k, v = heads(linear(y, params.k)), heads(linear(value_scale * y, params.v))
    weight = cosine_weights(q, k, target.norm_eps).astype(x.dtype)
    return x + (weight[..., None] * v).reshape(x.shape)


def augment(
    params: Params,
    cfg: CloverConfig,
    target: decoder.Config,
    pre_norm: Float[Array, "b t width"],
    embeds: Float[Array, "b t width"],
    step: Step | None = None,
    cache: Any = None,
) -> tuple[Float[Array, "b t width"], Any]:
    """The state before head 1 at every position, and the block's cache.

    Args:
        pre_norm: the target's hidden states before its final norm.
        embeds: embeddings of the tokens that FOLLOW them.
        step, cache: as in :func:`models.decoder.forward`.
    """
    x = pre_norm
    if params.entry is not None:
        x = attention_decoder(params.entry, target, x, embeds, cfg.token_scale)
    block = augment_config(cfg, target)
    out = decoder.forward(params.augment, block, embeds=x, step=step, cache=cache)
    return out.hidden, out.cache


def head(
    params: Params,
    cfg: CloverConfig,
    target: decoder.Config,
    state: Float[Array, "*batch width"],
    embeds: Float[Array, "*batch width"],
    level: int,
) -> tuple[Float[Array, "*batch width"], Float[Array, "*batch width"]]:
    """Head ``level`` (1, 2, ...): the new state, and the hidden state that the target's head reads.

    Args:
        state: the state before this head.
        embeds: embeddings of the tokens guessed last: for level 1 the one that is already certain,
            which only Clover-1 reads here (in Clover-2 it went in before the block).
    """
    if cfg.variant == "clover2" and level == 1:
        return state, normalize(
            linear(state, _given(params.first)), params.output_norm, target.norm_eps
        )
    if params.regressive is not None:
        state = attention_decoder(params.regressive, target, state, embeds, cfg.token_scale)
    embeds = cfg.token_scale * embeds
    if cfg.variant == "clover2":
        out = linear(jnp.concatenate([state, embeds], axis=-1), _given(params.later))
    else:
        blocks = _given(params.blocks)
        out = state + jax.nn.silu(linear(state, Linear(blocks.w[level - 1], blocks.b[level - 1])))
    return state, normalize(out, params.output_norm, target.norm_eps)


def head_hidden(
    params: Params,
    cfg: CloverConfig,
    target: decoder.Config,
    pre_norm: Float[Array, "b t width"],
    embeds: Float[Array, "b t width"],
    step: Step | None = None,
) -> Float[Array, "heads b t width"]:
    """Teacher-forced outputs of all heads; only products are kept for the backward pass.

    ``embeds[:, s]`` belongs to the token after position s; head i (from 0) reads those of
    ``s .. s + i``, so its last i positions are meaningless.
    """
    state, _ = augment(params, cfg, target, pre_norm, embeds, step)
    outputs = []
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    for level in range(1, cfg.num_heads + 1):

        def one(params: Params, state: Array, embeds: Array, level: int = level) -> Any:
            return head(params, cfg, target, state, embeds, level)

        state, out = jax.checkpoint(one, policy=products)(params, state, embeds)
        outputs.append(out)
        embeds = jnp.pad(embeds[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return jnp.stack(outputs)


def draft_flops(
    cfg: CloverConfig,
    target: decoder.Config,
    tree: StaticTree,
    vocabulary: int | None = None,
    context: int = 0,
    fed: float = 1.0,
) -> float:
    """FLOPs of one draft of a static tree: products only, two per multiply-add.

    Args:
        vocabulary: tokens that the head scores; None: all.
        context: text length that the block attends to.
        fed: newly committed tokens that the block reads.
    """
    width = target.hidden_size
    vocabulary = target.vocab_size if vocabulary is None else vocabulary
    one_key = 6.0 * width**2  # q, k and v
    entry = one_key if cfg.variant == "clover2" else 0.0
    layers = cfg.num_layers * layer_flops(target, context)
    total = fed * (entry + layers)
    for number, level in enumerate(tree.levels, 1):
        regress = one_key if cfg.regressive else 0.0
        if cfg.variant == "clover1":
            each = regress + 2.0 * width**2
        else:
            each = 2.0 * width**2 if number == 1 else regress + 4.0 * width**2
        total += len(level.expanded) * (each + 2.0 * width * vocabulary)
    return total


def _given(weights: Linear | None) -> Linear:
    if weights is None:
        raise ValueError("these weights are of another Clover variant: check the config.")
    return weights
