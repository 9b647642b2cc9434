"""Clover's drafters in the real decoding loop, on tiny models with untrained heads.

A vocabulary of eight tokens makes the untrained heads right often enough that paths of several
tokens are accepted and others rejected.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from inference.drafter import Context, Drafter, NoDrafter, Request, Target, TargetOutputs
from inference.drafters.eagle import EagleDrafter, EagleParams
from inference.drafters.medusa import MedusaDrafter, MedusaParams
from models import clover, decoder, eagle, medusa, params
from models.draft_head import draft_vocabulary
from ops.sampling import SamplingParams
from ops.tree import EAGLE_25, MEDUSA_63, chain_tree, tree_from_paths
from research.speculative.clover.drafter import (
    CloverBudgetDrafter,
    CloverDrafter,
    CloverParams,
)
from tests.inference.models import config, engine, weights

TARGET = config(vocab_size=8, tied=False)
PROMPTS = [[3], [1, 2], [5, 0, 4], [(7 * i) % 8 for i in range(17)]]
NARROW = tree_from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


@functools.cache
def heads(cfg: clover.CloverConfig) -> clover.Params:
    """Untrained heads, away from their symmetric start."""
    start = clover.init_from_target(weights(TARGET), TARGET, cfg, jax.random.key(1))
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(start)))
    leaves, shape = jax.tree.flatten(start)
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(shape, noisy)


def clover_params(cfg: clover.CloverConfig, ids: Any = None) -> CloverParams:
    chosen = None if ids is None else draft_vocabulary(weights(TARGET), TARGET, ids)
    return CloverParams(heads(cfg), chosen)


def medusa_params(cfg: medusa.MedusaConfig, ids: Any = None) -> MedusaParams:
    chosen = None if ids is None else draft_vocabulary(weights(TARGET), TARGET, ids)
    key = jax.random.key(3)
    start = medusa.init_from_target(weights(TARGET), TARGET, cfg, key, chosen)
    return MedusaParams(
        jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), start), chosen
    )


def eagle_params() -> EagleParams:
    return EagleParams(params.init(eagle.specs(eagle.EagleConfig(), TARGET), jax.random.key(4)))


CLOVER2 = clover.CloverConfig(num_heads=5, num_layers=2)
SHARED = medusa.MedusaConfig(num_heads=4, shared_head=True, rank=2)
DRAFTERS: dict[str, tuple[Drafter, Any]] = {
    "clover2": (CloverDrafter(CLOVER2, NARROW), clover_params(CLOVER2)),
    "draft vocabulary": (CloverDrafter(CLOVER2, NARROW), clover_params(CLOVER2, [1, 2, 4, 7])),
    "budget": (CloverBudgetDrafter(clover.CLOVER1, budget=7), clover_params(clover.CLOVER1)),
    "medusa": (
        MedusaDrafter(medusa.MedusaConfig(), NARROW),
        medusa_params(medusa.MedusaConfig()),
    ),
    "medusa shared": (MedusaDrafter(SHARED, NARROW), medusa_params(SHARED, [1, 2, 4, 7])),
    "eagle": (EagleDrafter(eagle.EagleConfig(), NARROW), eagle_params()),
}
SLOW_DRAFTERS: dict[str, tuple[Drafter, Any]] = {
    "clover2, deep tree": (CloverDrafter(CLOVER2), clover_params(CLOVER2)),
    "eagle, deep tree": (EagleDrafter(eagle.EagleConfig()), eagle_params()),
    "clover1": (CloverDrafter(clover.CLOVER1, NARROW), clover_params(clover.CLOVER1)),
}
for _name, _changes in {
    "no layers": {"num_layers": 0},
    "not regressive": {"regressive": False},
}.items():
    _cfg = dataclasses.replace(CLOVER2, **_changes)
    SLOW_DRAFTERS[_name] = (CloverDrafter(_cfg, NARROW), clover_params(_cfg))


@functools.cache
def plain(width: int, temperature: float) -> list[list[int]]:
    """What plain decoding emits at a verification width."""
    sampling = SamplingParams.make(temperature=temperature)
    return engine(TARGET, drafter=NoDrafter(width)).generate(PROMPTS, 24, sampling=sampling).tokens


@pytest.mark.parametrize(
    "name", [*DRAFTERS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_DRAFTERS)]
)
def test_same_text_as_plain_decoding(name: str) -> None:
    drafter, weights_ = (DRAFTERS | SLOW_DRAFTERS)[name]
    target = engine(TARGET, drafter=drafter, drafter_params=weights_)
    result = target.generate(PROMPTS, 24)
    assert result.tokens == plain(drafter.width, 0.0)
    by_depth = result.stats.by_depth.sum(axis=0)
    assert by_depth[1] > 0, "no round accepted two tokens, so the test shows too little"
    assert np.min(result.stats.drafted - result.stats.accepted) > 0
    if name == "clover2":
        # Fixed candidate sets emit the very text of plain sampling with the same seeds.
        sampling = SamplingParams.make(temperature=0.8)
        assert target.generate(PROMPTS, 24, sampling=sampling).tokens == plain(drafter.width, 0.8)


def test_rows_do_not_depend_on_the_batch() -> None:
    drafter, weights_ = DRAFTERS["clover2"]
    target = engine(TARGET, drafter=drafter, drafter_params=weights_)
    together = target.generate(PROMPTS, 24)
    alone = target.generate([PROMPTS[2]], 24, seeds=[2])
    assert alone.tokens[0] == together.tokens[2]
    assert alone.stats.rounds[0] == together.stats.rounds[2]


@pytest.mark.parametrize("name", ["clover2", "eagle"])
def test_pair_cache_equals_recomputation(name: str) -> None:
    """Cached pairs give what one pass over the text gives, also after rejections."""
    drafter, weights_ = DRAFTERS[name]
    target = engine(TARGET, drafter=drafter, drafter_params=weights_)
    state, seeds = target.start(PROMPTS, 24, SamplingParams.make())
    limits = [3, 24, 11, 7]  # rows that finish early stay as they are
    state = state.replace(limit=state.length + jnp.asarray(limits))
    state = target.run(state, seeds, SamplingParams.make(), ())
    view = Target(target.params, TARGET)
    context = Context(state.tokens, state.length, seeds, SamplingParams.make())
    root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)[:, 0]
    _, after, _ = jax.jit(drafter.propose)(
        weights_, state.drafter, view, state.cache, root, context
    )
    np.testing.assert_array_equal(after.cache.length, state.length - 1)
    text = jnp.maximum(state.tokens[:, :64], 0)
    states = jax.jit(_outputs_over_text, static_argnums=0)(name, target.params, weights_, text)
    for row, length in enumerate(state.length.tolist()):
        np.testing.assert_allclose(after.last[row], states[row, length - 2], atol=1e-4)


def _outputs_over_text(name: str, target: Any, weights_: Any, text: jax.Array) -> jax.Array:
    """The drafter's outputs over all pairs of a text, without any cache."""
    out = decoder.forward(target, TARGET, text[:, :-1])
    if name == "clover2":
        embeds = jnp.moveaxis(target.head[:, text[:, 1:]], 0, -1)
        return clover.augment(weights_.heads, CLOVER2, TARGET, out.pre_norm, embeds)[0]
    return eagle.forward(weights_.layer, TARGET, out.hidden, target.embed[text[:, 1:]])[0]


