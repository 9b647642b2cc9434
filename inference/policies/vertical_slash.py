"""Vertical-slash sparse prefill within dual chunk attention, as Qwen2.5-1M serves long prompts.

Every run of queries within a chunk looks for the columns and diagonals that matter, by its own last
64 queries, and attends to those alone (arXiv 2407.02490, 2501.15383). Short prompts and decoding
are dense.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from inference.policies.dual_chunk import DualChunkPolicy, Rotations, text_lengths
from models.attention import Attended, Step
from models.mesh_attention import over_mesh, slots_axis
from ops.attention import AttentionMask
from ops.block_sparse import block_sparse_attention
from ops.platform import implementation_of
from ops.vertical_slash import raised, vertical_slash_plan

THRESHOLD = 32768
"""Prompts up to so many tokens are prefilled densely."""


@struct.dataclass
class VerticalSlashPolicy:
    """Dual chunk attention whose prefill of long prompts is sparse.

    ``dense`` says chunks and temperature and serves all that is not sparse: prompts of at most
    ``threshold`` tokens, decoding, drafted trees, and training. ``vertical`` and ``slash`` are the
    budgets of every layer's heads, (layers, h) int32: so many columns and diagonals, each at most
    what there are. They and the threshold are data. ``most`` bounds both budgets and is static;
    take it from :func:`with_budgets`.

    A chunk of at least the longest text makes it sparse attention without dual chunks. Queries of a
    prompt that is prefilled in pieces are selected for per piece and chunk.
    """

    dense: DualChunkPolicy
    vertical: Any
    slash: Any
    threshold: Any = THRESHOLD
    most: tuple[int, int] = struct.field(pytree_node=False, default=(1024, 8192))
    implementation: str = struct.field(pytree_node=False, default="auto")

    def per_layer(self, num_layers: int) -> tuple[Int[Array, "layers h"], Int[Array, "layers h"]]:
        """The budgets.

        Raises:
            ValueError: not one row per layer.
        """
        for name, budgets in (("vertical", self.vertical), ("slash", self.slash)):
            if jnp.ndim(budgets) != 2 or budgets.shape[0] != num_layers:
                raise ValueError(
                    f"the policy's {name} budgets have shape {jnp.shape(budgets)} for {num_layers} "
                    "layers: give (layers, heads)."
                )
        return self.vertical, self.slash

    def key_width(self, cfg: Any) -> int:
        """Rotated keys are as wide as a head."""
        return self.dense.key_width(cfg)

    def prepare(self, cfg: Any, step: Step) -> Rotations:
        """See :meth:`DualChunkPolicy.prepare`.

        Raises:
            ValueError: a model or a step that it is not defined for, or budgets for other heads.
        """
        if self.vertical.shape[1:] != (cfg.num_heads,) or self.slash.shape[1:] != (cfg.num_heads,):
            raise ValueError(
                f"the budgets are for {self.vertical.shape[-1]} and {self.slash.shape[-1]} heads, "
                f"and the model has {cfg.num_heads}: make them for this model."
            )
        return self.dense.prepare(cfg, step)

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
        if step.mode != "prefill" or step.tree is not None:
            return self.dense.attend(None, shared, q, k, v, x, step, cache)
        k = shared.rotate_k(k)
        if cache is not None:
            cache = cache.append(k, v, step.start)
            k, v = cache.read(step.extent)
        sparse = text_lengths(step)[:, 0] > self.threshold
        out, lse = jax.lax.cond(
            jnp.any(sparse),
            lambda: self.attend_sparsely(layer, shared, q, k, v, step, sparse),
            lambda: self.dense.attend_slots(shared.rotate_q(q), k, v, step),
        )
        return Attended(out=out, cache=cache, lse=lse)

    def cached_keys(
        self, layer: Any, shared: Rotations, k: Float[Array, "b t g d"]
    ) -> Float[Array, "b t g d"]:
        """See :class:`models.attention.LendingPolicy`."""
        return self.dense.cached_keys(None, shared, k)

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
        """See :class:`models.attention.LendingPolicy`; dense, as decoding is."""
        return self.dense.cross_attend(None, shared, q, k, v, step, mask)

    def attend_sparsely(
        self,
        layer: tuple[Int[Array, " h"], Int[Array, " h"]],
        shared: Rotations,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b s g d"],
        v: Float[Array, "b s g dv"],
        step: Step,
        sparse: Bool[Array, " b"],
    ) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
        """Every run of queries attends to what matters to its own last ones.

        Rows that are not to be sparse get a plan of everything, which is dense attention by other
        means. Nothing of it crosses rows or heads, so a mesh may split both. Where it splits slots,
        devices select together, and each attends to what is listed of its own.
        """
        stride, implementation = self.dense.stride, implementation_of(self.implementation)
        axis = slots_axis(k)

        def attend_all(q, k, v, by_row, *budgets):
            shared, step, sparse = by_row
            origin = None if axis is None else jax.lax.axis_index(axis) * k.shape[1]

            def attend(queries, critical, first, counts):
                plan = vertical_slash_plan(
                    critical, k, first, counts, *(each[None] for each in budgets),
                    stride=stride, most=self.most, every=~sparse, axis=axis,
                )  # fmt: skip
                positions = first[:, None] + jnp.arange(queries.shape[2], dtype=jnp.int32)[None]
                return block_sparse_attention(
                    queries, k, v, positions, plan, stride=stride, implementation=implementation,
                    first=origin,
                )  # fmt: skip

            return over_runs(attend, shared.rotate_q(q), shared.rotate_critical(q), step, stride)

        return over_mesh(attend_all, q, k, v, (shared, step, sparse), implementation, layer)


def over_runs(
    attend: Any,
    queries: Float[Array, "3 b t h d"],
    critical: Float[Array, "3 b t h d"],
    step: Step,
    stride: int,
) -> Any:
    """One run after the other, a run being a row's queries within one chunk.

    Args:
        attend: takes the run's rotated queries and critical ones (3, b, size, h, d), each row's
            first position, and how many of its queries are real; returns arrays (b, size, ...).
        step: consecutive positions, and counts.

    Returns:
        The arrays for all queries, (b, t, ...). What stands beyond a row's count is not meant.
    """
    b, t = queries.shape[1:3]
    size = min(t, stride)
    begin = step.positions[:, 0]
    end = begin + (t if step.counts is None else step.counts)
    chunk = begin // stride
    # A run is cut out and put back whole, so there must be room behind the last one.
    room = ((0, 0), (0, 0), (0, size), (0, 0), (0, 0))
    queries, critical = jnp.pad(queries, room), jnp.pad(critical, room)

    def part(i):
        first = jnp.minimum(jnp.maximum(begin, (chunk + i) * stride), begin + t)
        counts = jnp.clip(jnp.minimum(end, (chunk + i + 1) * stride) - first, 0, size)
        offset = first - begin
        return offset, attend(
            _cut(queries, offset, size), _cut(critical, offset, size), first, counts
        )

    def run(i, carry):
        offset, new = part(i)
        # What is behind the run's end is put right by the next one.
        return jax.tree.map(lambda x, y: _paste(x, y, offset), carry, new)

    shapes = jax.eval_shape(part, jnp.int32(0))[1]
    empty = jax.tree.map(lambda x: jnp.zeros((b, t + size, *x.shape[2:]), x.dtype), shapes)
    runs = jnp.max((end - 1) // stride - chunk) + 1
    return jax.tree.map(lambda x: x[:, :t], jax.lax.fori_loop(0, runs, run, empty))


def with_budgets(
    dense: DualChunkPolicy,
    vertical: Any,
    slash: Any,
    threshold: Any = THRESHOLD,
    implementation: str = "auto",
) -> VerticalSlashPolicy:
    """The policy of given budgets, (layers, h) whole numbers, with the static bounds they need.

    Raises:
        ValueError: budgets that are not two equal tables of numbers of 1 or more.
    """
    vertical, slash = jnp.asarray(vertical, jnp.int32), jnp.asarray(slash, jnp.int32)
    if vertical.ndim != 2 or vertical.shape != slash.shape:
        raise ValueError(
            f"budgets must be two tables (layers, heads), got {vertical.shape} and {slash.shape}."
        )
    if int(jnp.min(vertical)) < 1 or int(jnp.min(slash)) < 1:
        raise ValueError("budgets are 1 or more: a head that attends to nothing has no output.")
    most = int(jnp.max(raised(vertical))), int(jnp.max(slash))
    return VerticalSlashPolicy(dense, vertical, slash, threshold, most, implementation)


def save_budgets(path: pathlib.Path, policy: VerticalSlashPolicy) -> None:
    """Write a policy's budgets per layer and head, its threshold and trained length as JSON."""
    held = {
        "vertical": policy.vertical.tolist(),
        "slash": policy.slash.tolist(),
        "threshold": int(policy.threshold),
        "trained": int(policy.dense.original_max_position),
    }
    path.write_text(json.dumps(held) + "\n")


def read_budgets(path: pathlib.Path, chunk_size: int, local_size: int) -> VerticalSlashPolicy:
    """The policy of a file that :func:`save_budgets` wrote; threshold and trained length may lack.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not hold two tables of budgets.
    """
    held = json.loads(path.read_text())
    if not isinstance(held, dict) or not {"vertical", "slash"} <= set(held):
        raise ValueError(
            f"{path} holds no budgets: it needs 'vertical' and 'slash', each a list per layer of a "
            "number per head."
        )
    dense = DualChunkPolicy(chunk_size, local_size, held.get("trained", 0))
    threshold = held.get("threshold", THRESHOLD)
    return with_budgets(dense, held["vertical"], held["slash"], threshold)


def _cut(x: Array, start: Int[Array, " b"], size: int) -> Array:
    """``size`` queries of each row from its start on."""
    return jax.vmap(
        lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=1),
        in_axes=(1, 0),
        out_axes=1,
    )(x, start)


def _paste(x: Array, part: Array, start: Int[Array, " b"]) -> Array:
    """Rows of ``part`` over those of ``x`` from each one's start on."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(
        x, part, start
    )
