"""Whole steps compiled by the real TPU compiler over 8 chips: training, decoding, verifying."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import base_lm
from inference.cache import init_cache
from inference.drafter import NoDrafter
from inference.loop import State, decode_rounds, init_stats
from inference.sharded import state_shardings, weight_shardings
from models import decoder
from models.params import nbytes, shape_dtype
from models.sharding import ShardingRules, make_mesh
from ops.platform import target
from ops.sampling import SamplingParams
from tests.aot import CHIPS, figures, topology
from train.config import TrainConfig, build, build_task
from train.state import abstract_state
from train.step import make_step
from train.task import Context

pytestmark = pytest.mark.aot

SIZES = "data=2,fsdp=2,tensor=2"
MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "num_layers": 2, "num_heads": 8,
    "num_kv_heads": 4, "head_dim": 128, "intermediate_size": 2048, "max_length": 4096,
}  # fmt: skip
"""A Llama of 14M parameters: the compiler's time grows with the model."""

RULES = ShardingRules()
LENGTH = 512


def devices_of(chip: str) -> Mesh:
    return make_mesh(SIZES, topology(chip).devices)


def compile_timed(chip: str, name: str, lower: Any, mesh: Mesh) -> Any:
    """Lower and compile for the chip under the mesh; print seconds and GiB per device."""
    start = time.perf_counter()
    with target("tpu"), jax.set_mesh(mesh):
        compiled = lower().compile()
    seen, gib = figures(compiled), 2**30
    print(
        f"\n{name} {chip}: {time.perf_counter() - start:.1f} s, per device "
        f"{seen['argument_bytes'] / gib:.3f} GiB arguments, "
        f"{seen['temporary_bytes'] / gib:.3f} GiB temporaries"
    )
    return compiled


def collectives(compiled: Any) -> set[str]:
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf"\b({names})(?:-start)?\(", compiled.as_text()))


def bytes_per_device(arrays: Any) -> int:
    """What one device holds of arrays in their shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def assert_split(compiled: Any, arrays: Any) -> None:
    """The program takes the shards and no whole array; two devices share what data replicates."""
    share = bytes_per_device(arrays)
    assert figures(compiled)["argument_bytes"] == pytest.approx(share, rel=0.01)
    assert share < 1.01 * nbytes(arrays) / 4


def train_lowering(mesh: Mesh) -> tuple[Any, Any]:
    """A function that lowers the training step, and the shapes of its arguments."""
    values = base_lm.get_config()
    values.task.model.update(MODEL)
    values.task.unroll, values.task.sequence_length = False, LENGTH
    values.task.remat, values.compute_dtype, values.batch_size = True, "bfloat16", 8
    config = build(TrainConfig, values.to_dict())
    task: Any = build_task(config)
    optimizer = task.optimizer(config, task.specs())
    abstract = abstract_state(task.specs(), optimizer, False, mesh, RULES)
    context = Context(config, mesh, RULES)
    place = context.batch_sharding(8, leading=1)
    kinds = {"mask": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct((1, 8, LENGTH), kinds.get(name, jnp.int32), sharding=place)
        for name in ("tokens", "targets", "segments", "positions", "mask")
    }
    step = jax.jit(
        make_step(task, config, optimizer, context),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda s: s.sharding, abstract), None),
    )
    return lambda: step.lower(abstract, None, batch), (abstract, batch)


def decode_lowering(mesh: Mesh, drafter: Any) -> tuple[Any, Any]:
    """A function that lowers decoding rounds, and the shapes of weights and state."""
    cfg, rows, slots = decoder.Config(**MODEL), 8, 4096
    weights = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding),
        jax.eval_shape(decoder.unstack, shape_dtype(decoder.specs(cfg))),
        weight_shardings(cfg, mesh, RULES),
    )

    def start() -> State:
        zeros = jnp.zeros(rows, jnp.int32)
        return State(
            tokens=jnp.zeros((rows, slots), jnp.int32), begin=zeros, length=zeros,
            limit=zeros, done=jnp.zeros(rows, bool), drafter=None,
            cache=init_cache(cfg, rows, slots, jnp.bfloat16),
            stats=init_stats(rows, drafter.max_depth, drafter.width),
        )  # fmt: skip

    state = jax.eval_shape(start)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state, state_shardings(state, mesh, RULES),
    )  # fmt: skip
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=everywhere)
    sampling = jax.tree.map(lambda x: whole(x.shape, x.dtype), jax.eval_shape(SamplingParams.make))
    arguments = (
        weights, cfg, decoder.default_policy(cfg), drafter, None, state,
        whole((rows,), jnp.int32), sampling, whole((1,), jnp.int32), whole((), jnp.int32),
    )  # fmt: skip
    lower = functools.partial(decode_rounds.lower, *arguments, extent=slots, rule="greedy")
    return lower, (weights, state)


@dataclasses.dataclass(frozen=True)
class WideDrafter(NoDrafter):
    """Nothing is drafted, but as a tree of 25 nodes: the mask, the widths and the path are real."""

    width: int = 25
    max_depth: int = 4

    def propose(self, *args: Any, **kw: Any) -> Any:
        draft, state, cache = super().propose(*args, **kw)
        return draft.replace(max_depth=self.max_depth), state, cache


@pytest.mark.parametrize("chip", CHIPS)
def test_sharded_training_compiles(chip):
    mesh = devices_of(chip)
    lower, arrays = train_lowering(mesh)
    compiled = compile_timed(chip, "train", lower, mesh)
    assert_split(compiled, arrays)
    assert "attention_prefill" in compiled.as_text()
    # Gradients are summed over rows, weights are gathered from the fsdp axis.
    assert {"all-reduce", "all-gather"} <= collectives(compiled)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("drafter", [NoDrafter(), WideDrafter()], ids=["decode", "verify"])
def test_sharded_decoding_compiles(chip, drafter):
    mesh = devices_of(chip)
    lower, arrays = decode_lowering(mesh, drafter)
    compiled = compile_timed(chip, "verify" if drafter.width > 1 else "decode", lower, mesh)
    assert_split(compiled, arrays)
    assert "attention_decode" in compiled.as_text()
    assert "all-reduce" in collectives(compiled)
    # No device holds the keys and values of another: they stay far above the temporaries.
    cache = 2 * MODEL["num_layers"] * 8 * 4096 * MODEL["num_kv_heads"] * MODEL["head_dim"] * 2
    assert figures(compiled)["temporary_bytes"] < 2 * cache / 8
