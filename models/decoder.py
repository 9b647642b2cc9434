"""One decoder-only transformer for the Llama, Qwen, Mistral and GPT-2 families.

Pure functions over a parameter pytree. Layers of one structure are stacked into segments:
training scans them, decoding unrolls them after :func:`unstack` (:mod:`models.layer_runs`). A layer
is public as ``layers.project``, ``policy.attend`` and ``layers.finish``, for methods that change
the stream inside a layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models.attention import AttentionPolicy, DensePolicy, EmbeddingPolicy, PositionScheme, Step
from models.layer_runs import Kept, LayerChoice, LayerRunner, run_layers
from models.layers import ACTIVATIONS, Norm, layer_specs, norm_specs, normalize
from models.params import Normal, ParamSpec
from models.position_embeddings import learned, sinusoids
from models.positions import RopeScaling
from ops.weights import Weight, matmul, take

NO_WINDOW = 2**30
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static shape and style of a decoder; hashable, so it can be a jit-static argument.

    ``windows`` gives a sliding window per layer (None entries: full attention); ``position`` is
    ``rope``, ``alibi``, ``learned`` or ``sinusoidal`` (both added to the tokens), or ``none``;
    ``norm`` is ``rms`` or ``layer`` (with bias); ``activation`` is ``silu``, ``gelu`` or
    ``gelu_tanh``, gated (SwiGLU) if ``gated_mlp``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int
    activation: str = "silu"
    gated_mlp: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    position: str = "rope"
    rope_base: float = 10000.0
    rotary_fraction: float = 1.0
    rope: RopeScaling = RopeScaling()
    windows: tuple[int | None, ...] | None = None
    causal: bool = True
    init_stddev: float = 0.02

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of "
                f"num_kv_heads {self.num_kv_heads}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: use one of {', '.join(ACTIVATIONS)}."
            )
        if self.norm not in ("rms", "layer") or self.position not in POSITIONS:
            raise ValueError(
                f"norm must be rms or layer and position one of {', '.join(POSITIONS)}, "
                f"got {self.norm!r}, {self.position!r}."
            )
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"sinusoids need an even hidden_size, got {self.hidden_size}.")
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers."
            )

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.head_dim * self.rotary_fraction)


@struct.dataclass
class Segment:
    """A run of layers of one structure: stacked along axis 0, or a single unstacked layer."""

    layers: Any
    count: int = struct.field(pytree_node=False, default=1)
    stacked: bool = struct.field(pytree_node=False, default=True)


@struct.dataclass
class Params:
    """All weights. ``head`` is None when it is tied to ``embed``."""

    embed: Weight  # (vocab, hidden)
    segments: tuple[Segment, ...]
    final_norm: Norm
    head: Weight = None  # (hidden, vocab)
    position_embed: Weight = None  # (max_length, hidden)


def specs(cfg: Config) -> Params:
    """The abstract parameters of a decoder: one stacked segment of all layers."""
    layers = jax.tree.map(lambda s: s.stacked(cfg.num_layers), layer_specs(cfg))
    std = cfg.init_stddev
    return Params(
        embed=ParamSpec((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), Normal(std)),
        segments=(Segment(layers, count=cfg.num_layers),),
        final_norm=norm_specs(cfg, cfg.hidden_size),
        head=None
        if cfg.tied
        else ParamSpec((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"), Normal(std)),
        position_embed=ParamSpec((cfg.max_length, cfg.hidden_size), (None, "embed"), Normal(std))
        if cfg.position == "learned"
        else None,
    )


def unstack(params: Params) -> Params:
    """The same parameters with every layer its own segment, for unrolled decoding."""
    segments = []
    for segment in params.segments:
        if not segment.stacked:
            segments.append(segment)
            continue
        for i in range(segment.count):
            layer = jax.tree.map(lambda x, i=i: x[i], segment.layers)
            segments.append(Segment(layer, count=1, stacked=False))
    return dataclasses.replace(params, segments=tuple(segments))


@struct.dataclass
class Output:
    """What a forward pass returns; unused fields cost nothing under jit.

    ``hidden_states`` holds the embeddings and every layer's output (the last one pre-norm).
    ``taps`` maps each tap's name to its reducer's result per layer, stacked.
    """

    hidden: Any  # (b, t, width), after the final norm: what the head reads
    pre_norm: Any  # (b, t, width)
    cache: Any = None
    hidden_states: Any = None
    taps: Any = None
    aux: Any = None


def default_policy(cfg: Config, scheme: PositionScheme | None = None) -> DensePolicy:
    """Dense attention with the windows of the config; with its rotations, or those of a scheme."""
    if cfg.windows is None or all(w is None for w in cfg.windows):
        return DensePolicy(scheme=scheme)
    windows = jnp.asarray([NO_WINDOW if w is None else w for w in cfg.windows], jnp.int32)
    return DensePolicy(windows, scheme=scheme)


def embed(
    params: Params, cfg: Config, tokens: Int[Array, "b t"], positions: Array
) -> Float[Array, "b t width"]:
    """Token embeddings, plus learned positions or sinusoids where the model has them.

    Real positions are read between the rows of a learned table. Sinusoids are as large beside
    initial embeddings as in arXiv 1706.03762, which has embeddings of size 1.
    """
    x = take(params.embed, tokens)
    if params.position_embed is not None:
        x = x + learned(params.position_embed, positions)
    elif cfg.position == "sinusoidal":
        x = x + (cfg.init_stddev * sinusoids(positions, cfg.hidden_size)).astype(x.dtype)
    return x


def unembed(
    params: Params, cfg: Config, hidden: Float[Array, "*batch width"]
) -> Float[Array, "*batch vocab"]:
    """Logits, float32, of post-norm hidden states."""
    if params.head is None:
        return matmul(hidden, params.embed, transpose=True).astype(jnp.float32)
    return matmul(hidden, params.head).astype(jnp.float32)


def head_matrix(params: Params) -> Float[Array, "vocab width"]:
    """The matrix that reads tokens out of hidden states, of weights that are plain arrays."""
    return params.embed if params.head is None else params.head.T


def forward(
    params: Params,
    cfg: Config,
    tokens: Int[Array, "b t"] | None = None,
    *,
    embeds: Float[Array, "b t width"] | None = None,
    step: Step | None = None,
    policy: AttentionPolicy | None = None,
    cache: Any = None,
    layers: LayerChoice | None = None,
    all_hidden: bool = False,
    taps: Mapping[str, Callable[[Array], Any]] | None = None,
    remat: bool = False,
) -> Output:
    """Run the decoder.

    Args:
        tokens, embeds: exactly one; ``embeds`` are layer inputs as they stand, so a forward can
            resume from hidden states by naming the layer in ``layers``.
        step: positions and more; default: one document per row at positions 0, 1, ...
        policy: how queries meet keys; default :func:`default_policy`.
        cache: a sequence with one cache per layer (params must be unstacked), or None.
        layers: which layers and sub-layers to run; default all. The choice may be traced.
        all_hidden: return every layer's output.
        taps: reducers by tap name (attn_in, attn_out_in, mlp_in, mlp_down_in), for calibration.
        remat: recompute each layer in the backward pass.

    Raises:
        ValueError: both or none of tokens and embeds, or a combination that is not supported.
    """
    if (tokens is None) == (embeds is None):
        raise ValueError("give exactly one of tokens and embeds.")
    source: Any = tokens if embeds is None else embeds
    if step is None:
        row = jnp.arange(source.shape[1], dtype=jnp.int32)[None]
        step = Step(jnp.broadcast_to(row, source.shape[:2]), causal=cfg.causal)
    policy = default_policy(cfg) if policy is None else policy
    shared = policy.prepare(cfg, step)
    if embeds is not None:
        x = embeds
    elif isinstance(policy, EmbeddingPolicy):
        x = policy.embed(params, cfg, source, shared, step)
    else:
        x = embed(params, cfg, source, step.positions)
    runner = LayerRunner(cfg, policy, shared, step, dict(taps or {}), all_hidden, remat)
    x, kept = run_layers(runner, params.segments, x, layers, cache)
    hidden = normalize(x, params.final_norm, cfg.norm_eps)
    return Output(
        hidden=hidden,
        pre_norm=x,
        cache=kept.cache,
        hidden_states=_all_hidden(kept) if all_hidden else None,
        taps=kept.taps,
        aux=kept.aux,
    )


def _all_hidden(kept: Kept) -> Array:
    first = kept.first[None]
    return first if kept.hidden is None else jnp.concatenate([first, kept.hidden])