def _propose(drafter: Any, weights_: Any, text: list[int], temperature: float = 0.0) -> Any:
    """One draft after a text, without a loop."""

    def run(target: Any, weights_: Any, tokens: jax.Array) -> Any:
        out = decoder.forward(target, TARGET, tokens[:, :-1])
        view, sampling = Target(target, TARGET), SamplingParams.make(temperature)
        one, length = jnp.zeros((1,), jnp.int32), jnp.asarray([len(text)], jnp.int32)
        request = Request(tokens, length, one, sampling)
        prompt = TargetOutputs(tokens[:, :-1], pre_norm=out.pre_norm, hidden=out.hidden)
        state = drafter.init(weights_, view, request, prompt, 64)
        context = Context(tokens, length, one, sampling)
        return drafter.propose(weights_, state, view, None, tokens[:, -1], context)[0]

    return jax.jit(run)(weights(TARGET), weights_, jnp.asarray([text], jnp.int32))


TEXT = [3, 1, 4, 1, 5]


def test_a_path_of_the_tree_is_the_chain_of_its_tokens() -> None:
    """Forcing the tokens of each path through the heads one by one gives the tree's laws."""
    weights_ = clover_params(CLOVER2)
    draft = _propose(CloverDrafter(CLOVER2, sampled=True), weights_, TEXT, temperature=1.0)
    tokens, target = np.asarray(draft.tokens[0]), weights(TARGET)
    table = target.head.T

    @jax.jit
    def chain(path: jax.Array) -> jax.Array:
        """Logits after each token of a chain; tokens of one length share a program."""
        out = decoder.forward(target, TARGET, jnp.asarray([TEXT[:-1]]))
        embeds = table[jnp.asarray(TEXT[1:])][None]
        state = clover.augment(weights_.heads, CLOVER2, TARGET, out.pre_norm, embeds)[0][0, -1]
        rows = []
        for level in range(1, CLOVER2.num_heads + 1):
            embed = table[path[level - 1]]
            state, hidden = clover.head(weights_.heads, CLOVER2, TARGET, state, embed, level)
            rows.append(decoder.unembed(target, TARGET, hidden))
        return jnp.stack(rows)

    for node in sorted(set(EAGLE_25.parent[1:].tolist())):
        children = np.flatnonzero(EAGLE_25.parent == node)
        path = tokens[np.flatnonzero(EAGLE_25.mask[node])]
        padded = np.zeros(CLOVER2.num_heads, np.int32)
        padded[: len(path)] = path
        law = jax.nn.softmax(chain(jnp.asarray(padded))[len(path) - 1])
        np.testing.assert_allclose(draft.probs[0, node], law, atol=1e-5)
        assert len(set(tokens[children].tolist())) == len(children)


