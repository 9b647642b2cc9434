"""The pieces of a transformer layer: parameters, their specs, what surrounds attention."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from models.params import Constant, Normal, ParamSpec
from ops.weights import Weight, matmul

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@struct.dataclass
class Linear:
    """A matrix (in, out) and an optional bias (out,)."""

    w: Weight
    b: Weight = None


@struct.dataclass
class Norm:
    """RMSNorm, or LayerNorm when it has a bias."""

    scale: Weight
    bias: Weight = None


@struct.dataclass
class Attention:
    """Projections of a layer; ``q_norm`` and ``k_norm`` act over the head width."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Any = None  # Norm; Any because jit puts a marker where a tree of shardings has None
    k_norm: Any = None


@struct.dataclass
class MLP:
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""

    up: Linear
    down: Linear
    gate: Any = None  # Linear


@struct.dataclass
class Layer:
    """One pre-norm transformer layer."""

    attn_norm: Norm
    attn: Attention
    mlp_norm: Norm
    mlp: MLP


def norm_specs(cfg: Any, width: int, axis: str | None = None) -> Norm:
    """Specs of a norm of the config's kind over ``width`` channels."""
    bias = ParamSpec((width,), (axis,), Constant(0.0)) if cfg.norm == "layer" else None
    return Norm(ParamSpec((width,), (axis,), Constant(1.0)), bias)


def linear_specs(shape: tuple[int, int], axes: tuple[str, str], bias: bool, std: float) -> Linear:
    """Specs of a matrix (in, out) and its optional bias."""
    return Linear(
        ParamSpec(shape, axes, Normal(std)),
        ParamSpec((shape[1],), (axes[1],), Constant(0.0)) if bias else None,
    )


def layer_specs(cfg: Any) -> Layer:
    """Specs of one layer (not stacked). Output projections start smaller, by 1/sqrt(2 layers)."""
    std, out_std = cfg.init_stddev, cfg.init_stddev * (2 * cfg.num_layers) ** -0.5
    width, q_width = cfg.hidden_size, cfg.num_heads * cfg.head_dim
    kv_width, inner = cfg.num_kv_heads * cfg.head_dim, cfg.intermediate_size
    rms_head = Norm(ParamSpec((cfg.head_dim,), (None,), Constant(1.0)))
    return Layer(
        attn_norm=norm_specs(cfg, width),
        attn=Attention(
            q=linear_specs((width, q_width), ("embed", "heads"), cfg.qkv_bias, std),
            k=linear_specs((width, kv_width), ("embed", "kv_heads"), cfg.qkv_bias, std),
            v=linear_specs((width, kv_width), ("embed", "kv_heads"), cfg.qkv_bias, std),
            o=linear_specs((q_width, width), ("heads", "embed"), cfg.out_bias, out_std),
            q_norm=rms_head if cfg.qk_norm else None,
            k_norm=rms_head if cfg.qk_norm else None,
        ),
        mlp_norm=norm_specs(cfg, width),
        mlp=MLP(
            up=linear_specs((width, inner), ("embed", "mlp"), cfg.mlp_bias, std),
            down=linear_specs((inner, width), ("mlp", "embed"), cfg.mlp_bias, out_std),
            gate=linear_specs((width, inner), ("embed", "mlp"), cfg.mlp_bias, std)
            if cfg.gated_mlp
            else None,
        ),
    )


def linear(x: Float[Array, "*batch inner"], p: Linear) -> Float[Array, "*batch outer"]:
    """``x @ w + b``."""
    y = matmul(x, p.w)
    return y if p.b is None else y + p.b.reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)


def normalize(x: Float[Array, "*batch width"], p: Norm, eps: float) -> Float[Array, "*batch width"]:
    """RMSNorm, or LayerNorm if ``p`` has a bias; in float32, returned in the dtype of ``x``."""
    y = x.astype(jnp.float32)
    lead = (1,) * (x.ndim - 1) + (-1,)
    if p.bias is not None:
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps)
    y = y * p.scale.reshape(lead).astype(jnp.float32)
    if p.bias is not None:
        y = y + p.bias.reshape(lead).astype(jnp.float32)
    return y.astype(x.dtype)


def project(
    layer: Layer, cfg: Any, x: Float[Array, "b t width"], tap: Callable[[str, Array], None]
) -> tuple[Array, Array, Array, Array]:
    """Unrotated q (b, t, h, d), k and v (b, t, g, d), and the normed input of the layer."""
    normed = normalize(x, layer.attn_norm, cfg.norm_eps)
    tap("attn_in", normed)
    b, t, _ = x.shape
    q = linear(normed, layer.attn.q).reshape(b, t, cfg.num_heads, cfg.head_dim)
    k = linear(normed, layer.attn.k).reshape(b, t, cfg.num_kv_heads, cfg.head_dim)
    v = linear(normed, layer.attn.v).reshape(b, t, cfg.num_kv_heads, cfg.head_dim)
    if layer.attn.q_norm is not None and layer.attn.k_norm is not None:
        q = normalize(q, layer.attn.q_norm, cfg.norm_eps)
        k = normalize(k, layer.attn.k_norm, cfg.norm_eps)
    return q, k, v, normed


def no_tap(name: str, value: Array) -> None:
    """Where nothing is calibrated."""


def add_attention(
    layer: Layer,
    x: Float[Array, "b t width"],
    mixed: Float[Array, "b t h d"],
    tap: Callable[[str, Array], None] = no_tap,
    drop: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b t width"]:
    """The stream after attention: its output projection, and the residual."""
    mixed = mixed.reshape(*mixed.shape[:2], -1)
    tap("attn_out_in", mixed)
    return x + drop(linear(mixed, layer.attn.o))


def add_mlp(
    layer: Layer,
    cfg: Any,
    x: Float[Array, "b t width"],
    tap: Callable[[str, Array], None] = no_tap,
    drop: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b t width"]:
    """The stream after the MLP."""
    normed = normalize(x, layer.mlp_norm, cfg.norm_eps)
    tap("mlp_in", normed)
    inner = linear(normed, layer.mlp.up)
    act = ACTIVATIONS[cfg.activation]
    inner = act(inner) if layer.mlp.gate is None else act(linear(normed, layer.mlp.gate)) * inner
    tap("mlp_down_in", inner)
    return x + drop(linear(inner, layer.mlp.down))


def finish_post_norm(
    layer: Layer,
    x: Float[Array, "b t width"],
    mixed: Float[Array, "b t inner"],
    eps: float,
    drops: tuple[Callable[[Array], Array], ...] = (lambda x: x,) * 3,
) -> Float[Array, "b t width"]:
    """The rest of a layer whose norms stand after its two sums, with GELU.

    ``drops`` act on what attention adds, on the MLP's inner values and on what the MLP adds.
    """
    after_attention, inside, after_mlp = drops
    x = normalize(x + after_attention(linear(mixed, layer.attn.o)), layer.attn_norm, eps)
    inner = ACTIVATIONS["gelu"](linear(x, layer.mlp.up))
    out = linear(inside(inner), layer.mlp.down)
    return normalize(x + after_mlp(out), layer.mlp_norm, eps)


def finish(
    layer: Layer,
    cfg: Any,
    x: Float[Array, "b t width"],
    mixed: Float[Array, "b t h d"],
    tap: Callable[[str, Array], None],
    drop: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "b t width"]:
    """The rest of a layer: output projection, residual, MLP, residual.

    ``drop`` acts on what attention and MLP add to the stream, for dropout in training.
    """
    x = add_attention(layer, x, mixed, tap, drop)
    return add_mlp(layer, cfg, x, tap, drop)
