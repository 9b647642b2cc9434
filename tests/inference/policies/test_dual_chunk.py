import functools
import unittest.mock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import init_cache
from inference.drafter import Draft
from inference.drafters.lookup import LookupDrafter
from inference.loop import decode_rounds, prefill_chunk, score_draft
from inference.policies import dual_chunk
from inference.policies.dual_chunk import DualChunkPolicy, temperature
from models import decoder
from models.attention import Step
from models.positions import RopeScaling
from research.speculative.token_recycling.drafter import TokenRecycling
from tests.inference.models import ROUNDING, VOCAB, config, engine, prompts, weights

CHUNK, LOCAL, TRAINED = 24, 8, 3
LENGTHS = (1, 17, 45, 62)
NEW = 16
POLICIES = {
    "plain": DualChunkPolicy(CHUNK, LOCAL),
    "split": DualChunkPolicy(CHUNK, LOCAL, TRAINED),
    "exact": DualChunkPolicy(CHUNK, LOCAL, TRAINED, True),
    "odd": DualChunkPolicy(20, 7),
}


@functools.cache
def generated(name: str) -> list[list[int]]:
    """Greedy continuations of ragged prompts under a policy, prefilled by 16."""
    return engine(policy=POLICIES[name]).generate(prompts(*LENGTHS), NEW).tokens


@jax.jit
def reference(policy: Any, tokens: jax.Array, n: jax.Array) -> jax.Array:
    """Logits of one pass without a cache, the length that sets a token's temperature being n."""
    with unittest.mock.patch.object(dual_chunk, "text_lengths", lambda step: n):
        out = decoder.forward(weights(config()), config(), tokens, policy=policy)
    return decoder.unembed(weights(config()), config(), out.hidden)[0]


def logits_of(name: str, text: list[int], prompt: int) -> np.ndarray:
    """Logits of a text whose first ``prompt`` tokens were prefilled and the rest decoded."""
    tokens = jnp.asarray([text + [0] * (80 - len(text))])
    i = jnp.arange(80)
    n = jnp.where(i < prompt, prompt, i + 1)[None]
    return np.asarray(reference(POLICIES[name], tokens, n))[: len(text)]


@pytest.mark.parametrize("name", POLICIES)
def test_prefill_in_pieces_and_decoding_equal_one_pass(name):
    for prompt, new in zip(prompts(*LENGTHS), generated(name), strict=True):
        logits = logits_of(name, prompt + new, len(prompt))[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.asarray(new)[:, None], axis=1)[:, 0]
        assert np.all(chosen >= logits.max(axis=1) - ROUNDING)


def test_policies_differ_where_they_should():
    text = prompts(70)[0]
    logits = [logits_of(name, text, 50) for name in POLICIES]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert np.abs(a - b)[60:].max() > 10 * ROUNDING
    dense = engine().generate(prompts(*LENGTHS), NEW).tokens
    assert generated("plain") != dense


def test_texts_within_the_stride_are_read_as_by_the_dense_policy():
    wide = engine(policy=DualChunkPolicy(100, 10)).generate(prompts(*LENGTHS), NEW)
    assert wide.tokens == engine().generate(prompts(*LENGTHS), NEW).tokens


@pytest.mark.parametrize("size", [7, 64])
def test_any_split_of_the_prompt_gives_the_same_text(size):
    got = engine(policy=POLICIES["split"], prefill_size=size).generate(prompts(*LENGTHS), NEW)
    assert got.tokens == generated("split")


def test_a_row_of_a_batch_gets_what_it_gets_alone():
    for row in (1, 3):
        alone = engine(policy=POLICIES["split"]).generate([prompts(*LENGTHS)[row]], NEW)
        assert alone.tokens == [generated("split")[row]]


@pytest.mark.parametrize(
    ("name", "kind"), [("exact", "lookup"), ("split", "recycling"), ("odd", "recycling")]
)
def test_drafting_changes_nothing(name, kind):
    drafter: Any = LookupDrafter(4, (2, 1)) if kind == "lookup" else TokenRecycling()
    matrix = np.random.default_rng(5).integers(0, VOCAB, (VOCAB, 8))
    got = engine(
        policy=POLICIES[name],
        drafter=drafter,
        drafter_params=None if kind == "lookup" else jnp.asarray(matrix, jnp.int32),
    ).generate(prompts(*LENGTHS), NEW)
    assert got.tokens == generated(name)
    assert np.sum(got.stats.accepted) > 0


def test_drafted_nodes_see_their_path_across_the_border_of_a_chunk():
    cfg, name, text = config(), "split", prompts(29)[0]
    parent = [-1, 0, 0, 1, 1, 2, 3, 3, 6, 8]
    drafted = prompts(len(parent), seed=3)[0]
    paths = [[0]]
    for node, up in enumerate(parent[1:], 1):
        paths.append([*paths[up], node])
    tree = np.zeros((len(parent), len(parent)), bool)
    for node, path in enumerate(paths):
        tree[node, path] = True
    depth = jnp.asarray([[len(path) - 1 for path in paths]])
    assert 29 + int(depth.max()) >= 32
    cache = init_cache(cfg, 1, 64)
    cache, _ = prefill_chunk(
        weights(cfg), cfg, POLICIES[name], cache, jnp.asarray([text]), jnp.asarray([29]),
        jnp.asarray([64]), extent=64, outputs=frozenset(), prompt_lengths=jnp.asarray([30]),
    )  # fmt: skip
    draft = Draft(
        tokens=jnp.asarray([drafted]), parent=jnp.asarray([parent]), depth=depth,
        mask=jnp.asarray(tree[None]), valid=jnp.ones((1, len(parent)), bool),
    )  # fmt: skip
    _, out = jax.jit(score_draft, static_argnums=(1, 6, 7))(
        weights(cfg), cfg, POLICIES[name], cache, draft, jnp.asarray([64]), 64, frozenset()
    )
    got = decoder.unembed(weights(cfg), cfg, out.hidden)[0]
    for node, path in enumerate(paths):
        want = logits_of(name, text + [drafted[i] for i in path], 30)[-1]
        np.testing.assert_allclose(got[node], want, atol=ROUNDING)