def test_eagle_tree_is_the_chain_of_each_path() -> None:
    """Tree levels over scratch entries give what one causal pass over each path gives."""
    drafter, weights_ = EagleDrafter(eagle.EagleConfig(), NARROW, sampled=True), eagle_params()
    draft = _propose(drafter, weights_, TEXT, temperature=1.0)
    tokens = np.asarray(draft.tokens[0])
    target = weights(TARGET)

    @jax.jit
    def chain(path: jax.Array) -> jax.Array:
        """Logits after the root and after each drafted token of a path."""
        out = decoder.forward(target, TARGET, jnp.asarray([TEXT[:-1]]))
        features, embeds = out.hidden, target.embed[jnp.asarray(TEXT[1:])][None]
        rows = []
        for level in range(NARROW.max_depth):
            last = eagle.forward(weights_.layer, TARGET, features, embeds)[0][:, -1:]
            rows.append(decoder.unembed(target, TARGET, last[0, 0]))
            features = jnp.concatenate([features, last], axis=1)
            embeds = jnp.concatenate([embeds, target.embed[path[level]][None, None]], axis=1)
        return jnp.stack(rows)

    for node in sorted(set(NARROW.parent[1:].tolist())):
        path = tokens[np.flatnonzero(NARROW.mask[node])][1:]
        padded = np.zeros(NARROW.max_depth, np.int32)
        padded[: len(path)] = path
        law = jax.nn.softmax(chain(jnp.asarray(padded))[len(path)])
        np.testing.assert_allclose(draft.probs[0, node], law, atol=1e-5)


def test_fixed_sets_are_the_most_likely_tokens_in_order() -> None:
    weights_ = clover_params(CLOVER2)
    fixed = _propose(CloverDrafter(CLOVER2), weights_, TEXT)
    drawn = _propose(CloverDrafter(CLOVER2, sampled=True), weights_, TEXT, temperature=1.0)
    best = np.argsort(-np.asarray(drawn.probs[0, 0]))[:4]
    np.testing.assert_array_equal(np.asarray(fixed.tokens[0])[1:5], best)


def test_heads_run_on_internal_nodes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    real = clover.head

    def counting(p: Any, cfg: Any, target: Any, state: Any, embeds: Any, level: int) -> Any:
        counted.append(state.shape[1])
        return real(p, cfg, target, state, embeds, level)

    monkeypatch.setattr(clover, "head", counting)
    _propose(CloverDrafter(CLOVER2), clover_params(CLOVER2), TEXT)
    assert sum(counted) == len(set(EAGLE_25.parent[1:].tolist()))


def _first_pairs(tree: Any, draft: Any) -> set[tuple[int, ...]]:
    """The two best children of every node of level 1 that has two."""
    lists = [np.flatnonzero(tree.parent == node) for node in np.flatnonzero(tree.depth == 1)]
    return {tuple(np.asarray(draft.tokens[0])[x[:2]].tolist()) for x in lists if len(x) > 1}


def test_clover_sees_guessed_tokens_and_medusa_does_not() -> None:
    draft = _propose(CloverDrafter(CLOVER2), clover_params(CLOVER2), TEXT)
    assert len(_first_pairs(EAGLE_25, draft)) > 1
    drafter = MedusaDrafter(medusa.MedusaConfig(num_heads=5), EAGLE_25)
    draft = _propose(drafter, medusa_params(drafter.cfg), TEXT)
    assert len(_first_pairs(EAGLE_25, draft)) == 1


