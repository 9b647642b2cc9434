"""LongSpec's one-layer drafter: own attention over a short window, then the target's last keys.

A token's embedding goes through windowed self-attention, cross-attention to the keys and values
that the target's LAST layer holds of its committed tokens, and an MLP; the target's head reads the
result, without a norm in between. Of its own the drafter keeps a window of keys and values, however
long the text is. Embedding and head stay with the target, frozen.

Source: LongSpec, arXiv 2502.17421.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models import decoder
from models.attention import AttentionPolicy, EmbeddingPolicy, LendingPolicy, Rope, Step, make_rope
from models.layers import (
    Layer,
    Linear,
    add_attention,
    add_mlp,
    layer_specs,
    linear,
    linear_specs,
    no_tap,
    norm_specs,
    normalize,
    project,
)
from models.params import Normal, ParamSpec
from models.sharding import mesh_in_force
from ops.attention import AttentionMask, attention, hybrid_tree_attention
from ops.weights import open_block

OFFSET_LENGTH = 1200
"""Rows longer than this are trained at their own positions."""


@dataclasses.dataclass(frozen=True)
class LongSpecConfig:
    """Shape of the layer, and how it is trained.

    Attributes:
        window: tokens before its own that self-attention sees.
        cross: cross-attend the target's keys; False is an ablation.
        max_shift: a training pass hides the newest 1 to ``max_shift`` of the target's entries, as
            later steps of a draft lack them. 1 is an ablation: no noise.
        max_sink: the first 0 to ``max_sink`` tokens keep their positions while the others move.
        reach: training positions stay below it, which the paper sets to 30,000 or, if that is
            less, the target's context less 1,000; 0: positions do not move.

    Raises:
        ValueError: a window or shift below 1, or a negative sink or reach.
    """

    window: int = 512
    cross: bool = True
    max_shift: int = 4
    max_sink: int = 4
    reach: int = 30000

    def __post_init__(self):
        if self.window < 1 or self.max_shift < 1 or self.max_sink < 0 or self.reach < 0:
            raise ValueError(
                f"LongSpec needs a window and max_shift of 1 or more, and max_sink and reach of 0 "
                f"or more, got {self.window}, {self.max_shift}, {self.max_sink} and {self.reach}."
            )


@struct.dataclass
class Cross:
    """Attention that brings queries only: keys and values are the target's."""

    norm: Any  # Norm
    q: Linear
    o: Linear


@struct.dataclass
class Params:
    """Self-attention and MLP as in a decoder's layer, and what stands between them."""

    layer: Layer
    cross: Any = None  # Cross; None without cross-attention


@struct.dataclass
class Place:
    """Where tokens stand: for the layer's own attention, and for the target's policy.

    ``layer`` and ``shared`` are what the policy takes for the target's last layer.
    """

    step: Step
    own: Rope
    policy: Any  # a LendingPolicy
    layer: Any
    shared: Any


@struct.dataclass
class Entries:
    """Keys and values (b, s, g, d) as they are kept, and what of them the queries see."""

    k: Any
    v: Any
    mask: AttentionMask


