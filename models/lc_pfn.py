"""LC-PFN: a transformer from the first points of a learning curve to laws of the later ones.

Source: Adriaensen et al., "Efficient Bayesian Learning Curve Extrapolation using Prior-Data Fitted
Networks", arXiv 2310.20447. A token is a point of a curve; a context token holds its epoch and its
value, a query token its epoch alone. There are no positions: epochs are inputs. The output at a
query is a binned density, see :mod:`ops.bar_distribution`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from models.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    Layer,
    Linear,
    Norm,
    finish_post_norm,
    linear,
)
from models.params import Constant, Initializer, ParamSpec, Uniform

NORM_EPS = 1e-5
UNIFORM_STD = math.sqrt(1 / 12)
"""Standard deviation of the uniform law on [0, 1], by which inputs are scaled."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network; the defaults are the paper's largest.

    Attributes:
        width: of the hidden states.
        layers: number of layers.
        heads: of the attention; they divide ``width``.
        ffn: width of the feed-forward part and of the head's hidden layer.
        buckets: bins of the predicted densities.
        seq_len: the last epoch of the curves it is trained on; epochs are scaled by it.
        dropout: rate in training.
    """

    width: int = 512
    layers: int = 12
    heads: int = 4
    ffn: int = 1024
    buckets: int = 1000
    seq_len: int = 100
    dropout: float = 0.2

    def __post_init__(self):
        for name in ("width", "layers", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"LC-PFN needs {name} of at least 1, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide a width of {self.width}: change one."
            )
        if self.buckets < 2 or self.seq_len < 2:
            raise ValueError(
                f"LC-PFN needs at least 2 buckets and 2 epochs, got {self.buckets}, {self.seq_len}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give 0 up to below 1.")


@struct.dataclass
class Params:
    """Embeddings of epoch and value, the stacked layers, and the two maps of the head.

    A layer's two norms stand after its parts: ``attn_norm`` after the attention's sum, ``mlp_norm``
    after the feed-forward's.
    """

    x_embed: Linear
    y_embed: Linear
    layers: Layer  # every leaf with a leading axis of layers
    hidden: Linear
    out: Linear


@dataclasses.dataclass(frozen=True)
class Copies:
    """One draw of ``one`` for all entries of the leading axis."""

    one: Initializer

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Initial values."""
        return jnp.broadcast_to(self.one(key, shape[1:], dtype)[None], shape)


def specs(cfg: Config) -> Params:
    """The abstract parameters.

    Layers begin as copies of one another whose two outputs are zero, so that at first a layer does
    no more than normalise. The rest has the initial values of PyTorch's linear layers and packed
    attention.
    """
    width, inner = cfg.width, cfg.ffn
    bound = math.sqrt(6 / (4 * width))  # Glorot's for the matrix of q, k and v together
    packed = Uniform(-bound, bound)
    zero = Constant(0.0)

    def norm() -> Norm:
        return Norm(ParamSpec((width,), (None,), Constant(1.0)), ParamSpec((width,), (None,), zero))

    def projection() -> Linear:
        w = ParamSpec((width, width), ("embed", "heads"), packed)
        return Linear(w, ParamSpec((width,), ("heads",), zero))

    layer = Layer(
        attn_norm=norm(),
        attn=Attention(
            q=projection(),
            k=projection(),
            v=projection(),
            o=_dense((width, width), ("heads", "embed"), zero),
        ),
        mlp_norm=norm(),
        mlp=MLP(
            up=_dense((width, inner), ("embed", "mlp")),
            down=_dense((inner, width), ("mlp", "embed"), zero),
        ),
    )
    return Params(
        x_embed=_dense((1, width), (None, "embed")),
        y_embed=_dense((1, width), (None, "embed")),
        layers=jax.tree.map(
            lambda s: dataclasses.replace(s.stacked(cfg.layers), init=Copies(s.init)), layer
        ),
        hidden=_dense((width, inner), ("embed", "mlp")),
        out=_dense((inner, cfg.buckets), ("mlp", None)),
    )


def forward(
    params: Params,
    cfg: Config,
    x: Float[Array, "b t"],
    y: Float[Array, "b t"],
    num_context: Int[Array, " b"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b t buckets"]:
    """Logits of the binned law of the value at every token, float32.

    Args:
        x: epochs, from 1 on, of any order and real.
        y: values; only those of context tokens are read.
        num_context: how many of a row's first tokens are context. Data, not shape: all numbers
            share one compiled program. Logits of context tokens are made too and mean nothing.
        key: for dropout in training; None: none.

    A context value or an epoch that is NaN counts as the middle of its range, as in the released
    code.
    """
    is_context = jnp.arange(x.shape[1])[None] < num_context[:, None]
    dtype = params.out.w.dtype
    h = linear(_scaled(x / (cfg.seq_len + 1))[..., None].astype(dtype), params.x_embed)
    # Values of queries are never touched: selected before anything is computed from them.
    values = _scaled(jnp.where(is_context, y, 0.0))
    embedded = linear(values[..., None].astype(dtype), params.y_embed)
    h = h + jnp.where(is_context[..., None], embedded, 0.0)
    visible = is_context[:, None, :] | jnp.eye(x.shape[1], dtype=bool)[None]
    keys = None if key is None or cfg.dropout == 0 else jax.random.split(key, cfg.layers)

    def step(h: Array, inputs: tuple[Layer, Any]) -> tuple[Array, None]:
        layer, layer_key = inputs
        return _layer(layer, cfg, h, visible, layer_key), None

    h, _ = jax.lax.scan(step, h, (params.layers, keys))
    hidden = ACTIVATIONS["gelu"](linear(h, params.hidden))
    return linear(hidden, params.out).astype(jnp.float32)


def _layer(
    layer: Layer,
    cfg: Config,
    h: Float[Array, "b t width"],
    visible: Bool[Array, "b t t"],
    key: Key[Array, ""] | None,
) -> Float[Array, "b t width"]:
    """One post-norm block. Dropout is where PyTorch's encoder layer has it, in four places."""
    keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
    drops = tuple(functools.partial(_drop, rate=cfg.dropout, key=one) for one in keys[1:])
    mixed = _attend(layer.attn, cfg, h, visible, keys[0])
    return finish_post_norm(layer, h, mixed, NORM_EPS, drops)


def _attend(
    attn: Attention,
    cfg: Config,
    h: Float[Array, "b t width"],
    visible: Bool[Array, "b t t"],
    key: Key[Array, ""] | None,
) -> Float[Array, "b t width"]:
    b, t, width = h.shape
    q, k, v = (linear(h, p).reshape(b, t, cfg.heads, -1) for p in (attn.q, attn.k, attn.v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32)
    scores = scores * (width // cfg.heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
    weights = _drop(weights.astype(v.dtype), cfg.dropout, key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, width)


def _drop(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0.0).astype(x.dtype)


def _scaled(x: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """To mean 0 and standard deviation 1 of the uniform law; NaN to 0."""
    scaled = (x - 0.5) / UNIFORM_STD
    return jnp.where(jnp.isnan(scaled), 0.0, scaled)


def _dense(
    shape: tuple[int, int], axes: tuple[str | None, str | None], init: Initializer | None = None
) -> Linear:
    """A matrix and a bias; without ``init`` PyTorch's initial values, uniform within 1/sqrt(in)."""
    bound = shape[0] ** -0.5
    init = Uniform(-bound, bound) if init is None else init
    return Linear(ParamSpec(shape, axes, init), ParamSpec(shape[1:], axes[1:], init))