def test_budget_is_kept_and_spent_on_the_likely() -> None:
    cfg = clover.CLOVER1
    for budget in (1, 12):
        drafter = CloverBudgetDrafter(cfg, budget=budget, top_p=1.0, ratio=0.0)
        draft = _propose(drafter, clover_params(cfg), TEXT)
        valid, parent = np.asarray(draft.valid[0]), np.asarray(draft.parent[0])
        assert valid.shape == (budget + 1,)
        assert np.all(parent[1:][valid[1:]] < np.arange(1, budget + 1)[valid[1:]])
        pairs = list(
            zip(parent[1:][valid[1:]], np.asarray(draft.tokens[0])[1:][valid[1:]], strict=True)
        )
        assert len(pairs) == len(set(pairs))
    strict = CloverBudgetDrafter(cfg, budget=12, top_p=0.0, ratio=1.0)
    draft = _propose(strict, clover_params(cfg), TEXT)
    # Only the best token of each node passes, so the tree is a chain as deep as there are heads.
    assert int(draft.valid.sum()) == 1 + cfg.num_heads
    assert int(draft.depth.max()) == cfg.num_heads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clover", "eagle"])
def test_sampled_drafts_keep_the_law(name: str) -> None:
    """Chi-square of two sampled tokens against the exact law, with a law that must be rejected."""
    cfg = dataclasses.replace(CLOVER2, num_layers=1)
    tree = tree_from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    drafter, weights_ = {
        "clover": (CloverDrafter(cfg, tree, sampled=True), clover_params(cfg)),
        "eagle": (EagleDrafter(eagle.EagleConfig(), tree, sampled=True), eagle_params()),
    }[name]
    target = engine(TARGET, drafter=drafter, drafter_params=weights_)
    count, prompt, heat = 4096, [2, 6, 1], 1.3
    sampling = SamplingParams.make(temperature=heat, top_p=0.95)
    got = target.generate([prompt] * count, 3, sampling=sampling, seeds=range(count))
    assert got.stats.by_depth.sum(axis=0).min() > 50
    pairs = np.asarray(got.tokens)[:, 1:]  # the second and third token, whose rounds differ
    observed = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    expected = count * _pair_law(prompt, sampling)
    assert _p_value(observed, expected) > 1e-4
    raw = count * _pair_law(prompt, SamplingParams.make(temperature=heat))
    assert _p_value(observed, raw) < 1e-6, "the test has no power against a law without top-p"


def _pair_law(prompt: list[int], sampling: SamplingParams) -> np.ndarray:
    """(64,) exact joint law of the second and third token after a prompt."""
    firsts = np.array([[*prompt, a] for a in range(8)])
    seconds = np.array([[*prompt, a, b] for a in range(8) for b in range(8)])
    laws = []
    for texts in (np.array([prompt]), firsts, seconds):
        out = decoder.forward(weights(TARGET), TARGET, jnp.asarray(texts))
        logits = decoder.unembed(weights(TARGET), TARGET, out.hidden[:, -1])
        laws.append(np.asarray(sampling.warp(logits), np.float64))
    first, second, third = laws[0][0], laws[1], laws[2].reshape(8, 8, 8)
    return np.einsum("a,ab,abc->bc", first, second, third).reshape(-1)


def _p_value(observed: np.ndarray, expected: np.ndarray) -> float:
    order = np.argsort(-expected)
    observed, expected = observed[order], expected[order]
    rare = expected < 5
    cells = [(o, e) for o, e in zip(observed[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0.5 or observed[rare].sum() > 0:
        cells.append((observed[rare].sum(), max(expected[rare].sum(), 1e-9)))
    o, e = np.array(cells).T
    return float(scipy.stats.chi2.sf(((o - e) ** 2 / e).sum(), len(o) - 1))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="prune the tree"):
        CloverDrafter(clover.CLOVER1, chain_tree(5))
    with pytest.raises(ValueError, match="prune the tree"):
        MedusaDrafter(medusa.MedusaConfig(num_heads=3), MEDUSA_63)
    with pytest.raises(ValueError, match="fill the gaps"):
        CloverDrafter(CLOVER2, tree_from_paths([(0,), (2,)]), sampled=True)
    with pytest.raises(ValueError, match="at least 1"):
        CloverBudgetDrafter(CLOVER2, budget=0)
    with pytest.raises(ValueError, match="remove the repeated"):
        draft_vocabulary(weights(TARGET), TARGET, [1, 1])
    with pytest.raises(ValueError, match="narrower tree"):
        _propose(CloverDrafter(CLOVER2), clover_params(CLOVER2, [1, 2, 4]), TEXT)
