"""SeqPE: a small transformer from the digits of a position to the vector that stands for it.

A position of n axes is written in decimal, m digits for each axis, and read as a sequence; the
output at a last token of its own is the position's vector u. One such encoder serves all layers of
a model, which takes u in by one of four ways (:class:`Injection`). Source: SeqPE, arXiv 2506.13277.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from models import decoder
from models.layers import Layer, Linear, Norm, finish, layer_specs, linear, normalize, project
from models.params import Constant, Normal, ParamSpec
from ops.attention import AttentionMask, attention
from ops.weights import Weight, take

BASE = 10
MAX_DIGITS = 8
"""More digits and their edits would not fit 32 bits."""

CHUNK = 1024
"""Positions of a table that are encoded at a time."""

METHODS = ("attn_scalar", "attn_mul", "attn_add", "input_add")
PROJECTIONS = ("single", "multi", "none")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the encoder; hashable.

    Attributes:
        width: E, of the encoder's stream.
        heads: of its attention; they divide ``width``.
        axis_length: P, positions of each axis that training covers; they fix the number of digits.
        axes: n, 1 for text and 2 for images.
        layers: number of layers.
        causal: a token sees those before it; else all.
        mask_padding: zeros that pad a number are not seen. By default they are digits like others.
        out_width: width of u (None: that of the encoder).
        temperature: divides u.
        dropout: rate in training, on what attention and MLP add.

    Raises:
        ValueError: a value out of range.
    """

    width: int
    heads: int
    axis_length: int
    axes: int = 1
    layers: int = 2
    causal: bool = True
    mask_padding: bool = False
    out_width: int | None = None
    temperature: float = 1.0
    dropout: float = 0.1

    def __post_init__(self):
        if self.axes < 1 or self.layers < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"SeqPE needs axes and layers of at least 1 and heads that divide the width, got "
                f"{self.axes}, {self.layers}, {self.heads} and width {self.width}."
            )
        if not 2 <= self.axis_length <= BASE**MAX_DIGITS:
            raise ValueError(
                f"axis_length is {self.axis_length}: give 2 up to {BASE**MAX_DIGITS} positions."
            )
        if not 0 <= self.dropout < 1 or not self.temperature > 0:
            raise ValueError(
                f"dropout is {self.dropout} and temperature {self.temperature}: give a rate from 0 "
                "up to below 1 and a positive temperature."
            )

    @property
    def max_digits(self) -> int:
        """m, digits for each axis."""
        return len(str(self.axis_length - 1))

    @property
    def limit(self) -> int:
        """Positions of an axis from here on have no digits."""
        return BASE**self.max_digits

    @property
    def out(self) -> int:
        """Width of u."""
        return self.width if self.out_width is None else self.out_width

    @property
    def block(self) -> decoder.Config:
        """The encoder's layers as those of a decoder of GPT-2's kind."""
        return decoder.Config(
            vocab_size=BASE,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.width // self.heads,
            intermediate_size=4 * self.width,
            max_length=self.axes * self.max_digits + 1,
            activation="gelu_tanh",
            gated_mlp=False,
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            position="none",
            causal=self.causal,
        )


@struct.dataclass
class Params:
    """Embeddings of digits, their places and axes, the last token's, the layers, the output."""

    token_embed: Weight  # (10, width)
    place_embed: Weight  # (axes * digits, width)
    last: Weight  # (width,)
    layers: Layer  # every leaf with a leading axis of layers
    final_norm: Norm
    out: Linear
    axis_embed: Weight = None  # (axes, width), for more than one axis


