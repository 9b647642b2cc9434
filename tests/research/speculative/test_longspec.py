"""LongSpec's drafter: exact texts, its beam against passes over whole texts, what it refuses."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from inference.drafter import Context, Draft, NoDrafter, Target
from inference.drafters.registry import check_name, make_drafter
from inference.loop import decode_rounds, prefill_chunk
from inference.policies.registry import make_policy
from inference.sharded import shard_engine
from models import decoder, longspec, params
from models.attention import DensePolicy, Step
from models.drafter_io import save_drafter
from models.load import Model
from models.sharding import make_mesh
from ops.sampling import SamplingParams
from research.speculative.longspec.drafter import BEAM, CHAIN, LongSpecDrafter
from tests.inference.models import (
    NEW,
    config,
    engine,
    letters,
    prompts,
    weights,
)
from tests.inference.sampled_law import p_value
from tests.research.context.test_decoding import clex_scheme
from tests.research.context.test_seqpe_drafters import vectors

CFG = config()
SMALL = longspec.LongSpecConfig(window=7)
TREE = (2, 4, 3)
GREEDY = SamplingParams.make()


def layer(cfg: longspec.LongSpecConfig = SMALL, target: decoder.Config = CFG) -> longspec.Params:
    """Random weights, large enough that laws differ from token to token."""
    made = params.init(longspec.specs(cfg, target), jax.random.key(3))
    rng = np.random.default_rng(4)
    noise = lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(noise, made)


def drafter(shape: tuple[int, ...] = TREE, **changes: Any) -> LongSpecDrafter:
    return LongSpecDrafter(dataclasses.replace(SMALL, **changes), shape)


@pytest.mark.parametrize(
    ("shape", "changes", "temperature"),
    [
        pytest.param(TREE, {}, 0.0, id="tree"),
        pytest.param(CHAIN, {}, 0.0, id="chain"),
        pytest.param(TREE, {}, 0.8, id="sampled tree"),
        pytest.param(TREE, {"cross": False}, 0.0, id="window only", marks=pytest.mark.slow),
        pytest.param(TREE, {"window": 4000}, 0.0, id="full window", marks=pytest.mark.slow),
    ],
)
def test_texts_are_those_of_plain_decoding(shape: Any, changes: Any, temperature: float):
    sampling, mine = SamplingParams.make(temperature), drafter(shape, **changes)
    eng = engine(CFG, drafter=mine, drafter_params=layer(mine.cfg), widths=())
    got = eng.generate(prompts(), NEW, sampling=sampling)
    plain = engine(CFG, drafter=NoDrafter(mine.width)).generate(prompts(), NEW, sampling=sampling)
    assert got.tokens == plain.tokens
    np.testing.assert_array_equal(got.stats.drafted, sum(shape) * got.stats.rounds)
    assert got.stats.accepted.sum() > 0


def rounds(
    mine: LongSpecDrafter, given: longspec.Params, count: int, policy: Any = None, cfg: Any = CFG
):
    """State and seeds after some rounds over prompts of several lengths."""
    eng = engine(cfg, drafter=mine, drafter_params=given, policy=policy)
    state, seeds = eng.start(prompts(1, 3, 19, 30), 34, GREEDY)
    policy = decoder.default_policy(cfg) if policy is None else policy
    state = decode_rounds(
        eng.params, cfg, policy, mine, given, state, seeds, GREEDY, jnp.zeros((0,), jnp.int32),
        jnp.asarray(count, jnp.int32), extent=128, rule="greedy",
    )  # fmt: skip
    return state, seeds


def draft_of(
    mine: LongSpecDrafter, given: Any, state: Any, seeds: Any, policy: Any = None, cfg: Any = CFG
):
    context = Context(state.tokens, state.length, seeds, GREEDY, state.limit, None, 128, state.done)
    root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    target = Target(weights(cfg), cfg, policy)
    run = jax.jit(lambda state, cache: mine.propose(given, state, target, cache, root, context))
    return run(state.drafter, state.cache)


@functools.partial(jax.jit, static_argnames="cfg")
def _laws(
    given: longspec.Params, cfg: decoder.Config, tokens: Any, shift: Any, policy: Any, limit: Any
) -> Any:
    step = Step(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], lengths=limit[None])
    target = weights(cfg)
    out = decoder.forward(target, cfg, tokens, step=step, policy=policy, all_hidden=True)
    where = longspec.place(policy, cfg, step)
    entries = longspec.last_layer_entries(target, cfg, out.hidden_states[-2], where)
    embeds = longspec.embed(target, cfg, tokens, where)
    hidden = longspec.forward(given, SMALL, cfg, embeds, where, entries, shift)
    return jax.nn.log_softmax(decoder.unembed(target, cfg, hidden[0]))


def law_after(
    given: longspec.Params, text: list[int], shift: int, policy: Any, limit: Any, cfg: Any
) -> np.ndarray:
    """Log-law after a text by the training forward, the newest ``shift`` entries hidden."""
    padded = np.zeros((1, 64), np.int32)  # padding comes last, where no token sees it
    padded[0, : len(text)] = text
    laws = _laws(given, cfg, jnp.asarray(padded), shift, policy, limit)
    return np.asarray(laws)[len(text) - 1]


def assert_beam(draft: Draft, row: int, text: list[int], shape: Any, laws: Any) -> None:
    """The tree is the beam that laws of whole texts give, level by level."""
    tokens, parent = np.asarray(draft.tokens[row]), np.asarray(draft.parent[row])
    assert tokens[0] == text[-1] and parent[0] == -1
    level, start = {0: ([], 0.0)}, 1
    for depth, count in enumerate(shape, 1):
        nodes = list(level)
        every = np.stack([level[n][1] + laws([*text, *level[n][0]], depth) for n in nodes])
        best = np.sort(every.reshape(-1))[::-1][:count]
        below = {}
        for i, node in enumerate(range(start, start + count)):
            path, score = level[int(parent[node])]
            own = every[nodes.index(int(parent[node])), tokens[node]]
            np.testing.assert_allclose(own, best[i], atol=1e-4)
            assert own <= score
            below[node] = ([*path, int(tokens[node])], float(own))
        level, start = below, start + count
    assert len(tokens) == start and bool(draft.valid[row].all())


def policies(name: str) -> tuple[Any, decoder.Config]:
    """A policy, and a model that it is for."""
    if name == "clex":
        return DensePolicy(scheme=clex_scheme()), CFG
    if name == "seqpe":
        return vectors("multi"), config(position="none")
    if name == "alibi":
        return DensePolicy(), config(position="alibi")
    return make_policy(name, CFG), CFG


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        pytest.param("yarn:4", marks=pytest.mark.slow),
        pytest.param("dynamic:1", marks=pytest.mark.slow),
        "dual_chunk:16:4",
        "clex",
        "seqpe",
        pytest.param("alibi", marks=pytest.mark.slow),
    ],
)
def test_the_tree_is_the_beam_of_passes_over_whole_texts(name: str):
    """After rounds in which the ring of 7 + 4 slots went round, for rows of several lengths.

    So what a step of decoding computes is the training forward: step i sees the target's entries
    up to i tokens back, as its policy sees them, and of the window what a pass over the whole text
    sees.
    """
    policy, cfg = policies(name)
    mine, given = drafter(), layer(target=cfg)
    state, seeds = rounds(mine, given, 6, policy, cfg)
    assert int(state.length.max()) > 32 and len(set(np.asarray(state.length).tolist())) > 1
    draft, after, cache = draft_of(mine, given, state, seeds, policy, cfg)
    for row in (0, 3):
        text = np.asarray(state.tokens[row, : int(state.length[row])]).tolist()
        about = policy, state.limit[row], cfg
        laws = lambda text, shift, about=about: law_after(given, text, shift, *about)
        assert_beam(draft, row, text, TREE, laws)
    # The target's cache is read, and nothing of a draft stays in the ring.
    jax.tree.map(np.testing.assert_array_equal, cache, state.cache)
    held = np.sort(np.asarray(after.ring.positions), axis=1)
    for row, length in enumerate(np.asarray(state.length)):
        want = np.arange(max(0, length - after.ring.slots), length)
        np.testing.assert_array_equal(held[row][held[row] >= 0][-SMALL.window :], want[-7:])


def test_nothing_uncommitted_in_the_targets_cache_is_seen():
    mine, given = drafter(), layer()
    state, seeds = rounds(mine, given, 2)
    want, _, _ = draft_of(mine, given, state, seeds)
    slots = jnp.arange(state.cache.capacity)[None] >= state.cache.length[:, None]
    stale = jax.tree.map(lambda x: jnp.where(slots[:, None, :, None], 1e4, x), state.cache.layers)
    spoilt = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=stale))
    got, _, _ = draft_of(mine, given, spoilt, seeds)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    earlier = dataclasses.replace(state.cache, layers=jax.tree.map(lambda x: -x, stale))
    moved = dataclasses.replace(state, cache=earlier)
    assert np.any(np.asarray(draft_of(mine, given, moved, seeds)[0].tokens) != want.tokens)


def test_feeding_accepted_tokens_again_is_compacting_their_entries():
    """What a round's commit leaves is what a pass over the accepted tokens would write."""
    mine, given = drafter(), layer()
    state, _ = rounds(mine, given, 6)
    assert int(state.stats.accepted.sum()) > 0
    length = state.cache.length
    back = state.cache.up_to(jnp.maximum(length - 9, 1))
    kept = length - back.length
    index = back.length[:, None] + jnp.arange(9, dtype=jnp.int32)[None]
    tokens = jnp.take_along_axis(state.tokens, index, axis=1)
    again, _ = prefill_chunk(
        weights(CFG), CFG, decoder.default_policy(CFG), jax.tree.map(jnp.array, back), tokens, kept,
        None, extent=128, outputs=frozenset(),
    )  # fmt: skip
    np.testing.assert_array_equal(again.length, length)
    seen = (jnp.arange(again.capacity)[None] < length[:, None])[:, None, :, None]
    for a, b in zip(
        jax.tree.leaves(again.layers), jax.tree.leaves(state.cache.layers), strict=True
    ):
        np.testing.assert_allclose(jnp.where(seen, a, 0), jnp.where(seen, b, 0), atol=1e-4)


