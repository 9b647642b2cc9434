"""Decoding over eight devices gives what one device gives."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inference.drafter import NoDrafter
from inference.engine import Engine
from inference.sharded import shard_engine
from models.attention import DensePolicy
from models.sharding import make_mesh
from ops.sampling import SamplingParams
from tests.inference.models import (
    NEW,
    ScriptedDrafter,
    assert_greedy,
    config,
    engine,
    prompts,
    script,
)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh("data=4,tensor=2")


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return engine().generate(prompts(), NEW).tokens


def assert_same_text(got: list[list[int]], plain: list[list[int]]) -> None:
    """Equal tokens, or both greedy: sums over devices round differently."""
    for prompt, new, want in zip(prompts(), got, plain, strict=True):
        assert len(new) == NEW
        assert new == want or assert_greedy(config(), prompt, new) is None


def test_plain_decoding(mesh, plain):
    assert_same_text(shard_engine(engine(), mesh).generate(prompts(), NEW).tokens, plain)


def test_a_drafter_that_is_sometimes_right(mesh, plain):
    table = script([p + new for p, new in zip(prompts(), plain, strict=True)]).at[1].set(0)
    one = engine(drafter=ScriptedDrafter(), drafter_params=table)
    alone, many = one.generate(prompts(), NEW), shard_engine(one, mesh).generate(prompts(), NEW)
    assert_same_text(many.tokens, plain)
    np.testing.assert_array_equal(many.stats.rounds, alone.stats.rounds)


def test_sampled_rows(mesh):
    sampling = SamplingParams.make(1.0, top_p=0.95)
    alone = engine().generate(prompts(), 8, sampling=sampling).tokens
    assert shard_engine(engine(), mesh).generate(prompts(), 8, sampling=sampling).tokens == alone


def test_weights_and_state_are_split(mesh):
    many = shard_engine(engine(), mesh)
    layer = many.params.segments[1].layers
    assert layer.attn.q.w.sharding.spec == PartitionSpec(None, "tensor")
    assert layer.mlp.down.w.sharding.spec == PartitionSpec("tensor", None)
    state, seeds = many.start(prompts(), NEW, SamplingParams.make())
    keys = state.cache.layers[0].k
    assert keys.addressable_shards[0].data.shape == (1, 1, *keys.shape[2:])
    assert seeds.sharding.spec == PartitionSpec("data")
    state = many.run(state, seeds, SamplingParams.make(), ())
    assert state.cache.layers[1].v.addressable_shards[0].data.shape[0] == 1


def test_rows_that_the_devices_do_not_divide(mesh, plain):
    got = shard_engine(engine(), mesh).generate(prompts()[:3], NEW).tokens
    assert got == plain[:3]


@pytest.mark.parametrize("drafter", [NoDrafter(), NoDrafter(5)], ids=["step", "tree"])
def test_the_kernel_runs_on_each_device_s_part(mesh, plain, drafter):
    """The TPU kernel in the interpreter: it is inside shard_map, as a compiled one has to be."""
    one: Engine = engine(drafter=drafter, policy=DensePolicy(implementation="interpret"))
    many = shard_engine(one, mesh)
    text = many.generate(prompts(), 4).tokens
    assert [len(x) for x in text] == [4] * 4
    assert text == [x[:4] for x in plain]
