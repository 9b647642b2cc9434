"""SWIFT against the official skip logic, tree buffers and a replayed search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import Target
from inference.drafters.scratch import run_scratch
from models import decoder
from models.layers import MLP, Attention, Layer, Linear, Norm
from ops.tree import tree_from_parents
from research.speculative.swift.comb import Comb, build_comb, level_widths
from research.speculative.swift.matchness import matchness, window_logits
from research.speculative.swift.search import (
    Proposal,
    SkipSet,
    start_search,
    uniform_set,
    update_search,
    vector_to_set,
)
from tests.goldens import golden
from tests.inference.models import prefilled

THRESHOLDS = (0.95, 0.8, 0.5)
WIDTHS = {"greedy": (3, 5, 8, 10), "sampling": (1, 3, 5, 10)}


@functools.partial(jax.jit, static_argnums=(2, 3))
def comb_of(confidence: jax.Array, steps: jax.Array, widths: tuple[int, ...], size: int) -> Comb:
    """The comb of one padded chain whose candidates are their own ranks."""
    shape = (1, confidence.shape[0], max(widths))
    ranks = jnp.broadcast_to(jnp.arange(shape[2])[None, None], shape)
    levels = level_widths(confidence[None], THRESHOLDS, widths)
    return build_comb(ranks, jnp.ones(shape, bool), levels, steps, size)


def comb_paths(confidence: np.ndarray, widths: tuple[int, ...]):
    """The comb of one chain: its arrays, and every node's path of ranks."""
    steps = confidence.shape[0]
    longest = max(8, steps)
    size = 1 + longest * max(widths)
    padded = jnp.asarray(np.pad(confidence, (0, longest - steps)))
    comb = comb_of(padded, jnp.asarray([steps]), widths, size)
    parent, rank = np.asarray(comb.parent[0]), np.asarray(comb.tokens[0])
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, size):
        if parent[node] >= 0:
            paths[node] = (*paths[int(parent[node])], int(rank[node]))
    return comb, paths


def cases(data: dict[str, np.ndarray]) -> list[str]:
    return sorted({name.split("_")[0] for name in data})


@pytest.mark.parametrize("kind", WIDTHS)
def test_trees_by_confidence(kind):
    data = golden("swift", "confidence_tree")
    for case in cases(data):
        _, paths = comb_paths(data[f"{case}_confidence"], WIDTHS[kind])
        want = [tuple(r for r in row if r >= 0) for row in data[f"{case}_{kind}_choices"].tolist()]
        assert [paths[node] for node in sorted(paths)][1:] == want


def test_buffers_of_trees():
    data = golden("swift", "confidence_tree")
    for case in cases(data):
        comb, paths = comb_paths(data[f"{case}_confidence"], WIDTHS["greedy"])
        tree, n = tree_from_parents(comb.parent), len(paths)
        assert int(tree.valid.sum()) == n
        np.testing.assert_array_equal(tree.mask[0, :n, :n], data[f"{case}_greedy_attn_mask"] > 0)
        np.testing.assert_array_equal(tree.depth[0, :n], data[f"{case}_greedy_position_ids"])
        flat = [path[-1] + 10 * (len(path) - 1) + 1 if path else 0 for path in paths.values()]
        np.testing.assert_array_equal(flat, data[f"{case}_greedy_tree_indices"])
        number = {path: node for node, path in paths.items()}
        inner = {path[:-1] for path in paths.values() if path}
        leaves = sorted(path for path in number if path not in inner)
        rows = data[f"{case}_greedy_retrieve_indices"].tolist()
        assert rows == [
            [number[leaf[:d]] for d in range(len(leaf) + 1)] + [-1] * (len(rows[0]) - len(leaf) - 1)
            for leaf in leaves
        ]