def test_the_drafters_bytes_do_not_depend_on_the_text():
    mine, given = drafter(), layer()
    eng = engine(CFG, drafter=mine, drafter_params=given)
    sizes = {
        eng.start([[1, 2, 3]], 40, GREEDY, capacity=capacity)[0].drafter.ring.nbytes
        for capacity in (64, 256, 2048)
    }
    heads = 2 * CFG.num_kv_heads * CFG.head_dim
    assert sizes == {4 * (SMALL.window + len(TREE) + 1) * (heads + 1)}


@pytest.mark.slow
def test_over_a_mesh_the_texts_are_the_same():
    """Rows, heads and the slots of the target's cache divided between eight devices."""
    eng = engine(CFG, drafter=drafter(), drafter_params=layer(), widths=())
    mesh = make_mesh("data=2,tensor=2,context=2", jax.devices()[:8])
    over = shard_engine(eng, mesh).generate(prompts(), 8)
    assert over.tokens == eng.generate(prompts(), 8).tokens


# Sampling, by the rule of fixed candidate sets.
TINY = config(vocab_size=4, num_layers=1, hidden_size=8, init_stddev=1.0, max_length=16)


@pytest.mark.parametrize(
    "shape",
    [pytest.param((2, 3), id="tree"), pytest.param((1, 1), id="chain", marks=pytest.mark.slow)],
)
def test_sampled_text_has_the_targets_law(shape: tuple[int, ...]):
    mine = drafter(shape, window=3)
    assert p_value(TINY, mine, layer(mine.cfg, TINY), SamplingParams.make(0.9)) > 1e-4