def specs(cfg: Config) -> Params:
    """The abstract parameters: N(0, 0.02), biases zero, norms one."""
    normal, zero = Normal(0.02), Constant(0.0)
    layer = jax.tree.map(
        # The decoder's own output projections start smaller, these do not.
        lambda s: dataclasses.replace(s, init=normal) if isinstance(s.init, Normal) else s,
        layer_specs(cfg.block),
    )
    width = cfg.width

    def table(rows: int) -> ParamSpec:
        return ParamSpec((rows, width), (None, "embed"), normal)

    return Params(
        token_embed=table(BASE),
        place_embed=table(cfg.axes * cfg.max_digits),
        last=ParamSpec((width,), ("embed",), normal),
        layers=jax.tree.map(lambda s: s.stacked(cfg.layers), layer),
        final_norm=Norm(
            ParamSpec((width,), (None,), Constant(1.0)), ParamSpec((width,), (None,), zero)
        ),
        out=Linear(
            ParamSpec((width, cfg.out), ("embed", None), normal),
            ParamSpec((cfg.out,), (None,), zero),
        ),
        axis_embed=table(cfg.axes) if cfg.axes > 1 else None,
    )


def position_digits(
    positions: Int[Array | np.ndarray, "*rows axes"], max_digits: int
) -> tuple[Int[Array, "*rows places"], Bool[Array, "*rows places"]]:
    """Decimal digits, most significant first, axis after axis; and which of them are no padding.

    Zeros before a number pad it; the number 0 has one digit.

    Raises:
        ValueError: a position that is negative or has more digits (inside a compiled program no
            position can be looked at: :func:`extend_table` and the policy check sizes there).
    """
    if not isinstance(positions, Tracer):
        given = np.asarray(positions)
        if given.size and not 0 <= given.min() <= given.max() < BASE**max_digits:
            raise ValueError(
                f"positions from {given.min()} to {given.max()} do not fit {max_digits} digits: "
                f"give 0 up to {BASE**max_digits - 1}, or train an encoder with a larger "
                "axis_length."
            )
    positions = jnp.asarray(positions)
    places = jnp.asarray([BASE**i for i in reversed(range(max_digits))], jnp.int32)
    places = places.reshape((1,) * positions.ndim + (-1,))
    digits = (positions[..., None] // places) % BASE
    real = (positions[..., None] >= places) | (places == 1)
    shape = (*positions.shape[:-1], -1)
    return digits.reshape(shape).astype(jnp.int32), real.reshape(shape)


def encode(
    params: Params,
    cfg: Config,
    positions: Int[Array | np.ndarray, "*rows axes"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*rows out"]:
    """The vector u of every position.

    Args:
        key: for dropout in training; None: none.

    Raises:
        ValueError: see :func:`position_digits`, or another number of axes.
    """
    if positions.shape[-1] != cfg.axes:
        raise ValueError(f"positions have {positions.shape[-1]} axes, the encoder {cfg.axes}.")
    digits, real = position_digits(positions, cfg.max_digits)
    lead, places = digits.shape[:-1], digits.shape[-1]
    digits, real = digits.reshape(-1, places), real.reshape(-1, places)
    x = take(params.token_embed, digits) + params.place_embed[None]
    if params.axis_embed is not None:
        x = x + jnp.repeat(params.axis_embed, cfg.max_digits, axis=0)[None]
    last = jnp.broadcast_to(params.last[None, None], (x.shape[0], 1, cfg.width))
    x = jnp.concatenate([x, last], axis=1)
    seen = visible_tokens(cfg, real)
    keys = [None] * cfg.layers if key is None else list(jax.random.split(key, cfg.layers))
    for i, layer_key in enumerate(keys):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params.layers)
        x = _layer(layer, cfg, x, seen, layer_key, only_last=i == cfg.layers - 1)
    out = linear(normalize(x[:, -1], params.final_norm, cfg.block.norm_eps), params.out)
    return (out / cfg.temperature).reshape(*lead, cfg.out)


def visible_tokens(
    cfg: Config, real: Bool[Array, "rows digits"]
) -> Bool[Array, "rows tokens"] | None:
    """Which tokens may be seen: all (None), or the ``real`` digits and the last token."""
    return jnp.pad(real, ((0, 0), (0, 1)), constant_values=True) if cfg.mask_padding else None


def token_mask(
    cfg: Config, seen: Bool[Array, "rows tokens"] | None, only_last: bool = False
) -> AttentionMask:
    """What the tokens of a position see of each other.

    The last token sees all others, so for it alone nothing is masked but padding.
    """
    return AttentionMask(k_valid=seen, causal=cfg.causal and not only_last)


def _layer(
    layer: Layer,
    cfg: Config,
    x: Float[Array, "rows t width"],
    seen: Bool[Array, "rows t"] | None,
    key: Key[Array, ""] | None,
    only_last: bool,
) -> Float[Array, "rows s width"]:
    """One block; ``only_last`` computes the last token alone, all that is read in the end."""
    q, k, v, _ = project(layer, cfg.block, x, lambda name, value: None)
    if only_last:
        x, q = x[:, -1:], q[:, -1:]
    mask = token_mask(cfg, seen, only_last)
    # Rows are a handful of tokens: the plain path serves them best everywhere.
    mixed = attention(q, k, v, mask=mask, implementation="xla")
    keys = iter([] if key is None else jax.random.split(key, 2))

    def drop(value: Array) -> Array:
        if key is None or cfg.dropout == 0:
            return value
        kept = jax.random.bernoulli(next(keys), 1 - cfg.dropout, value.shape)
        return jnp.where(kept, value / (1 - cfg.dropout), 0.0).astype(value.dtype)

    return finish(layer, cfg.block, x, mixed, lambda name, value: None, drop)


def grid_positions(shape: tuple[int, ...]) -> Int[Array, "positions axes"]:
    """All positions of a grid from the origin, the last axis fastest."""
    axes = jnp.meshgrid(*[jnp.arange(n, dtype=jnp.int32) for n in shape], indexing="ij")
    return jnp.stack([axis.reshape(-1) for axis in axes], -1)


def extend_table(params: Params, cfg: Config, shape: tuple[int, ...]) -> Float[Array, "n out"]:
    """The vectors of all positions of a grid from the origin, which depend on nothing else.

    Raises:
        ValueError: another number of axes, or an axis longer than its digits can tell.
    """
    if len(shape) != cfg.axes or not all(1 <= n <= cfg.limit for n in shape):
        raise ValueError(
            f"a table of {shape} positions: give {cfg.axes} axes of 1 up to {cfg.limit}, which is "
            f"what {cfg.max_digits} digits can tell, or train an encoder with a larger axis_length."
        )
    positions = grid_positions(shape)
    if math.prod(shape) <= CHUNK:
        return encode(params, cfg, positions)
    return jax.lax.map(lambda p: encode(params, cfg, p), positions, batch_size=CHUNK)


@dataclasses.dataclass(frozen=True)
class Injection:
    """How a model takes u in; hashable.

    Attributes:
        method: ``attn_scalar`` adds ``scalar_scale * u_q u_k`` to ``q k`` before the scale of
            attention; ``attn_mul`` multiplies q by u_q and k by u_k; ``attn_add`` adds them;
            ``input_add`` adds u to the embeddings.
        projection: u_q and u_k are made from u by ``single`` matrix for all layers, by one for
            each (``multi``), or are u itself (``none``).
        scalar_scale: sigma.

    Raises:
        ValueError: an unknown name, or a projection that would have nothing to do.
    """

    method: str = "attn_scalar"
    projection: str = "single"
    scalar_scale: float = 1.0

    def __post_init__(self):
        if self.method not in METHODS or self.projection not in PROJECTIONS:
            raise ValueError(
                f"unknown injection {self.method!r}, {self.projection!r}: use one of "
                f"{', '.join(METHODS)} and one of {', '.join(PROJECTIONS)}."
            )
        if self.method == "input_add" and self.projection != "none":
            raise ValueError("input_add adds u as it is: set projection='none'.")

    def key_width(self, head_dim: int) -> int:
        """Width of a key as it is cached: u_k stands beside k under ``attn_scalar``."""
        return 2 * head_dim if self.method == "attn_scalar" else head_dim


def check_injection(injection: Injection, out: int, model: decoder.Config) -> None:
    """Raise ValueError unless vectors of width ``out`` fit the model under this injection."""
    if model.position != "none":
        raise ValueError(
            f"SeqPE is the only position signal and the model has {model.position!r}: set the "
            "model's position to 'none'."
        )
    if model.windows is not None and any(w is not None for w in model.windows):
        raise ValueError("SeqPE is not defined for sliding windows: set the model's to None.")
    if injection.method == "input_add" and out != model.hidden_size:
        raise ValueError(f"u is {out} wide and is added to embeddings of {model.hidden_size}.")
    heads = model.num_heads * model.head_dim
    plain = injection.method != "input_add" and injection.projection == "none"
    if plain and (model.num_heads != model.num_kv_heads or out not in (heads, model.head_dim)):
        raise ValueError(
            f"without a projection u must be as wide as all heads ({heads}) or as one "
            f"({model.head_dim}), with as many key heads as query heads; it is {out} wide."
        )


def projection_specs(injection: Injection, out: int, model: decoder.Config) -> Linear | None:
    """The matrices from u to u_q and u_k of all heads, stacked over layers if they differ."""
    check_injection(injection, out, model)
    if injection.projection == "none":
        return None
    count = model.num_layers if injection.projection == "multi" else 1
    wide = (model.num_heads + model.num_kv_heads) * model.head_dim
    return Linear(
        ParamSpec((count, out, wide), ("layers", "embed", "heads"), Normal(0.02)),
        ParamSpec((count, wide), ("layers", "heads"), Constant(0.0)),
    )


def head_vectors(
    vectors: Float[Array, "b t out"], projection: Linear | None, h: int, g: int, d: int
) -> tuple[Float[Array, "b t {h} {d}"], Float[Array, "b t {g} {d}"]]:
    """u_q for h heads and u_k for g, d wide each; a u as wide as one head is the same for all."""
    b, t, out = vectors.shape
    if projection is None:
        whole = vectors.reshape(b, t, out // d, d)
        shared = jnp.broadcast_to(whole, (b, t, h, d))
        return shared, shared
    u = linear(vectors, projection)
    return u[..., : h * d].reshape(b, t, h, d), u[..., h * d :].reshape(b, t, g, d)


def apply_to_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    u_q: Float[Array, "#b t h d"],
    u_k: Float[Array, "#b s g d"],
    injection: Injection,
) -> tuple[Float[Array, "b t h wide"], Float[Array, "b s g wide"]]:
    """Queries and keys that know where they stand; attention keeps the scale of the given width.

    Under ``attn_scalar`` they come out twice as wide: a product of ``[q, sigma u_q]`` and
    ``[k, u_k]`` is the sum of both products, so any kernel and any cache serves it.
    """
    return apply_to_queries(q, u_q, injection), apply_to_keys(k, u_k, injection)


def apply_to_queries(
    q: Float[Array, "b t h d"], u_q: Float[Array, "#b t h d"], injection: Injection
) -> Float[Array, "b t h wide"]:
    """The queries of :func:`apply_to_attention`."""
    return _apply(q, u_q, injection, injection.scalar_scale)


def apply_to_keys(
    k: Float[Array, "b s g d"], u_k: Float[Array, "#b s g d"], injection: Injection
) -> Float[Array, "b s g wide"]:
    """The keys of :func:`apply_to_attention`."""
    return _apply(k, u_k, injection, 1.0)


def _apply(x: Array, u: Array, injection: Injection, scalar_scale: float) -> Array:
    u = u.astype(x.dtype)
    if injection.method == "attn_mul":
        return x * u
    if injection.method == "attn_add":
        return x + u
    if injection.method == "input_add":
        return x
    return jnp.concatenate([x, jnp.broadcast_to(scalar_scale * u, x.shape)], -1)
