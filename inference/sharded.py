"""Decoding over a mesh: where weights and state lie, and an engine that puts them there.

Rows go over data and fsdp, key heads over tensor, weights by the sharding rules. What the rules
cannot divide is on every device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inference.cache import Cache
from inference.engine import Engine
from inference.loop import State
from models import decoder
from models import params as parameters
from models.sharding import ShardingRules
from ops.sampling import SamplingParams


def weight_shardings(cfg: decoder.Config, mesh: Mesh, rules: ShardingRules) -> decoder.Params:
    """The sharding of every weight of ``decoder.unstack(params)``."""
    stacked = parameters.shardings(decoder.specs(cfg), mesh, rules)

    def one_layer(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))

    segments = tuple(
        decoder.Segment(jax.tree.map(one_layer, segment.layers), count=1, stacked=False)
        for segment in stacked.segments
        for _ in range(segment.count)
    )
    return stacked.replace(segments=segments)


def state_shardings(state: State, mesh: Mesh, rules: ShardingRules) -> State:
    """The sharding of every leaf of a state (arrays or ``ShapeDtypeStruct``).

    Leaves whose first axis is the batch are split by rows; keys and values also by key heads. The
    drafter's state is split by rows unless it has none, as shared state has not.
    """
    batch = state.length.shape[0]

    def by_rows(leaf: Any, *axes: str | None) -> NamedSharding:
        rows = leaf.ndim > 0 and leaf.shape[0] == batch
        names = (("batch" if rows else None), *axes, *[None] * leaf.ndim)[: leaf.ndim]
        return rules.sharding(names, leaf.shape, mesh)

    shardings = jax.tree.map(by_rows, state)
    cache: Cache = state.cache
    layers = jax.tree.map(lambda leaf: by_rows(leaf, "kv_heads"), cache.layers)
    return shardings.replace(cache=shardings.cache.replace(layers=layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedEngine(Engine):
    """An :class:`~inference.engine.Engine` over a mesh; make it with :func:`shard_engine`."""

    mesh: Mesh
    rules: ShardingRules

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,
        drafter_state: Any = None,
    ) -> tuple[State, jax.Array]:
        """See :meth:`Engine.start`; the state lies on the mesh."""
        with jax.set_mesh(self.mesh):
            state, seeds_array = super().start(
                prompts, max_new_tokens, sampling, seeds, drafter_state
            )
            return jax.device_put(
                (state, seeds_array),
                (
                    state_shardings(state, self.mesh, self.rules),
                    self.rules.sharding(("batch",), seeds_array.shape, self.mesh),
                ),
            )

    def run(
        self,
        state: State,
        seeds: jax.Array,
        sampling: SamplingParams,
        eos: Sequence[int],
        rounds_per_call: int | None = None,
        after_call: Callable[[State], None] | None = None,
    ) -> State:
        """See :meth:`Engine.run`."""
        with jax.set_mesh(self.mesh):
            return super().run(state, seeds, sampling, eos, rounds_per_call, after_call)


def shard_engine(engine: Engine, mesh: Mesh, rules: ShardingRules | None = None) -> ShardedEngine:
    """The engine with its weights on a mesh; the drafter's weights are on every device.

    The weights must be plain arrays, not codec leaves.
    """
    rules = ShardingRules() if rules is None else rules
    everywhere = NamedSharding(mesh, PartitionSpec())
    fields = {f.name: getattr(engine, f.name) for f in dataclasses.fields(Engine)}
    fields["params"] = jax.device_put(engine.params, weight_shardings(engine.cfg, mesh, rules))
    fields["drafter_params"] = jax.device_put(engine.drafter_params, everywhere)
    return ShardedEngine(**fields, mesh=mesh, rules=rules)
