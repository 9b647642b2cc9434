"""Dual chunk attention as a policy, with the attention temperature of YaRN.

A model reads texts far longer than it was trained on, without training, because no relative
position exceeds ``chunk_size`` (arXiv 2402.17463). Keys are cached rotated at their position
modulo the stride and never change.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from models.attention import Attended, LayerCache, Step, dense_mask
from models.mesh_attention import mesh_dual_chunk_attention
from models.positions import apply_rope, rope_angles, rope_frequencies
from ops.attention import AttentionMask
from ops.attention.merge import merge
from ops.dual_chunk import check_sizes, chunk_positions, pairwise_attention


def temperature(
    length: Int[Array, "*rows"], original_max_position: Float[Array, ""] | Int[Array, ""]
) -> Float[Array, "*rows"]:
    """m(n) = max(1, 0.1 ln(n / L) + 1) for texts of n tokens and a trained length L.

    Logits are to be multiplied by its square (YaRN, arXiv 2309.00071). L = 0 gives 1 everywhere.
    """
    trained = jnp.asarray(original_max_position, jnp.float32)
    ratio = jnp.maximum(length, 1).astype(jnp.float32) / jnp.maximum(trained, 1.0)
    return jnp.where(trained > 0, jnp.maximum(0.1 * jnp.log(ratio) + 1.0, 1.0), 1.0)


@struct.dataclass
class Rotations:
    """What all layers of one forward pass share: cos and sin (b, t, dim), and scales."""

    queries: Any  # intra, successive, inter
    critical: Any  # successive, inter: not clamped, for the estimate of sparse attention
    keys: Any
    q_scale: Any  # (b, t, 1, 1)
    k_scale: Any

    def rotate_q(self, q: Float[Array, "b t h d"]) -> Float[Array, "3 b t h d"]:
        """The three rotations of each query."""
        return self._rotate_all(q, self.queries)

    def rotate_critical(self, q: Float[Array, "b t h d"]) -> Float[Array, "3 b t h d"]:
        """The rotations that keep true distances across the border of a chunk."""
        return self._rotate_all(q, (self.queries[0], *self.critical))

    def rotate_k(self, k: Float[Array, "b t g d"]) -> Float[Array, "b t g d"]:
        """Keys as they are cached."""
        return _scaled(apply_rope(k, *self.keys), self.k_scale)

    def _rotate_all(self, q: Array, angles: Any) -> Array:
        return jnp.stack([_scaled(apply_rope(q, *each), self.q_scale) for each in angles])


def _scaled(x: Array, scale: Array) -> Array:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


@struct.dataclass
class DualChunkPolicy:
    """Dense dual chunk attention in every mode.

    ``chunk_size`` C (at most the trained length) and ``local_size`` w are static; the stride is
    C - w. The temperature is data: ``original_max_position`` is the trained length L, 0 switches
    it off. Logits are multiplied by m(n)^2, n being the length of the whole prompt while it is
    prefilled and of the text so far afterwards. By default keys are multiplied by the m of their
    time when they are written and queries by theirs, so later logits carry m(now) m(then), as in
    the serving engine of the released models; with ``exact_temperature`` keys stay as they are
    and queries are multiplied by m(now)^2.

    Slot j of a cache must hold position j (no compressed tokens); drafted trees may stand behind.
    Without a cache, mode ``train`` takes any positions, documents and gradients; mode ``prefill``
    takes positions 0, 1, ... and does half the work.
    """

    chunk_size: int = struct.field(pytree_node=False)
    local_size: int = struct.field(pytree_node=False)
    original_max_position: Any = 0
    exact_temperature: Any = False
    implementation: str = struct.field(pytree_node=False, default="auto")

    def __post_init__(self):
        check_sizes(self.chunk_size, self.local_size)
        trained = self.original_max_position
        if isinstance(trained, int | float) and trained < 0:
            raise ValueError(
                f"original_max_position is {trained}: give the trained length, or 0 for no "
                "temperature."
            )

    @property
    def stride(self) -> int:
        """c = C - w: keys are rotated at their position modulo this."""
        return self.chunk_size - self.local_size

    def per_layer(self, num_layers: int) -> None:
        """All layers are alike."""

    def key_width(self, cfg: Any) -> int:
        """Rotated keys are as wide as a head."""
        return cfg.head_dim

    def prepare(self, cfg: Any, step: Step) -> Rotations:
        """The rotations at every token's positions, and the scales of queries and keys.

        Raises:
            ValueError: a model or a step that dual chunk attention is not defined for.
        """
        _check_model(cfg, step)
        inv_freq, factor = rope_frequencies(cfg.rope, cfg.rotary_dim, cfg.rope_base)
        at = chunk_positions(step.positions, self.chunk_size, self.local_size)

        def angles(positions: Array) -> tuple[Array, Array]:
            return rope_angles(positions, inv_freq, factor)

        m = temperature(text_lengths(step), jnp.asarray(self.original_max_position))
        m = m[..., None, None]
        exact = jnp.asarray(self.exact_temperature)
        return Rotations(
            queries=tuple(angles(p) for p in (at.intra, at.successive, at.inter)),
            critical=tuple(angles(p) for p in (at.critical_successive, at.critical_inter)),
            keys=angles(at.key),
            q_scale=jnp.where(exact, jnp.square(m), m),
            k_scale=jnp.where(exact, 1.0, m),
        )

    def attend(
        self,
        layer: Any,
        shared: Rotations,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        x: Any,
        step: Step,
        cache: Any,
    ) -> Attended:
        """See :class:`models.attention.AttentionPolicy`."""
        queries, k = shared.rotate_q(q), shared.rotate_k(k)
        if cache is None and step.mode == "train":
            mask = dense_mask(step, None, cached=False)
            out, lse = pairwise_attention(
                queries, k, v, step.positions, step.positions, mask, stride=self.stride
            )
            return Attended(out=out, lse=lse)
        if cache is not None:
            cache = cache.append(k, v, step.start)
            k, v = cache.read(step.extent)
        out, lse = self.attend_slots(queries, k, v, step)
        if cache is not None and step.tree is not None:
            out, lse = merge(out, lse, *self.attend_draft(queries, cache, step))
        return Attended(out=out, cache=cache, lse=lse)

    def cached_keys(
        self, layer: Any, shared: Rotations, k: Float[Array, "b t g d"]
    ) -> Float[Array, "b t g d"]:
        """See :class:`models.attention.LendingPolicy`."""
        return shared.rotate_k(k)

    def cross_attend(
        self,
        layer: Any,
        shared: Rotations,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g dv"],
        step: Step,
        mask: AttentionMask,
    ) -> Float[Array, "b t h dv"]:
        """See :class:`models.attention.LendingPolicy`."""
        queries = shared.rotate_q(q)
        if step.mode == "train":
            out, _ = pairwise_attention(
                queries, k, v, step.positions, step.positions, mask, stride=self.stride
            )
        else:
            out, _ = self._attend_up_to(queries, k, v, step, mask.lengths)
        return out

    def attend_slots(
        self,
        queries: Float[Array, "3 b t h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g dv"],
        step: Step,
    ) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
        """Rotated queries against slots in order, up to where a draft begins.

        Under a mesh see :mod:`models.mesh_attention`.
        """
        lengths = step.tree_start
        if step.tree is None and step.start is not None:
            lengths = step.start + (step.positions.shape[1] if step.counts is None else step.counts)
        return self._attend_up_to(queries, k, v, step, lengths)

    def _attend_up_to(
        self, queries: Array, k: Array, v: Array, step: Step, lengths: Array | None
    ) -> tuple[Array, Array]:
        return mesh_dual_chunk_attention(
            queries, k, v, step.positions, stride=self.stride, lengths=lengths,
            implementation=self.implementation,
        )  # fmt: skip

    def attend_draft(
        self, queries: Float[Array, "3 b t h d"], cache: LayerCache, step: Step
    ) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
        """Rotated queries against drafted nodes, by their tree.

        Nodes stand at the position of their depth, not of their slot: every pair by itself. They
        are few, so under a mesh every device has all of them.
        """
        count = step.tree.shape[2]
        k, v = cache.entries(step.tree_start, count)
        nodes = step.tree_start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        return pairwise_attention(
            queries, k, v, step.positions,
            jnp.take_along_axis(step.slot_positions, nodes, axis=1),
            AttentionMask(tree=step.tree, tree_start=jnp.zeros_like(step.tree_start)),
            stride=self.stride,
        )  # fmt: skip


def text_lengths(step: Step) -> Int[Array, "b t"]:
    """n of every query: what has been read by then, and in prefill the whole prompt."""
    if step.mode == "decode":
        return step.positions + 1
    n = step.prompt_lengths if step.prompt_lengths is not None else step.lengths
    if n is None:
        n = jnp.max(step.positions, axis=1) + 1
    return jnp.broadcast_to(n[:, None], step.positions.shape)


def _check_model(cfg: Any, step: Step) -> None:
    if cfg.position != "rope" or cfg.rope.rope_type in ("dynamic", "longrope"):
        raise ValueError(
            "dual chunk attention needs rotary positions whose frequencies do not depend on the "
            f"length, and the model has {cfg.position!r}, {cfg.rope.rope_type!r}: use another "
            "model or policy."
        )
    if cfg.windows is not None and any(w is not None for w in cfg.windows):
        raise ValueError(
            "the model has sliding windows, for which dual chunk attention is not defined: use "
            "the dense policy."
        )
    if not step.causal or not jnp.issubdtype(jnp.asarray(step.positions).dtype, jnp.integer):
        raise ValueError("dual chunk attention is causal and takes integer positions.")
    if step.segments is not None and step.mode != "train":
        raise ValueError("packed documents are read in mode 'train' only: leave segments out.")
