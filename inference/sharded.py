"""Decoding over a mesh: where weights and state lie, and an engine that puts them there.

Rows go over data and fsdp, key heads over tensor, cache slots over context, weights by the sharding
rules. What the rules cannot divide is on every device.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inference.cache import Cache, DenseLayer, init_cache
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

    Leaves whose first axis is the batch are split by rows; those of caches, a drafter's own too, as
    in :func:`cache_shardings`. Shared state of a drafter has no rows and is on every device.
    """
    return _shardings(state, state.length.shape[0], mesh, rules)


def cache_shardings(cache: Cache, mesh: Mesh, rules: ShardingRules) -> Cache:
    """The sharding of every leaf of a cache (arrays or ``ShapeDtypeStruct``).

    By rows; dense keys and values also by key heads and slots, other layers by key heads, and
    positions by slots.
    """
    return _shardings(cache, cache.length.shape[0], mesh, rules)


def _shardings(tree: Any, batch: int, mesh: Mesh, rules: ShardingRules, *axes: str) -> Any:
    """Shardings by rows, then ``axes``; caches and dense layers in their own way."""

    def place(leaf: Any, *axes: str) -> NamedSharding:
        rows = leaf.ndim > 0 and leaf.shape[0] == batch
        names = (("batch" if rows else None), *axes, *[None] * leaf.ndim)[: leaf.ndim]
        return rules.sharding(names, leaf.shape, mesh)

    def one(node: Any) -> Any:
        if isinstance(node, DenseLayer):
            return jax.tree.map(lambda leaf: place(leaf, "kv_heads", "length"), node)
        if isinstance(node, Cache):
            return Cache(
                layers=_shardings(node.layers, batch, mesh, rules, "kv_heads"),
                positions=place(node.positions, "length"),
                length=place(node.length),
                scratch=place(node.scratch),
                next_position=place(node.next_position),
            )
        return place(node, *axes)

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Cache | DenseLayer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedEngine(Engine):
    """An :class:`~inference.engine.Engine` over a mesh; make it with :func:`shard_engine`."""

    mesh: Mesh
    rules: ShardingRules

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,
        drafter_state: Any = None,
        capacity: int | None = None,
        draft_prompts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[State, jax.Array]:
        """See :meth:`Engine.start`; the state lies on the mesh."""
        with jax.set_mesh(self.mesh):
            state, seeds_array = super().start(
                prompts, max_new_tokens, sampling, seeds, drafter_state, capacity, draft_prompts
            )
            return jax.device_put(
                (state, seeds_array),
                (
                    state_shardings(state, self.mesh, self.rules),
                    self.rules.sharding(("batch",), seeds_array.shape, self.mesh),
                ),
            )

    def _empty_cache(self, batch: int, capacity: int, dtype: Any, key_width: int) -> Cache:
        """Made where it lies: no device ever holds all of it."""
        make = functools.partial(init_cache, self.cfg, batch, capacity, dtype, key_width)
        place = cache_shardings(jax.eval_shape(make), self.mesh, self.rules)
        return jax.jit(make, out_shardings=place)()

    def extent(self, needed: int, capacity: int) -> int:
        """All slots where they are split: the first ones alone would have to be moved.

        The kernels skip blocks past a row's end all the same.
        """
        split = self.mesh.shape["context"] > 1
        return capacity if split else super().extent(needed, capacity)

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
