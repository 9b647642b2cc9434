"""What an attention policy is, and the dense one (full causal or sliding window).

A policy decides how a layer's queries meet keys: which rotation, which keys, which cache. The
decoder hands it unrotated q, k, v and takes back the mixed values; it never looks at a cache.
Policies are pytrees whose numbers are data, so changing a window or a budget does not recompile.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models.alibi import CHANNELS, Alibi
from models.mesh_attention import mesh_attention
from models.positions import RopeScaling, apply_rope, rope_angles, rope_frequencies
from ops.attention import AttentionMask, BlockSizes


@struct.dataclass
class Step:
    """What one forward pass processes, and where its tokens stand in the cache.

    Without a cache only ``positions`` and ``segments`` matter. With one, the new tokens take slots
    ``start .. start + t - 1`` of each row; everything before ``start`` is visible by position, and
    the new tokens see each other causally or, if ``tree`` is given, as it says.
    """

    positions: Any  # (b, t) positions of the new tokens, integer or real
    segments: Any = None  # (b, t) int32 document numbers: tokens attend within their own
    start: Any = None  # (b,) cache slot of the first new token
    slot_positions: Any = None  # (b, s) position of every cache slot, the new tokens included
    lengths: Any = None  # (b,) text length that length-dependent rotations are for
    prompt_lengths: Any = None  # (b,) whole prompt, while a piece of it is prefilled
    counts: Any = None  # (b,) how many of the new tokens are text, the rest being padding
    tree: Any = None  # (b, t, n) bool: which slots from tree_start on each query sees
    tree_start: Any = None  # (b,) first scratch slot
    extent: int | None = struct.field(pytree_node=False, default=None)  # slots that are read
    mode: str = struct.field(pytree_node=False, default="train")  # train, prefill or decode
    causal: bool = struct.field(pytree_node=False, default=True)


@runtime_checkable
class LayerCache(Protocol):
    """What a policy asks of one layer's cache."""

    def append(self, k: Array, v: Array, start: Array) -> "LayerCache":
        """Write new keys and values (b, t, g, d) at each row's slot ``start``."""
        ...

    def read(self, extent: int | None) -> tuple[Array, Array]:
        """Keys and values (b, s, g, d) of the first ``extent`` slots (None: all)."""
        ...

    def entries(self, start: Array, t: int) -> tuple[Array, Array]:
        """Keys and values (b, t, g, d) of ``t`` slots from each row's ``start``, as they lie."""
        ...


@struct.dataclass
class Attended:
    """One layer's attention: mixed values, and what the policy wants to keep or report."""

    out: Any  # (b, t, h, dv)
    cache: Any = None
    lse: Any = None  # (b, t, h) float32, on request
    aux: Any = None


@runtime_checkable
class AttentionPolicy(Protocol):
    """How queries meet keys; see the module docstring.

    A policy whose positions end somewhere says so by a ``max_length``; None or none: they do not.
    """

    def per_layer(self, num_layers: int) -> Any:
        """A pytree with a leading layer axis, sliced for ``attend``; None if layers are alike."""
        ...

    def key_width(self, cfg: Any) -> int:
        """Width of a key as it is cached; values are ``cfg.head_dim`` wide."""
        ...

    def prepare(self, cfg: Any, step: Step) -> Any:
        """What all layers share in one forward pass: rotations, tables, masks."""
        ...

    def attend(
        self,
        layer: Any,
        shared: Any,
        q: Array,
        k: Array,
        v: Array,
        x: Array,
        step: Step,
        cache: Any,
    ) -> Attended:
        """Mix: ``layer`` is this layer's slice of :meth:`per_layer`, ``x`` its normed input."""
        ...


@runtime_checkable
class LendingPolicy(Protocol):
    """A policy whose cached keys another network's queries may meet, as LongSpec's layer does."""

    def cached_keys(self, layer: Any, shared: Any, k: Array) -> Float[Array, "b t g wide"]:
        """New keys (b, t, g, d) as :meth:`AttentionPolicy.attend` writes them to the cache."""
        ...

    def cross_attend(
        self,
        layer: Any,
        shared: Any,
        q: Array,
        k: Array,
        v: Array,
        step: Step,
        mask: AttentionMask,
    ) -> Float[Array, "b t h dv"]:
        """Queries of the step's tokens, projected only, over keys as they are cached.

        Args:
            mask: what they see, without a tree; a policy's own window is not part of it.
        """
        ...


