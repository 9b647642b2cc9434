"""What a query may look at, described by data instead of a dense boolean."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class AttentionMask:
    """Which key slots each query sees. Every field is optional; no field means "sees all".

    A slot is visible when all of the given rules admit it. A batch axis may be 1 (broadcast).

    Attributes:
      q_positions: int32 [b, t], position of each query; absent: 0..t-1 (only where t == s).
      k_positions: int32 [b, s], position of each slot, gaps and any order allowed; absent: 0..s-1.
        2**31 - 1 is reserved.
      window: int32 scalar (traced): 0 <= q_position - k_position < window.
      q_segments, k_segments: int32 [b, t] and [b, s], both or neither: equal segments only.
      k_valid: bool [b, s], slots that hold something.
      lengths: int32 [b], slots with index < length hold something.
      tree: bool [b, t, n], visibility of the n scratch slots that were appended last. They are
        ruled by `tree` alone: no other field applies to them (a sliding window over the drafted
        nodes is the caller's to fold in). Slots at and after tree_start + n are never visible.
      tree_start: int32 [b], index of the first scratch slot; given exactly when `tree` is.
      causal: static; k_position <= q_position.
    """

    q_positions: Any = None
    k_positions: Any = None
    window: Any = None
    q_segments: Any = None
    k_segments: Any = None
    k_valid: Any = None
    lengths: Any = None
    tree: Any = None
    tree_start: Any = None
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def ordered(self) -> bool:
        """Whether positions matter (a causal or window rule is set)."""
        return self.causal or self.window is not None

    def prefix_causal(self, t: int, s: int) -> bool:
        """Whether query i is known, without looking at data, to see no slot after i."""
        indexed = self.q_positions is None and self.k_positions is None
        return self.ordered and indexed and t == s and self.tree is None

    def validate(self, b: int, t: int, s: int) -> None:
        """Checks the fields against b rows, t queries and s slots.

        Raises:
          ValueError: a field has the wrong shape, or half of a pair is missing.
        """
        axes = {
            "q_positions": (t,), "k_positions": (s,), "q_segments": (t,), "k_segments": (s,),
            "k_valid": (s,), "lengths": (), "tree_start": (),
        }  # fmt: skip
        for name, tail in axes.items():
            _check_shape(name, getattr(self, name), b, tail)
        if self.window is not None and jnp.ndim(self.window) != 0:
            raise ValueError("AttentionMask.window must be a scalar: one window per call")
        if (self.q_segments is None) != (self.k_segments is None):
            raise ValueError("AttentionMask needs q_segments and k_segments together")
        if (self.tree is None) != (self.tree_start is None):
            raise ValueError("AttentionMask needs tree and tree_start together")
        if self.tree is not None:
            if jnp.ndim(self.tree) != 3 or self.tree.shape[2] > s:
                raise ValueError(
                    f"AttentionMask.tree must be [b, t, n] with n <= {s} slots; "
                    f"got {jnp.shape(self.tree)}"
                )
            _check_shape("tree", self.tree, b, (t, self.tree.shape[2]))
        if self.ordered and self.q_positions is None and t != s:
            raise ValueError(
                f"a causal or window mask over {t} queries and {s} slots needs q_positions: "
                "without them query i is taken to stand at slot i"
            )

    def slots_visible(self, s: int) -> Bool[Array, "#b s"]:
        """Rules that concern the slot alone: k_valid, lengths and (as not visible) scratch."""
        visible = jnp.ones((1, s), bool)
        slots = jnp.arange(s, dtype=jnp.int32)[None, :]
        if self.k_valid is not None:
            visible = visible & self.k_valid
        if self.lengths is not None:
            visible = visible & (slots < self.lengths[:, None])
        if self.tree_start is not None:
            visible = visible & (slots < self.tree_start[:, None])
        return visible

    def positions(self, t: int, s: int) -> tuple[Int[Array, "#b t"], Int[Array, "#b s"]]:
        """Positions of queries and slots, the absent ones filled in with their index."""
        q_positions, k_positions = self.q_positions, self.k_positions
        if q_positions is None:
            q_positions = jnp.arange(t, dtype=jnp.int32)[None, :]
        if k_positions is None:
            k_positions = jnp.arange(s, dtype=jnp.int32)[None, :]
        return q_positions, k_positions

    def dense(self, t: int, s: int) -> Bool[Array, "#b 1 {t} {s}"]:
        """The meaning of the mask: visible[b, 1, query, slot] (b is 1 if no field has rows)."""
        visible = self.slots_visible(s)[:, None, :] & jnp.ones((1, t, 1), bool)
        if self.ordered:
            q_positions, k_positions = self.positions(t, s)
            distance = q_positions[:, :, None] - k_positions[:, None, :]
            visible = visible & (distance >= 0)
            if self.window is not None:
                visible = visible & (distance < self.window)
        if self.q_segments is not None:
            visible = visible & (self.q_segments[:, :, None] == self.k_segments[:, None, :])
        if self.tree is not None:
            visible = visible | self._scratch_visible(s)
        return visible[:, None]

    def _scratch_visible(self, s: int) -> Bool[Array, "#b t {s}"]:
        """Visibility of the scratch slots by `tree`, laid out over all s slots."""
        n = self.tree.shape[2]
        node = jnp.arange(s, dtype=jnp.int32)[None, :] - self.tree_start[:, None]
        is_node = (node >= 0) & (node < n)
        index = jnp.clip(node, 0, n - 1)[:, None, :]
        rows = max(self.tree.shape[0], index.shape[0])
        tree = jnp.broadcast_to(self.tree, (rows, *self.tree.shape[1:]))
        index = jnp.broadcast_to(index, (rows, self.tree.shape[1], s))
        return jnp.take_along_axis(tree, index, axis=2) & is_node[:, None, :]

    def query_slice(self, start: Any, size: int) -> "AttentionMask":
        """The mask of queries start .. start + size - 1 (start may be traced).

        The mask must carry q_positions if it is ordered (see `with_positions`).
        """

        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        return dataclasses.replace(
            self,
            q_positions=cut(self.q_positions),
            q_segments=cut(self.q_segments),
            tree=cut(self.tree),
        )

    def with_positions(self, t: int, s: int, always: bool = False) -> "AttentionMask":
        """The same mask with its positions written out, `always` or if a rule uses them."""
        if not (self.ordered or always):
            return self
        q_positions, k_positions = self.positions(t, s)
        return dataclasses.replace(self, q_positions=q_positions, k_positions=k_positions)


def _check_shape(name: str, x: Any, b: int, tail: tuple[int, ...]) -> None:
    if x is None:
        return
    shape = jnp.shape(x)
    if shape not in ((b, *tail), (1, *tail)):
        raise ValueError(
            f"AttentionMask.{name} must have shape {(b, *tail)} to match q and k; got {shape}"
        )
