"""How much of dense attention a pattern retains, per head, in one pass over real texts.

Keys that a pattern keeps are among those of dense attention, so exp(lse_sparse - lse_dense) of a
query is exactly the share of its attention mass that is kept: its recall. It costs nothing beside
the two attentions.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from inference.policies.dual_chunk import DualChunkPolicy, Rotations
from inference.policies.vertical_slash import over_runs
from models import decoder
from models.attention import Attended, Step
from ops.block_sparse import BLOCK, SparsePlan, block_sparse_attention
from research.context.qwen25_1m.patterns import Pattern, Run

SETTLED = 2500
"""Queries before this position are not counted, if the text is longer."""


@struct.dataclass
class Retention:
    """What one pattern keeps in one layer, per head."""

    recall: Any  # (h,) mean share of attention mass
    error: Any  # (h,) mean distance of outputs over the dense output's norm
    density: Any  # (h,) keys that are computed over those that dense attention needs


def attention_recall(
    lse_sparse: Float[Array, "b t h"], lse_dense: Float[Array, "b t h"], counted: Bool[Array, "b t"]
) -> Float[Array, " h"]:
    """Mean over queries of exp(lse_sparse - lse_dense), in (0, 1]."""
    share = jnp.exp(jnp.minimum(lse_sparse - lse_dense, 0.0))
    return _mean(share, counted)


@struct.dataclass
class MeasuringPolicy:
    """Dense dual chunk attention that measures patterns beside it; what is passed on is dense.

    ``patterns`` maps names to patterns that all layers share, ``layered`` to patterns whose leaves
    have a leading layer axis. Reads whole texts, in mode ``prefill`` without a cache. A pass
    returns as ``aux`` a :class:`Retention` for each name, stacked over layers.
    """

    dense: DualChunkPolicy
    patterns: dict[str, Pattern]
    layered: dict[str, Pattern] = struct.field(default_factory=dict)
    settled: int = struct.field(pytree_node=False, default=SETTLED)

    def per_layer(self, num_layers: int) -> Any:
        """The patterns that differ from layer to layer."""
        return self.layered

    def key_width(self, cfg: Any) -> int:
        """Rotated keys are as wide as a head."""
        return self.dense.key_width(cfg)

    def prepare(self, cfg: Any, step: Step) -> Rotations:
        """See :meth:`DualChunkPolicy.prepare`.

        Raises:
            ValueError: a step that is not a prefill.
        """
        if step.mode != "prefill":
            raise ValueError("retention is measured in mode 'prefill': give whole texts.")
        return self.dense.prepare(cfg, step)

    def attend(
        self,
        layer: dict[str, Pattern],
        shared: Rotations,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t g d"],
        v: Float[Array, "b t g dv"],
        x: Any,
        step: Step,
        cache: Any,
    ) -> Attended:
        """See :class:`models.attention.AttentionPolicy`.

        Raises:
            ValueError: a cache.
        """
        if cache is not None:
            raise ValueError("retention is measured on whole texts: leave the cache out.")
        queries, k = shared.rotate_q(q), shared.rotate_k(k)
        critical = shared.rotate_critical(q)
        out, lse = self.dense.attend_slots(queries, k, v, step)
        t = q.shape[1]
        counts = jnp.full((q.shape[0],), t, jnp.int32) if step.counts is None else step.counts
        begin = jnp.where(counts > self.settled, self.settled, 0)
        row = jnp.arange(t, dtype=jnp.int32)[None]
        counted = (row < counts[:, None]) & (row >= begin[:, None])
        aux = {}
        for name, pattern in {**self.patterns, **(layer or {})}.items():
            kept, kept_lse, keys = self._apply(pattern, queries, critical, k, v, step)
            far = jnp.linalg.norm((kept - out).astype(jnp.float32), axis=-1)
            size = jnp.maximum(jnp.linalg.norm(out.astype(jnp.float32), axis=-1), 1e-9)
            needed = jnp.sum(jnp.where(counted, step.positions + 1, 0))
            aux[name] = Retention(
                recall=attention_recall(kept_lse, lse, counted),
                error=_mean(far / size, counted),
                density=jnp.sum(jnp.where(counted[..., None], keys, 0), axis=(0, 1)) / needed,
            )
        return Attended(out=out, lse=lse, aux=aux)

    def _apply(self, pattern, queries, critical, k, v, step):
        stride = self.dense.stride

        def attend(queries, critical, first, counts):
            run = Run(queries, critical, k, first, counts, stride)
            plan = pattern.plan(run)
            out, lse = block_sparse_attention(queries, k, v, run.positions, plan, stride=stride)
            keys = jnp.repeat(listed_keys(plan), BLOCK, axis=2)[:, :, : queries.shape[2]]
            return out, lse, jnp.swapaxes(keys, 1, 2)

        return over_runs(attend, queries, critical, step, stride)


def listed_keys(plan: SparsePlan) -> Array:
    """(b, h, n): how many slots each block's queries are multiplied with."""
    return (
        jnp.where(plan.meant_ranges, plan.stops - plan.starts, 0).sum(axis=-1) + plan.column_counts
    )


def measure(
    params: decoder.Params,
    cfg: decoder.Config,
    policy: MeasuringPolicy,
    tokens: Array,
    layers: decoder.LayerChoice | None = None,
) -> dict[str, Retention]:
    """One pass over texts (b, t) of equal length: a Retention by pattern, fields (layers, h)."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    step = Step(positions, mode="prefill")
    return decoder.forward(params, cfg, tokens, step=step, policy=policy, layers=layers).aux


def _mean(x: Float[Array, "b t h"], counted: Bool[Array, "b t"]) -> Float[Array, " h"]:
    total = jnp.sum(jnp.where(counted[..., None], x, 0.0), axis=(0, 1))
    return total / jnp.maximum(jnp.sum(counted), 1)