def layer_config(target: decoder.Config) -> decoder.Config:
    """The layer as a decoder of one: the target's heads and MLP, biases on q, k and v alone."""
    return dataclasses.replace(
        target,
        num_layers=1,
        windows=None,
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


def specs(cfg: LongSpecConfig, target: decoder.Config) -> Params:
    """The abstract parameters of the drafter for a target."""
    width, heads, std = target.hidden_size, target.num_heads * target.head_dim, target.init_stddev

    def alike(spec: ParamSpec) -> ParamSpec:
        return dataclasses.replace(spec, init=Normal(std)) if len(spec.shape) == 2 else spec

    cross = Cross(
        norm_specs(target, width),
        linear_specs((width, heads), ("embed", "heads"), True, std),
        linear_specs((heads, width), ("heads", "embed"), False, std),
    )
    layer = jax.tree.map(alike, layer_specs(layer_config(target)))
    return Params(layer, cross if cfg.cross else None)


def place(policy: AttentionPolicy, target: decoder.Config, step: Step) -> Place:
    """The places of a step's tokens under the target's policy.

    Raises:
        ValueError: a policy whose cached keys others cannot read.
    """
    if not isinstance(policy, LendingPolicy):
        raise ValueError(
            f"LongSpec reads the target's keys, and {type(policy).__name__} does not say how: give "
            "it the methods of models.attention.LendingPolicy, or use another policy."
        )
    layer = jax.tree.map(lambda leaf: leaf[-1], policy.per_layer(target.num_layers))
    shared = policy.prepare(target, step)
    return Place(step, own_rope(policy, target, step.positions), policy, layer, shared)


def own_rope(policy: AttentionPolicy, target: decoder.Config, positions: Int[Array, "b t"]) -> Rope:
    """The rotation of the layer's own queries and keys: the target's, if its angles are fixed.

    Where frequencies follow the length of the text, or where positions go by chunks or by no angles
    at all, it is that of short texts: own keys are never further away than the window.
    """
    start = jnp.zeros(positions.shape[0], jnp.int32)
    cached = Step(positions, start=start, slot_positions=positions, mode="decode")
    rope = policy.prepare(target, cached)
    if isinstance(rope, Rope) and not rope.rotate_cached_keys:
        return rope
    short = Step(positions, lengths=jnp.ones_like(start))
    return make_rope(target.rope, target.rotary_dim, target.rope_base, short, has_cache=False)


def embed(
    params: decoder.Params, target: decoder.Config, tokens: Int[Array, "b t"], where: Place
) -> Float[Array, "b t width"]:
    """What goes into the layer: the target's own inputs of the tokens."""
    if isinstance(where.policy, EmbeddingPolicy):
        return where.policy.embed(params, target, tokens, where.shared, where.step)
    return decoder.embed(params, target, tokens, where.step.positions)


def last_layer_entries(
    params: decoder.Params, target: decoder.Config, x: Float[Array, "b t width"], where: Place
) -> tuple[Float[Array, "b t g wide"], Float[Array, "b t g d"]]:
    """The target's last keys (as cached) and values, from the stream before its last layer."""
    last = params.segments[-1]
    layer = open_block(last.layers)
    if last.stacked:
        layer = jax.tree.map(lambda leaf: leaf[-1], layer)
    _, k, v, _ = project(layer, target, x, no_tap)
    return where.policy.cached_keys(where.layer, where.shared, k), v


def project_own(
    params: Params, target: decoder.Config, embeds: Float[Array, "b t width"], rope: Rope
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t g d"], Float[Array, "b t g d"]]:
    """Rotated queries and keys, and values, of self-attention: of token and position alone."""
    q, k, v, _ = project(params.layer, layer_config(target), embeds, no_tap)
    return rope.rotate_q(q), rope.rotate_k(k), v


def attend_own(
    q: Float[Array, "b t h d"],
    window: Entries,
    nodes: tuple[Array, Array] | None = None,
    tree: Bool[Array, "b t n"] | None = None,
) -> Float[Array, "b t h d"]:
    """Self-attention over the window, and over the drafted nodes that ``tree`` shows."""
    # A window is short: under a mesh XLA divides it where it would refuse to divide a kernel.
    implementation = "auto" if mesh_in_force() is None else "xla"
    k, v, mask = window.k, window.v, window.mask
    # Queries take the type of what is kept, so that nothing kept is copied.
    query = q.astype(k.dtype)
    if nodes is None or tree is None:
        out = attention(query, k, v, mask=mask, implementation=implementation)
    else:
        k_tree, v_tree = nodes[0].astype(k.dtype), nodes[1].astype(v.dtype)
        out = hybrid_tree_attention(
            query, k, v, mask, k_tree, v_tree, tree, implementation=implementation
        )
    return out.astype(q.dtype)


def complete(
    params: Params,
    target: decoder.Config,
    embeds: Float[Array, "b t width"],
    mixed: Float[Array, "b t h d"],
    where: Place,
    committed: Entries,
) -> Float[Array, "b t width"]:
    """What the target's head reads, from the embeddings and what self-attention mixed.

    Args:
        committed: the target's last-layer entries. A query that sees none passes unchanged.
    """
    cfg = layer_config(target)
    x = add_attention(params.layer, embeds, mixed)
    if params.cross is not None:
        normed = normalize(x, params.cross.norm, cfg.norm_eps)
        q = linear(normed, params.cross.q).reshape(mixed.shape).astype(committed.k.dtype)
        seen = where.policy.cross_attend(
            where.layer, where.shared, q, committed.k, committed.v, where.step, committed.mask
        )
        x = x + linear(seen.astype(x.dtype).reshape(*x.shape[:2], -1), params.cross.o)
    return add_mlp(params.layer, cfg, x)


def forward(
    params: Params,
    cfg: LongSpecConfig,
    target: decoder.Config,
    embeds: Float[Array, "b t width"],
    where: Place,
    entries: tuple[Float[Array, "b t g wide"], Float[Array, "b t g d"]],
    shift: Int[Array, ""] | int,
) -> Float[Array, "b t width"]:
    """A whole sequence at once, for training: what the head reads at every token.

    Args:
        embeds: of the tokens, see :func:`embed`.
        where: their places; window and shift count tokens, not positions.
        entries: the target's last keys (as cached) and values of the same tokens.
        shift: the query at t sees entries 0 .. t - shift; traced.
    """
    index = jnp.arange(embeds.shape[1], dtype=jnp.int32)[None]
    q, k, v = project_own(params, target, embeds, where.own)
    segments = where.step.segments
    documents = {"q_segments": segments, "k_segments": segments, "causal": True}
    own = AttentionMask(window=jnp.asarray(cfg.window + 1, jnp.int32), **documents)
    mixed = attention(q, k, v, mask=own)
    late = AttentionMask(q_positions=index - shift, k_positions=index, **documents)
    return complete(params, target, embeds, mixed, where, Entries(*entries, late))


def anchor_offset_positions(
    positions: Int[Array, "b t"], sink: Int[Array, " b"], offset: Int[Array, " b"]
) -> Int[Array, "b t"]:
    """Positions of which those below ``sink`` stay and the others move by ``offset``."""
    return positions + jnp.where(positions >= sink[:, None], offset[:, None], 0)


def draw_anchor_offset(
    key: jax.Array, cfg: LongSpecConfig, rows: int, length: int
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Sink and offset of each row of ``length`` tokens, uniform in what the config allows."""
    of_sink, of_offset = jax.random.split(key)
    most = max(cfg.reach - length, 0) if length <= OFFSET_LENGTH else 0
    sink = jax.random.randint(of_sink, (rows,), 0, cfg.max_sink + 1, jnp.int32)
    return sink, jax.random.randint(of_offset, (rows,), 0, most + 1, jnp.int32)