def model(data: dict[str, np.ndarray]) -> tuple[decoder.Params, decoder.Config]:
    """The golden's model; head counts, widths of heads, base and epsilon are its README's."""
    width = data["W.norm.weight"].shape[0]
    layers = sum(name.endswith("input_layernorm.weight") for name in data)
    cfg = decoder.Config(
        vocab_size=data["W.lm_head.weight"].shape[0], hidden_size=width, num_layers=layers,
        num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=data["W.layers.0.mlp.up_proj.weight"].shape[0], max_length=128,
        norm_eps=1e-6, tied=False,
    )  # fmt: skip

    def linear(name: str) -> Linear:
        return Linear(jnp.asarray(data[f"W.{name}.weight"].T))

    def norm(name: str) -> Norm:
        return Norm(jnp.asarray(data[f"W.{name}.weight"]))

    segments = []
    for i in range(layers):
        at = f"layers.{i}"
        attention = Attention(*(linear(f"{at}.self_attn.{x}_proj") for x in "qkvo"))
        mlp = MLP(*(linear(f"{at}.mlp.{x}_proj") for x in ("up", "down", "gate")))
        norms = [norm(f"{at}.{x}_layernorm") for x in ("input", "post_attention")]
        layer = Layer(norms[0], attention, norms[1], mlp)
        segments.append(decoder.Segment(layer, count=1, stacked=False))
    return decoder.Params(
        embed=jnp.asarray(data["W.embed_tokens.weight"]),
        segments=tuple(segments),
        final_norm=norm("norm"),
        head=jnp.asarray(data["W.lm_head.weight"].T),
    ), cfg


@pytest.fixture(scope="module")
def skipped():
    """Data, target, the cache of the prompt and text, and where the window begins."""
    data = golden("swift", "layer_skip_matchness")
    params, cfg = model(data)
    text = [*data["prompt"].tolist(), *data["generated"].tolist()]
    cache = prefilled(params, cfg, [text], capacity=64)
    tokens = jnp.asarray([text + [0] * (64 - len(text))], jnp.int32)
    return data, Target(params, cfg, decoder.default_policy(cfg)), cache, tokens


def test_matchness_of_skip_sets(skipped):
    data, target, cache, tokens = skipped
    begin, window = jnp.asarray([len(data["prompt"])]), int(data["context_window"]) + 1
    limit = jnp.asarray([64])
    for i, (attention, mlp) in enumerate(zip(data["attn_skip"], data["mlp_skip"], strict=True)):
        skip = SkipSet(jnp.asarray(attention > 0), jnp.asarray(mlp > 0))
        logits = window_logits(target, cache, tokens, begin, limit, skip, window, 64)
        np.testing.assert_allclose(logits[0], data["draft_logits"][i], atol=1e-3)
        np.testing.assert_array_equal(logits[0].argmax(-1), data["draft_argmax"][i])
        found = matchness(target, cache, tokens, begin, limit, skip, window, 64)
        np.testing.assert_allclose(found, data["matchness"][i : i + 1], atol=1e-7)
    nothing = (data["attn_skip"].sum(1) + data["mlp_skip"].sum(1)) == 0
    assert np.all(data["matchness"][nothing] == 1) and nothing.any()


def test_the_full_model_gives_the_prompts_logits(skipped):
    data, target, cache, _ = skipped
    prompt = jnp.asarray(data["prompt"][None, 1:])
    out, _ = run_scratch(target, cache.up_to(jnp.asarray([1])), prompt, None, 64)
    logits = decoder.unembed(target.params, target.cfg, out.hidden)
    np.testing.assert_allclose(logits[0], data["prompt_logits_full"][1:], atol=1e-3)


def test_the_search_replays():
    data = golden("swift", "optimization_trace")
    layers, count = int(data["num_layers"]), int(data["num_skip"])
    search = start_search(uniform_set(layers), 100)
    assert np.flatnonzero(search.skip.attention).tolist() == list(range(1, layers - 1, 2))
    suggestions = iter(data["bayes_suggestions"])
    for t, score in enumerate(data["score"]):
        skip = SkipSet(*(jnp.asarray(data[f"proposal_{x}"][t] > 0) for x in ("attn", "mlp")))
        assert bool(data["is_bayes"][t]) == ((t + 1) % int(data["bayes_interval"]) == 0)
        parts = [np.asarray(x)[1:-1] for x in (skip.attention, skip.mlp)]
        vector = np.concatenate(parts).astype(np.float32)
        if data["is_bayes"][t]:
            vector = next(suggestions)
        found = vector_to_set(vector, count)
        np.testing.assert_array_equal(found.attention, skip.attention)
        np.testing.assert_array_equal(found.mlp, skip.mlp)
        search = update_search(
            search, Proposal(skip, vector), score, data["max_score"], data["max_tolerance_iter"]
        )
        np.testing.assert_array_equal(search.best_score, data["best_score"][t])
        np.testing.assert_array_equal(search.skip.attention, data["current_attn"][t] > 0)
        np.testing.assert_array_equal(search.skip.mlp, data["current_mlp"][t] > 0)
        assert int(search.tolerance) == data["tolerance"][t]
        assert bool(search.active) == bool(data["still_optimizing"][t])
