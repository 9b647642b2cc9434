"""EAGLE's drafter and EAGLE-2's tree against the official drafter's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from inference.cache import init_cache
from inference.drafter import Context, Draft, Request, Target, TargetOutputs
from inference.drafters.eagle import EagleParams
from inference.drafters.eagle_tree import EagleTreeDrafter
from inference.drafters.pairs import PairState
from models import decoder, eagle
from models.attention import Step
from models.layers import MLP, Attention, Linear, Norm
from ops.sampling import SamplingParams
from ops.verify import verify
from research.speculative.clover.objective import eagle_loss
from tests.goldens import golden


def _model(g: dict[str, np.ndarray]) -> tuple[eagle.Params, decoder.Config]:
    vocab, width, heads, kv_heads, inner = (int(x) for x in g["cfg"][:5])
    cfg = decoder.Config(
        vocab, width, 1, heads, kv_heads, width // heads, inner, max_length=64, norm_eps=1e-6
    )

    def linear(name: str) -> Linear:
        return Linear(jnp.asarray(g[f"w_layers_0_{name}_proj_weight"].T))

    attn = Attention(*(linear(f"self_attn_{x}") for x in "qkvo"))
    mlp = MLP(*(linear(f"mlp_{x}") for x in ("up", "down", "gate")))
    fc = Linear(jnp.asarray(g["w_fc_weight"].T), jnp.asarray(g["w_fc_bias"]))
    norm = Norm(jnp.asarray(g["w_layers_0_post_attention_layernorm_weight"]))
    return eagle.Params(fc, attn, norm, mlp), cfg


def _embeds(g: dict[str, np.ndarray], ids: np.ndarray) -> jax.Array:
    return jnp.asarray(g["w_embed_tokens_weight"][ids])


def test_forward() -> None:
    g = golden("eagle", "drafter")
    params, cfg = _model(g)
    hidden = jnp.asarray(g["hidden_states"])
    out, _ = eagle.forward(params, cfg, hidden, _embeds(g, g["input_ids"]))
    real = g["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(out)[real], g["out_hidden"][real], atol=1e-4)


def test_cached_continuation() -> None:
    g = golden("eagle", "drafter")
    params, cfg = _model(g)
    cache = init_cache(eagle.layer_config(cfg), 1, g["step_cache_k"].shape[2])
    hidden, ids = g["hidden_states"][:1], g["input_ids"][:1]
    out = None
    for states, tokens in ((hidden, ids), (g["step_hidden"], g["step_input_ids"])):
        size = tokens.shape[1]
        positions = cache.next_position[:, None] + jnp.arange(size)[None]
        cache, start = cache.append_scratch(positions)
        step = Step(positions=positions, start=start, slot_positions=cache.positions)
        embeds = _embeds(g, tokens)
        out, layers = eagle.forward(params, cfg, jnp.asarray(states), embeds, step, cache.layers)
        cache = dataclasses.replace(cache, layers=layers).commit(None, jnp.asarray([size]))
    np.testing.assert_allclose(out, g["step_out_hidden"], atol=1e-4)
    np.testing.assert_allclose(cache.layers[0].k, g["step_cache_k"], atol=1e-4)
    np.testing.assert_allclose(cache.layers[0].v, g["step_cache_v"], atol=1e-4)


def test_losses_and_gradients() -> None:
    g = golden("eagle", "drafter")
    params, cfg = _model(g)
    hidden, embeds = jnp.asarray(g["hidden_states"]), _embeds(g, g["input_ids"])
    target, rows = jnp.asarray(g["target_hidden"]), jnp.asarray(g["head_weight"])
    mask = jnp.asarray(g["loss_mask"], jnp.float32)

    def loss(params: eagle.Params) -> tuple[jax.Array, jax.Array]:
        out, _ = eagle.forward(params, cfg, hidden, embeds)
        return eagle_loss(eagle.EagleConfig(), out, target, rows, mask)

    (total, parts), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(total, g["loss"], rtol=1e-4)
    np.testing.assert_allclose(parts, [g["vloss"], g["ploss"]], rtol=1e-4)
    for slope, name in ((slopes.fc.w.T, "grad_fc_weight"), (slopes.fc.b, "grad_fc_bias")):
        np.testing.assert_allclose(slope, g[name], atol=1e-4 * np.abs(g[name]).max())


def _drafter(g: dict[str, np.ndarray]) -> tuple[EagleTreeDrafter, EagleParams, Target]:
    """The tree's sizes, the layer, and a target of which only embedding and head are read."""
    layer, cfg = _model(g)
    total, depth, top_k = (int(x) for x in g["cfg"][7:10])
    drafter = EagleTreeDrafter(eagle.EagleConfig(), total=total - 1, depth=depth, top_k=top_k)
    norm = Norm(jnp.ones((cfg.hidden_size,)))
    embed, head = jnp.asarray(g["w_embed_tokens_weight"]), jnp.asarray(g["head_weight"].T)
    target = decoder.Params(embed, (), norm, head)
    return drafter, EagleParams(layer), Target(target, dataclasses.replace(cfg, tied=False))


