"""EAGLE's one-layer drafter: it predicts the target's next feature, then reads a token off it.

A feature is the target's hidden state after the final norm. Feature ``f_i`` goes with the NEXT
token ``x_{i+1}``, at rotary position i; the output predicts ``f_{i+1}``, and the target's head
makes of that the law of ``x_{i+2}``. Embedding and head stay with the target, frozen.

Sources: EAGLE arXiv 2401.15077, EAGLE-2 arXiv 2406.16858.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models import decoder
from models.attention import DensePolicy, Step
from models.flops import layer_flops
from models.layers import Layer, Linear, finish, layer_specs, linear, normalize
from models.params import ParamSpec
from ops.tree import StaticTree

READS = ("both", "features", "tokens")


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """Style of the layer and weights of its loss.

    Attributes:
        input_norm: normalise the layer's input (EAGLE does not).
        v_weight, p_weight: weights of the regression and of the soft cross-entropy.
        noise: half-width of the uniform noise on input features, for sequences of 512; it scales
            as 512 over the length.
        reads: ``both``, or ``features`` or ``tokens`` alone: ablations that see zeros in place of
            the other.

    Raises:
        ValueError: another word for what it reads.
    """

    input_norm: bool = False
    v_weight: float = 1.0
    p_weight: float = 0.1
    noise: float = 0.1
    reads: str = "both"

    def __post_init__(self):
        if self.reads not in READS:
            raise ValueError(f"unknown input {self.reads!r}: choose one of {', '.join(READS)}.")


@struct.dataclass
class Params:
    """``fc`` maps [embedding; feature] to the width; ``input_norm`` may be missing.

    ``reads`` is that of :class:`EagleConfig`.
    """

    fc: Any
    attn: Any
    mlp_norm: Any
    mlp: Any
    input_norm: Any = None
    reads: str = struct.field(pytree_node=False, default="both")


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Uniform within 1/sqrt(fan): the default of a PyTorch linear map with ``fan`` inputs."""

    fan: int

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        bound = self.fan**-0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def layer_config(target: decoder.Config) -> decoder.Config:
    """The drafter's layer as a decoder of one layer, with the target's rotations and no window."""
    return dataclasses.replace(target, num_layers=1, windows=None)


def specs(cfg: EagleConfig, target: decoder.Config) -> Params:
    """The abstract parameters of the drafter for a target."""
    width = target.hidden_size
    layer = layer_specs(layer_config(target))

    def fan_in(spec: ParamSpec) -> ParamSpec:
        if len(spec.shape) < 2:
            return spec
        return dataclasses.replace(spec, init=FanIn(spec.shape[0]))

    layer = jax.tree.map(fan_in, layer)
    fc = Linear(
        ParamSpec((2 * width, width), (None, "embed"), FanIn(2 * width)),
        ParamSpec((width,), ("embed",), FanIn(2 * width)),
    )
    input_norm = layer.attn_norm if cfg.input_norm else None
    return Params(fc, layer.attn, layer.mlp_norm, layer.mlp, input_norm, cfg.reads)


def forward(
    params: Params,
    target: decoder.Config,
    features: Float[Array, "b t width"],
    embeds: Float[Array, "b t width"],
    step: Step | None = None,
    cache: Any = None,
) -> tuple[Float[Array, "b t width"], Any]:
    """Predicted next features, and the layer's cache.

    Args:
        features: the target's (or, further down a draft, predicted) features.
        embeds: input embeddings of the tokens that FOLLOW them.
        step, cache: as in :func:`models.decoder.forward`, ``cache`` with one layer's cache.
    """
    cfg = layer_config(target)
    if step is None:
        row = jnp.arange(features.shape[1], dtype=jnp.int32)[None]
        step = Step(jnp.broadcast_to(row, features.shape[:2]))
    policy = DensePolicy()
    if params.reads == "features":
        embeds = jnp.zeros_like(embeds)
    elif params.reads == "tokens":
        features = jnp.zeros_like(features)
    x = linear(jnp.concatenate([embeds, features], axis=-1), params.fc)
    q, k, v, normed = _project(params, cfg, x)
    mixed = policy.attend(
        None, policy.prepare(cfg, step), q, k, v, normed, step, None if cache is None else cache[0]
    )
    # What follows attention is as in the decoder, and reads no input norm.
    layer = Layer(params.mlp_norm, params.attn, params.mlp_norm, params.mlp)
    x = finish(layer, cfg, x, mixed.out, lambda name, value: None)
    return x, None if cache is None else (mixed.cache,)


def _project(
    params: Params, cfg: decoder.Config, x: Float[Array, "b t width"]
) -> tuple[Array, ...]:
    """Queries, keys, values; unlike in the decoder the input norm may be missing."""
    normed = x if params.input_norm is None else normalize(x, params.input_norm, cfg.norm_eps)

    def heads(p: Linear, count: int) -> Array:
        return linear(normed, p).reshape(*x.shape[:2], count, cfg.head_dim)

    attn = params.attn
    q, k = heads(attn.q, cfg.num_heads), heads(attn.k, cfg.num_kv_heads)
    if attn.q_norm is not None and attn.k_norm is not None:
        q = normalize(q, attn.q_norm, cfg.norm_eps)
        k = normalize(k, attn.k_norm, cfg.norm_eps)
    return q, k, heads(attn.v, cfg.num_kv_heads), normed


def draft_flops(
    cfg: EagleConfig,
    target: decoder.Config,
    tree: StaticTree,
    vocabulary: int | None = None,
    context: int = 0,
    fed: float = 1.0,
) -> float:
    """FLOPs of one draft of a static tree: products only, two per multiply-add.

    The newly committed tokens (``fed``) go through the layer and give level 1; every drafted node
    with children goes through it once more. Other arguments as for Clover.
    """
    width = target.hidden_size
    vocabulary = target.vocab_size if vocabulary is None else vocabulary
    once = 4.0 * width**2 + layer_flops(layer_config(target), context)
    expanded = sum(len(level.expanded) for level in tree.levels)
    return (fed + expanded - 1) * once + expanded * 2.0 * width * vocabulary