@runtime_checkable
class EmbeddingPolicy(Protocol):
    """A policy that also says how tokens become layer inputs, for positions that are added there.

    What it returns takes the place of :func:`models.decoder.embed`.
    """

    def embed(
        self, params: Any, cfg: Any, tokens: Array, shared: Any, step: Step
    ) -> Float[Array, "b t width"]:
        """Inputs of the first layer; ``shared`` is what :meth:`AttentionPolicy.prepare` gave."""
        ...


@struct.dataclass
class Rope:
    """Rotations of one forward pass: q and k may differ in position, scale and moment.

    With ``rotate_cached_keys`` keys are stored raw and ``k_angles`` cover the whole cache, for
    schemes whose frequencies change while the text grows (dynamic NTK, CLEX).
    """

    q_angles: tuple[Any, Any]  # cos, sin: (b, t, dim)
    k_angles: tuple[Any, Any]
    q_scale: Any = None  # broadcasts against (b, t, h, d)
    k_scale: Any = None
    rotate_cached_keys: bool = struct.field(pytree_node=False, default=False)

    def rotate_q(self, q: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        """Rotated (and scaled) queries."""
        return _scaled(apply_rope(q, *self.q_angles), self.q_scale)

    def rotate_k(self, k: Float[Array, "b s g d"]) -> Float[Array, "b s g d"]:
        """Rotated (and scaled) keys."""
        return _scaled(apply_rope(k, *self.k_angles), self.k_scale)


def _scaled(x: Array, scale: Any) -> Array:
    return x if scale is None else x * scale.astype(x.dtype)


def make_rope(
    scaling: RopeScaling, rotary_dim: int, base: float, step: Step, has_cache: bool
) -> Rope:
    """The rotation of one pass for a registered scheme.

    Schemes that depend on the current length keep keys raw in the cache and rotate all of them
    with the frequencies of ``step.lengths``, so that old and new keys agree.
    """
    by_length = scaling.rope_type in ("dynamic", "longrope")
    lengths = None
    if by_length:
        lengths = jnp.max(step.positions, 1) + 1 if step.lengths is None else step.lengths
    inv_freq, factor = rope_frequencies(scaling, rotary_dim, base, lengths)
    angles = rope_angles(step.positions, inv_freq, factor)
    if not (by_length and has_cache):
        return Rope(q_angles=angles, k_angles=angles)
    slots = step.slot_positions[:, : step.extent]
    return Rope(angles, rope_angles(slots, inv_freq, factor), rotate_cached_keys=True)


@runtime_checkable
class PositionScheme(Protocol):
    """A way to rotate that is no setting of the model: a pytree whose numbers are data.

    :class:`DensePolicy` asks it in place of the config's own rotation, so frequencies may be
    learned, and another scale is no other program. One that ends somewhere has a ``max_length``.
    """

    def rope(self, cfg: Any, step: Step, has_cache: bool) -> Rope:
        """The rotations of one forward pass."""
        ...


def check_default_rope(cfg: Any) -> None:
    """Raise ValueError unless the model rotates, and by the default frequencies."""
    if cfg.position != "rope" or cfg.rope.rope_type != "default":
        raise ValueError(
            f"a position scheme replaces default rotary positions, and the model has "
            f"{cfg.position!r}, rope type {cfg.rope.rope_type!r}: use one scheme or the other."
        )


@struct.dataclass
class Frequencies:
    """The scheme of given frequencies, one for every pair of channels, as data.

    ``positions`` take the place of the step's: those drawn at random in training, real or not.
    """

    inv_freq: Any  # (rotary_dim / 2,) radians per position
    factor: Any = 1.0  # on cos and sin
    positions: Any = None  # (b, t)

    def rope(self, cfg: Any, step: Step, has_cache: bool) -> Rope:
        """See :class:`PositionScheme`.

        Raises:
            ValueError: another number of frequencies than the model has pairs of channels.
        """
        if self.inv_freq.shape != (cfg.rotary_dim // 2,):
            raise ValueError(
                f"{self.inv_freq.shape} frequencies for heads that rotate {cfg.rotary_dim} "
                f"channels: give {cfg.rotary_dim // 2}."
            )
        positions = step.positions if self.positions is None else self.positions
        angles = rope_angles(positions, self.inv_freq, self.factor)
        return Rope(q_angles=angles, k_angles=angles)


@struct.dataclass
class DensePolicy:
    """Full attention, causal or not, within an optional sliding window per layer.

    ``scheme`` rotates in place of ``cfg.rope``. A window w lets query i see keys j with
    ``0 <= i - j < w``. ``windows`` holds one per layer; layers without a window carry a number
    beyond any position. ``implementation`` and ``blocks`` are those of
    :func:`ops.attention.attention`; under a mesh see :mod:`models.mesh_attention`.
    """

    windows: Any = None  # (layers,) int32
    scheme: Any = None  # a PositionScheme
    implementation: str = struct.field(pytree_node=False, default="auto")
    blocks: BlockSizes | None = struct.field(pytree_node=False, default=None)

    @property
    def max_length(self) -> int | None:
        """The longest text that the scheme has positions for, if it ends somewhere."""
        return getattr(self.scheme, "max_length", None)

    def per_layer(self, num_layers: int) -> Int[Array, " layers"] | None:
        """The windows.

        Raises:
            ValueError: the number of windows is not the number of layers.
        """
        if self.windows is not None and self.windows.shape != (num_layers,):
            raise ValueError(
                f"the policy has {self.windows.shape} windows for {num_layers} layers: "
                "give one per layer."
            )
        return self.windows

    def key_width(self, cfg: Any) -> int:
        """Keys are as wide as a head, and a little wider under ALiBi."""
        return cfg.head_dim + (CHANNELS if cfg.position == "alibi" else 0)

    def prepare(self, cfg: Any, step: Step) -> Rope | Alibi | None:
        """The rotations of ``scheme`` or of the model; None where attention tells no positions."""
        if self.scheme is not None:
            return self.scheme.rope(cfg, step, step.start is not None)
        if cfg.position == "alibi":
            return Alibi(step.positions)
        if cfg.position != "rope":
            return None
        return make_rope(cfg.rope, cfg.rotary_dim, cfg.rope_base, step, step.start is not None)

    def attend(
        self,
        layer: Any,
        shared: Rope | Alibi | None,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        x: Any,
        step: Step,
        cache: Any,
    ) -> Attended:
        """See :class:`AttentionPolicy`."""
        scale = q.shape[-1] ** -0.5  # before channels for positions are added
        k = self.cached_keys(layer, shared, k)
        if cache is not None:
            cache = cache.append(k, v, step.start)
            k, v = cache.read(step.extent)
        q, k = _rotate(shared, q, k)
        return Attended(out=self.mix(layer, q, k, v, step, cache is not None, scale), cache=cache)

    def cached_keys(
        self, layer: Any, shared: Rope | Alibi | None, k: Float[Array, "b t g d"]
    ) -> Float[Array, "b t g wide"]:
        """See :class:`LendingPolicy`."""
        return k if shared is None or shared.rotate_cached_keys else shared.rotate_k(k)

    def cross_attend(
        self,
        layer: Any,
        shared: Rope | Alibi | None,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g wide"],
        v: Float[Array, "b s g dv"],
        step: Step,
        mask: AttentionMask,
    ) -> Float[Array, "b t h dv"]:
        """See :class:`LendingPolicy`."""
        scale = q.shape[-1] ** -0.5
        q, k = _rotate(shared, q, k)
        return mesh_attention(q, k, v, mask=mask, scale=scale, implementation=self.implementation)

    def mix(
        self,
        layer: Any,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g dv"],
        step: Step,
        cached: bool,
        scale: float,
    ) -> Float[Array, "b t h dv"]:
        """Rotated queries over rotated keys: the new ones or, if ``cached``, those of all slots."""
        mask = dense_mask(step, layer, cached)
        return mesh_attention(
            q, k, v, mask=mask, scale=scale, implementation=self.implementation, blocks=self.blocks
        )


def _rotate(shared: Rope | Alibi | None, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries, and keys that lie raw in the cache, as they meet."""
    if shared is None:
        return q, k
    return shared.rotate_q(q), shared.rotate_k(k) if shared.rotate_cached_keys else k


def dense_mask(step: Step, window: Any, cached: bool) -> AttentionMask:
    """What the queries of this step may see, with or without a cache."""
    if not cached:
        # Order is that of the sequence, whatever positions the rotation is given; leaving them out
        # of the mask lets the causal half be skipped when the program is built.
        return AttentionMask(
            window=window,
            q_segments=step.segments,
            k_segments=step.segments,
            causal=step.causal,
        )
    tree = step.tree
    if tree is not None and window is not None:
        # Scratch slots are ruled by the tree alone, so the window is folded into it.
        nodes = step.tree_start[:, None] + jnp.arange(tree.shape[2])[None]
        depths = jnp.take_along_axis(step.slot_positions, nodes, axis=1)
        tree = tree & (step.positions[:, :, None] - depths[:, None, :] < window)
    return AttentionMask(
        q_positions=step.positions,
        k_positions=step.slot_positions[:, : step.extent],
        window=window,
        lengths=step.start + step.positions.shape[1],
        tree=tree,
        tree_start=None if tree is None else step.tree_start,
        causal=step.causal,
    )