def test_cached_keys_depend_only_on_the_place_in_the_chunk_and_the_time_of_writing():
    cfg, text = config(num_layers=1), jnp.asarray(prompts(48))
    count, length = jnp.asarray([48]), jnp.asarray([64])

    def keys(policy: DualChunkPolicy, prompt: int, tokens: jax.Array = text) -> np.ndarray:
        cache = init_cache(cfg, 1, 48)
        cache, _ = prefill_chunk(
            weights(cfg), cfg, policy, cache, tokens, count, length, extent=48,
            outputs=frozenset(), prompt_lengths=jnp.asarray([prompt]),
        )  # fmt: skip
        return np.asarray(cache.layers[0].k)

    exact = keys(POLICIES["exact"], 48)
    np.testing.assert_array_equal(keys(POLICIES["exact"], 10_000), exact)
    for n in (48, 10_000):
        m = float(temperature(jnp.asarray(n), jnp.asarray(TRAINED)))
        np.testing.assert_allclose(keys(POLICIES["split"], n), exact * m, rtol=1e-5, atol=1e-6)
    same = keys(POLICIES["plain"], 48, jnp.zeros_like(text))
    np.testing.assert_array_equal(same[:, :, :16], same[:, :, 16:32])


def test_temperature():
    n = jnp.asarray([1, 100, 200, 100 * 2**10])
    got = np.asarray(temperature(n, jnp.asarray(100)))
    want = np.maximum(1, 0.1 * np.log(np.asarray(n) / 100) + 1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.all(got[:2] == 1)
    np.testing.assert_array_equal(temperature(n, jnp.asarray(0)), np.ones(4))


def test_temperature_multiplies_logits_by_its_square():
    step = Step(jnp.asarray([[30]]), lengths=jnp.asarray([400]))
    x = jnp.ones((1, 1, 1, 8))
    products = {}
    for name in ("plain", "split", "exact"):
        shared = POLICIES[name].prepare(config(), step)
        products[name] = jnp.sum(shared.rotate_q(x) * shared.rotate_k(x)[None], axis=-1)
    m = temperature(jnp.asarray(400), jnp.asarray(TRAINED))
    np.testing.assert_allclose(products["split"], products["plain"] * m**2, rtol=1e-5)
    np.testing.assert_allclose(products["exact"], products["split"], rtol=1e-5)


def test_another_temperature_is_the_same_program():
    text = prompts(40)
    engine(policy=DualChunkPolicy(CHUNK, LOCAL, 20)).generate(text, 4)
    sizes = [f._cache_size() for f in (decode_rounds, prefill_chunk)]
    engine(policy=DualChunkPolicy(CHUNK, LOCAL, 11, True)).generate(text, 4)
    assert [f._cache_size() for f in (decode_rounds, prefill_chunk)] == sizes


def test_packed_documents_are_read_apart():
    cfg, policy = config(), POLICIES["plain"]
    a, b = prompts(40, 22)
    tokens = jnp.asarray([a + b])
    positions = jnp.asarray([[*range(40), *range(22)]])
    segments = jnp.asarray([[0] * 40 + [1] * 22])
    run = jax.jit(
        lambda tokens, step: decoder.forward(weights(cfg), cfg, tokens, step=step, policy=policy)
    )
    packed = run(tokens, Step(positions, segments)).hidden
    swapped = run(
        jnp.asarray([b + a]),
        Step(jnp.asarray([[*range(22), *range(40)]]), jnp.asarray([[0] * 22 + [1] * 40])),
    ).hidden
    np.testing.assert_allclose(packed[:, :40], swapped[:, 22:], atol=1e-5)
    np.testing.assert_allclose(packed[:, 40:], swapped[:, :22], atol=1e-5)
    alone = logits_of("plain", b, 1)
    hidden = decoder.unembed(weights(cfg), cfg, packed[0, 40:])
    np.testing.assert_allclose(hidden, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DualChunkPolicy(8, 8), "0 <= local_size < chunk_size"),
        (lambda: DualChunkPolicy(8, 2, -1), "give the trained length, or 0"),
        (lambda: _prepare(config(position="learned")), "needs rotary positions"),
        (lambda: _prepare(config(rope=RopeScaling("dynamic"))), "do not depend on the length"),
        (lambda: _prepare(config(windows=(4, None))), "sliding windows"),
        (lambda: _prepare(config(), causal=False), "is causal"),
        (lambda: _prepare(config(), mode="prefill", segments=jnp.zeros((1, 3))), "mode 'train'"),
    ],
)
def test_what_it_is_not_defined_for_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def _prepare(cfg: decoder.Config, **step: Any) -> Any:
    return POLICIES["plain"].prepare(cfg, Step(jnp.arange(3)[None], **step))
