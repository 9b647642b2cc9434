"""Decoding with cache slots split over devices gives what one device gives."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import NoDrafter, static_draft
from inference.drafters.draft_model import DraftModel
from inference.loop import decode_rounds
from inference.sharded import ShardedEngine, shard_engine
from models import decoder
from models.attention import DensePolicy
from models.sharding import make_mesh
from ops.sampling import SamplingParams
from ops.tree import StaticTree
from tests.inference.models import ScriptedDrafter, config, engine, prompts, script, weights

LENGTHS = (1, 30, 120, 250)
"""Of 512 slots in two to four shards: two rows pass from one shard into the next as they grow."""

TEXT = 400
NEW = 12
MESHES = ("context=2", "context=4,tensor=2", "data=2,context=2,tensor=2")


@dataclasses.dataclass(frozen=True)
class ScriptedTree(ScriptedDrafter):
    """Two levels of the table's tokens, each behind a wrong sibling: kept nodes must move."""

    length: int = 4
    max_depth: int = 2

    def propose(self, params: Any, state: Any, target: Any, cache: Any, root: Any, context: Any):
        tree = StaticTree(((0,), (1,), (1, 0), (1, 1)))
        index = context.length[:, None] + jnp.asarray([[0, 0, 1, 1]])
        right = jnp.take_along_axis(params, jnp.minimum(index, params.shape[1] - 1), axis=1)
        drafted = (right + jnp.asarray([[1, 0, 1, 0]])) % config().vocab_size
        return static_draft(tree, jnp.concatenate([root[:, None], drafted], axis=1)), state, cache


def mesh_of(sizes: str) -> jax.sharding.Mesh:
    count = int(np.prod([int(part.split("=")[1]) for part in sizes.split(",")]))
    return make_mesh(sizes, jax.devices()[:count])


@pytest.fixture(scope="module")
def windowed() -> decoder.Config:
    """The second layer sees 40 tokens back."""
    return config(max_length=TEXT, windows=(None, 40))


@pytest.fixture(scope="module")
def texts(windowed) -> list[list[int]]:
    one = engine(windowed, prefill_size=128)
    return one.generate(prompts(*LENGTHS), NEW).tokens


def tree_engine(cfg: decoder.Config, texts: list[list[int]], **settings: Any):
    """Drafts are right but for the second row's."""
    whole = [p + new for p, new in zip(prompts(*LENGTHS), texts, strict=True)]
    table = script(whole, 280).at[1].set(0)
    return engine(cfg, prefill_size=128, drafter=ScriptedTree(), drafter_params=table, **settings)


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Name and number of elements of every exchange in a program, the largest of its parts."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in shape.split(",") if n]))
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        found.append((kind, max(sizes)))
    return found


def assert_nothing_per_slot_is_exchanged(compiled: Any, keys: jax.Array) -> None:
    """Not even the positions of one row, let alone what one device holds of one layer."""
    found = collectives(compiled)
    shard = keys.addressable_shards[0].data
    assert found and max(size for _, size in found) < shard.size
    assert max([size for kind, size in found if kind != "all-reduce"], default=0) < keys.shape[2]


def compiled_round(many: ShardedEngine) -> tuple[Any, Any]:
    """The decoding program of an engine after its prompts, and the state it takes."""
    sampling = SamplingParams.make()
    state, seeds = many.start(prompts(*LENGTHS), NEW, sampling)
    with jax.set_mesh(many.mesh):
        lowered = decode_rounds.lower(
            many.params, many.cfg, many.policy or decoder.default_policy(many.cfg), many.drafter,
            many.drafter_params, state, seeds, sampling, jnp.zeros((0,), jnp.int32),
            jnp.asarray(1, jnp.int32), extent=state.cache.capacity, rule="greedy",
        )  # fmt: skip
    return lowered.compile(), state


def test_a_tree_is_verified_and_committed_over_the_shards(windowed, texts):
    """Prompts of two chunks, a sliding window, trees whose kept nodes move between shards."""
    one = tree_engine(windowed, texts)
    many = shard_engine(one, mesh_of("context=4,tensor=2"))
    got, alone = many.generate(prompts(*LENGTHS), NEW), one.generate(prompts(*LENGTHS), NEW)
    assert got.tokens == alone.tokens == texts
    np.testing.assert_array_equal(got.stats.rounds, alone.stats.rounds)
    assert got.stats.accepted[0] > 0 and got.stats.rounds[0] < NEW


def test_no_program_exchanges_the_cache(windowed, texts):
    many = shard_engine(tree_engine(windowed, texts), mesh_of("context=4,tensor=2"))
    compiled, state = compiled_round(many)
    keys = state.cache.layers[0].k
    assert keys.addressable_shards[0].data.shape == (4, 1, keys.shape[2] // 4, keys.shape[3])
    assert state.cache.positions.sharding.spec[1] == "context"
    assert_nothing_per_slot_is_exchanged(compiled, keys)
    after = compiled.output_shardings.cache.layers[0].k
    assert after.is_equivalent_to(keys.sharding, keys.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("kind", ["step", "tree"])
def test_every_mesh(windowed, texts, sizes, kind):
    one = tree_engine(windowed, texts)
    one = dataclasses.replace(one, drafter=NoDrafter()) if kind == "step" else one
    got = shard_engine(one, mesh_of(sizes)).generate(prompts(*LENGTHS), NEW)
    assert got.tokens == texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["step", "tree"])
def test_the_kernels_run_on_each_device_s_slots(kind):
    """The TPU kernels in the interpreter, for chunks of the prompts as well."""
    cfg = config(max_length=TEXT)
    plain = engine(cfg, prefill_size=128).generate(prompts(*LENGTHS), NEW).tokens
    one = tree_engine(cfg, plain, policy=DensePolicy(implementation="interpret"))
    one = dataclasses.replace(one, drafter=NoDrafter()) if kind == "step" else one
    many = shard_engine(one, mesh_of("context=4,tensor=2"))
    assert many.generate(prompts(*LENGTHS), 4).tokens == [x[:4] for x in plain]


@pytest.mark.slow
def test_a_drafter_s_own_cache_is_split_too(windowed, texts):
    draft = config(max_length=TEXT, num_layers=1)
    one = engine(
        windowed, prefill_size=128,
        drafter=DraftModel(draft, length=3), drafter_params=weights(draft),
    )  # fmt: skip
    many = shard_engine(one, mesh_of("data=2,context=2,tensor=2"))
    assert many.generate(prompts(*LENGTHS), NEW).tokens == texts
    compiled, state = compiled_round(many)
    keys = [x for x in jax.tree.leaves(state.drafter) if x.ndim == 4]
    assert keys and all("context" in x.sharding.spec for x in keys)
    assert_nothing_per_slot_is_exchanged(compiled, keys[0])