# What is refused.
def save(folder: Any, cfg: decoder.Config = CFG) -> str:
    save_drafter(folder, "longspec", SMALL, layer(SMALL, cfg), cfg)
    return str(folder)


def model(**changes: Any) -> Model:
    cfg = config(**changes)
    return Model(weights(cfg), cfg, letters(), "target")


def test_a_saved_layer_is_loaded_by_name(tmp_path: Any):
    name = save(tmp_path / "layer")
    mine, given = make_drafter(f"longspec:{name}", model())
    assert mine == LongSpecDrafter(SMALL, BEAM) and mine.width == 69
    jax.tree.map(np.testing.assert_array_equal, given, layer())
    chain, _ = make_drafter(f"longspec-chain:{name}", model())
    assert isinstance(chain, LongSpecDrafter) and chain.shape == CHAIN
    with pytest.raises(ValueError, match="lacks an argument: write 'longspec:DIR'"):
        check_name("longspec")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "models they were made for"),
        ({"vocab_size": 30}, "models they were made for"),
        ({"head_dim": 16}, "shape"),
        ({"num_kv_heads": 4}, "shape"),
    ],
)
def test_a_layer_of_another_target_is_refused(tmp_path: Any, changes: Any, message: str):
    name = save(tmp_path / "layer")
    with pytest.raises(ValueError, match=message):
        make_drafter(f"longspec:{name}", model(**changes))


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one level"):
        drafter(())
    with pytest.raises(ValueError, match="every level a node"):
        drafter((2, 0))
    with pytest.raises(ValueError, match="a draft of 8 levels does not fit a window of 7"):
        drafter((1,) * 8)
    with pytest.raises(ValueError, match=r"level 1 of a tree .* needs between 1 and 24 nodes"):
        engine(CFG, drafter=drafter((25,)), drafter_params=layer()).generate([[1, 2]], 2)
    eng = engine(CFG, drafter=drafter(), drafter_params=layer())
    with pytest.raises(ValueError, match="the longest text with its draft needs 52 cache slots"):
        eng.start([[1, 2]], 40, GREEDY, capacity=48)


def test_a_policy_that_does_not_lend_its_keys_is_refused():
    eng = engine(CFG, drafter=drafter(), drafter_params=layer(), policy=Closed())
    with pytest.raises(ValueError, match=r"Closed does not say how: .*LendingPolicy"):
        eng.generate([[1, 2, 3]], 4)


@struct.dataclass
class Closed:
    """Dense attention that only attends."""

    own: DensePolicy = DensePolicy()

    def per_layer(self, num_layers: int) -> Any:
        return self.own.per_layer(num_layers)

    def key_width(self, cfg: Any) -> int:
        return self.own.key_width(cfg)

    def prepare(self, cfg: Any, step: Any) -> Any:
        return self.own.prepare(cfg, step)

    def attend(self, *args: Any) -> Any:
        return self.own.attend(*args)
