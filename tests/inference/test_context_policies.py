"""Attention policies with cache slots split over devices give what one device gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafters.lookup import LookupDrafter
from inference.engine import Engine, Generation
from inference.loop import prefill_chunk
from inference.policies.dual_chunk import DualChunkPolicy
from inference.policies.vertical_slash import VerticalSlashPolicy, with_budgets
from inference.sharded import shard_engine
from models import clex, decoder, params, seqpe
from models.attention import DensePolicy, Step
from ops.sampling import SamplingParams
from research.context.clex.scheme import make_scheme
from research.context.seqpe.policy import make_policy
from tests.inference.models import config, engine, prompts, weights
from tests.inference.test_context import (
    LENGTHS,
    NEW,
    TEXT,
    assert_nothing_per_slot_is_exchanged,
    collectives,
    compiled_round,
    mesh_of,
    tree_engine,
)

MESHES = ("context=4,tensor=2", "data=2,context=2,tensor=2")
ROTARY = config(max_length=TEXT)
PLAIN = config(max_length=TEXT, position="none")


def random_weights(specs: Any) -> Any:
    return params.init(specs, jax.random.key(1))


def with_clex() -> DensePolicy:
    """Factors of 1 and 2 within these texts: keys stay as they are until they are read."""
    ode = clex.CLEXConfig(ROTARY.head_dim, ROTARY.rope_base, 100)
    return DensePolicy(scheme=make_scheme(random_weights(clex.specs(ode)), ode))


def sparsely(implementation: str) -> VerticalSlashPolicy:
    """Every head of every layer has budgets of its own; prompts of 64 tokens are read densely."""
    budgets = np.asarray([[4, 20, 50, 100], [100, 30, 10, 5]], np.int32)
    return with_budgets(DualChunkPolicy(96, 16), budgets, budgets, 64, implementation)


def with_seqpe() -> Any:
    """Vectors beside the keys, which are twice as wide as the values."""
    encoder, injection = seqpe.Config(16, 2, TEXT), seqpe.Injection()
    projection = random_weights(seqpe.projection_specs(injection, encoder.out, PLAIN))
    weights = random_weights(seqpe.specs(encoder))
    return make_policy(weights, encoder, projection, injection, TEXT)


POLICIES = {
    # A stride of 80, so that shards of 128 slots begin within a chunk.
    "dual_chunk": (ROTARY, lambda: DualChunkPolicy(96, 16)),
    "temperature": (ROTARY, lambda: DualChunkPolicy(96, 16, 3)),
    "clex": (ROTARY, with_clex),
    "seqpe": (PLAIN, with_seqpe),
    "sparse": (ROTARY, lambda: sparsely("xla")),
}


@functools.cache
def policy_of(name: str) -> Any:
    return POLICIES[name][1]()


def one_device(name: str, **settings: Any) -> Engine:
    """Prompts are prefilled in one or two pieces, whose queries are split."""
    return engine(POLICIES[name][0], policy=policy_of(name), prefill_size=128, **settings)


@functools.cache
def alone(name: str, temperature: float = 0.0) -> Generation:
    sampling = SamplingParams.make(temperature)
    return one_device(name).generate(prompts(*LENGTHS), NEW, sampling=sampling)


def test_these_texts_tell_the_policies_apart():
    dense = engine(ROTARY, prefill_size=128).generate(prompts(*LENGTHS), NEW).tokens
    names = "dual_chunk", "temperature", "clex", "sparse"
    found = dense, *(alone(name).tokens for name in names)
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("name", POLICIES)
def test_drafts_are_looked_up_and_verified_over_the_shards(name):
    """Prompts in two pieces, then passes over drafts that are right at times."""
    one = one_device(name, drafter=LookupDrafter(4, (2, 1)), widths=())
    got = shard_engine(one, mesh_of(MESHES[0])).generate(prompts(*LENGTHS), NEW)
    assert got.tokens == alone(name).tokens
    assert np.sum(got.stats.accepted) > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_every_policy_on_every_mesh(name, sizes, temperature):
    sampling = SamplingParams.make(temperature)
    many = shard_engine(one_device(name), mesh_of(sizes))
    got = many.generate(prompts(*LENGTHS), NEW, sampling=sampling)
    assert got.tokens == alone(name, temperature).tokens


def test_trees_of_dual_chunks_are_verified_and_committed_over_the_shards():
    one = tree_engine(ROTARY, alone("temperature").tokens, policy=policy_of("temperature"))
    many = shard_engine(one, mesh_of(MESHES[0]))
    got, want = many.generate(prompts(*LENGTHS), NEW), one.generate(prompts(*LENGTHS), NEW)
    assert got.tokens == want.tokens == alone("temperature").tokens
    np.testing.assert_array_equal(got.stats.rounds, want.stats.rounds)
    assert got.stats.accepted[0] > 0 and got.stats.rounds[0] < NEW


@pytest.mark.parametrize(
    "name", ["dual_chunk", *(pytest.param(x, marks=pytest.mark.slow) for x in ("clex", "seqpe"))]
)
def test_no_program_exchanges_the_cache(name):
    """Neither a round with a tree nor a short piece of the prompts.

    SeqPE's vectors of the new tokens are exchanged, and are smaller than a device's keys.
    """
    one = tree_engine(POLICIES[name][0], alone(name).tokens, policy=policy_of(name))
    many = shard_engine(one, mesh_of(MESHES[0]))
    compiled, state = compiled_round(many)
    with jax.set_mesh(many.mesh):
        piece = prefill_chunk.lower(
            many.params, many.cfg, many.policy, state.cache, jnp.zeros((4, 16), jnp.int32),
            jnp.asarray([16, 9, 0, 1]), state.limit, extent=state.cache.capacity,
            outputs=frozenset(), prompt_lengths=state.begin,
        )  # fmt: skip
    keys = state.cache.layers[0].k
    for program in (compiled, piece.compile()):
        if name == "seqpe":
            shard = keys.addressable_shards[0].data
            assert max(size for _, size in collectives(program)) < shard.size
        else:
            assert_nothing_per_slot_is_exchanged(program, keys)


def read_sparsely(implementation: str) -> np.ndarray:
    """Hidden states of ragged rows."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, ROTARY.vocab_size, (4, 192)))
    counts = jnp.asarray([192, 70, 130, 1], jnp.int32)
    row = jnp.broadcast_to(jnp.arange(192, dtype=jnp.int32), tokens.shape)
    step = Step(row, lengths=counts, counts=counts, mode="prefill")
    program = jax.jit(decoder.forward, static_argnums=1)
    out = program(weights(ROTARY), ROTARY, tokens, step=step, policy=sparsely(implementation))
    return np.asarray(out.hidden)[np.asarray(row < counts[:, None])]


@pytest.mark.parametrize(
    ("mesh", "implementation"),
    [
        ("context=4", "xla"),  # shares of less than a block
        ("data=2,context=2,tensor=2", "xla"),
        pytest.param("data=2,tensor=2", "interpret", marks=pytest.mark.slow),
        pytest.param("context=2,tensor=2", "interpret", marks=pytest.mark.slow),
    ],
)
def test_sparse_prefill_runs_on_each_device_s_rows_heads_and_slots(mesh, implementation):
    alone = read_sparsely("xla")
    with jax.set_mesh(mesh_of(mesh)):
        split = read_sparsely(implementation)
    np.testing.assert_allclose(split, alone, rtol=1e-4, atol=1e-4)