def _assert_tree(draft: Draft, g: dict[str, np.ndarray], name: str) -> None:
    np.testing.assert_array_equal(draft.tokens, g[f"{name}_draft_tokens"])
    np.testing.assert_array_equal(draft.mask[0], g[f"{name}_tree_mask"] == 1)
    np.testing.assert_array_equal(draft.depth[0], g[f"{name}_tree_position_ids"])
    mask = np.asarray(draft.mask[0])
    leaves = set(range(len(mask))) - set(np.asarray(draft.parent[0]).tolist())
    lines = {tuple(np.flatnonzero(mask[leaf]).tolist()) for leaf in leaves}
    paths = {tuple(x for x in row if x >= 0) for row in g[f"{name}_retrieve_indices"].tolist()}
    assert lines == paths


def test_trees_of_two_rounds() -> None:
    g = golden("eagle", "tree")
    drafter, params, target = _drafter(g)
    greedy = SamplingParams.make()
    first, second = jnp.asarray(g["r1_seq"], jnp.int32), jnp.asarray(g["r2_seq"], jnp.int32)
    one = jnp.zeros((1,), jnp.int32)

    def propose(state: PairState, text: jax.Array) -> tuple[Draft, PairState]:
        context = Context(text, one + text.shape[1], one, greedy)
        draft, state, _ = jax.jit(
            lambda state: drafter.propose(params, state, target, None, text[:, -1], context)
        )(state)
        return draft, state

    request = Request(first, one + first.shape[1], one, greedy)
    prompt = TargetOutputs(first[:, :-1], hidden=jnp.asarray(g["r1_hidden"]))
    draft, state = propose(drafter.init(params, target, request, prompt, 64), first)
    _assert_tree(draft, g, "r1")
    assert int(state.cache.length[0]) == int(g["r1_kv_len"])
    new, space = g["r2_hidden"].shape[1], state.hidden.shape[1]
    state = dataclasses.replace(
        state,
        hidden=jnp.pad(jnp.asarray(g["r2_hidden"]), ((0, 0), (0, space - new), (0, 0))),
        tokens=jnp.pad(second[:, -new:], ((0, 0), (0, space - new))),
        count=one + new,
    )
    draft, state = propose(state, second)
    _assert_tree(draft, g, "r2")
    assert int(state.cache.length[0]) == int(g["r2_kv_len"])


def test_greedy_verification() -> None:
    g = golden("eagle", "tree")
    mask = g["r1_tree_mask"] == 1
    depth = mask.sum(1) - 1
    parent = [-1, *(int(max(np.flatnonzero(row)[:-1])) for row in mask[1:])]
    assert all(depth[p] == d - 1 for p, d in zip(parent[1:], depth[1:], strict=True))
    one = jnp.zeros((1,), jnp.int32)
    verdict = verify(
        "deterministic",
        tokens=jnp.asarray(g["r1_draft_tokens"], jnp.int32),
        parent=jnp.asarray([parent], jnp.int32),
        valid=jnp.ones((1, len(parent)), bool),
        target_logits=jnp.asarray(g["verify_target_logits"])[None],
        params=SamplingParams.make(),
        seeds=one,
        index=one,
    )
    assert int(verdict.num_accepted[0]) == int(g["verify_accept_length"])
    assert int(verdict.next_token[0]) == int(g["verify_next_token"])
    path = np.asarray(verdict.path[0])
    kept = path[: int(verdict.num_accepted[0]) + 1]
    best = g["verify_candidates"][int(g["verify_best_candidate"])][: len(kept)]
    np.testing.assert_array_equal(g["r1_draft_tokens"][0, kept], best)
