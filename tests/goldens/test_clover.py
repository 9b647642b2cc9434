"""Clover-2 and Medusa against the official codes' numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.drafter import Context
from inference.drafters.levels import draft_levels
from models import clover, decoder, medusa
from models.layers import MLP, Attention, Layer, Linear, Norm
from ops.sampling import SamplingParams
from ops.tree import tree_from_paths
from research.speculative.clover.objective import clover_loss, medusa_loss
from tests.goldens import golden

clover_golden = functools.partial(golden, "clover")


def _linear(g: dict[str, np.ndarray], name: str) -> Linear:
    bias = g.get(f"W.{name}.bias")
    return Linear(jnp.asarray(g[f"W.{name}.weight"].T), None if bias is None else jnp.asarray(bias))


def _norm(g: dict[str, np.ndarray], name: str) -> Norm:
    return Norm(jnp.asarray(g[f"W.{name}.weight"]))


def _attention_decoder(g: dict[str, np.ndarray], name: str) -> clover.AttentionDecoder:
    parts = [_linear(g, f"{name}.{part}") for part in "qkv"]
    return clover.AttentionDecoder(_norm(g, f"{name}.input_layernorm"), *parts)


def _layer(g: dict[str, np.ndarray], i: int) -> Layer:
    attn = [_linear(g, f"layers.{i}.self_attn.{x}_proj") for x in "qkvo"]
    up, down, gate = (_linear(g, f"layers.{i}.mlp.{x}_proj") for x in ("up", "down", "gate"))
    norms = [_norm(g, f"layers.{i}.{x}_layernorm") for x in ("input", "post_attention")]
    return Layer(norms[0], Attention(*attn), norms[1], MLP(up, down, gate))


def _model(g: dict[str, np.ndarray]) -> tuple[clover.Params, clover.CloverConfig, decoder.Config]:
    """The golden's weights; head width and layer count are read from the arrays.

    The arrays do not tell 4 query heads from other divisors, so the documented head width of 8 is
    used, with the rope base and norm epsilon documented beside it.
    """
    width, inner = g["hidden_states"].shape[1], g["W.layers.0.mlp.up_proj.weight"].shape[0]
    layers = len({name.split(".")[2] for name in g if name.startswith("W.layers.")})
    target = decoder.Config(
        vocab_size=g["W.lm_head.weight"].shape[0],
        hidden_size=width,
        num_layers=layers,
        num_heads=g["W.layers.0.self_attn.q_proj.weight"].shape[0] // 8,
        num_kv_heads=g["W.layers.0.self_attn.k_proj.weight"].shape[0] // 8,
        head_dim=8,
        intermediate_size=inner,
        max_length=64,
        norm_eps=1e-6,
    )
    cfg = clover.CloverConfig(num_heads=g["head_hidden"].shape[0], num_layers=layers)
    segments = tuple(decoder.Segment(_layer(g, i), stacked=False) for i in range(layers))
    params = clover.Params(
        augment=decoder.Params(None, segments, _norm(g, "clover_norm")),
        output_norm=_norm(g, "clover_head_norm"),
        regressive=_attention_decoder(g, "clover_head_mlp_rnn2"),
        entry=_attention_decoder(g, "clover_head_mlp_rnn"),
        first=_linear(g, "clover_head_mlp"),
        later=_linear(g, "clover_head_mlp2"),
    )
    return params, cfg, target


def _inputs(g: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    embeds = g["W.clover_embed_tokens.weight"][g["token_ids"][1:]]
    return jnp.asarray(g["hidden_states"])[None], jnp.asarray(embeds)[None]


def test_forward() -> None:
    g = clover_golden("clover2_forward")
    params, cfg, target = _model(g)
    hidden, embeds = _inputs(g)
    assert params.entry is not None
    entered = clover.attention_decoder(params.entry, target, hidden, embeds)
    np.testing.assert_allclose(entered[0], g["res_attention_out"], atol=2e-4, rtol=0)
    augmented, _ = clover.augment(params, cfg, target, hidden, embeds)
    np.testing.assert_allclose(augmented[0], g["augmented"], atol=2e-4, rtol=0)
    out = clover.head_hidden(params, cfg, target, hidden, embeds)[:, 0]
    logits = out @ g["W.lm_head.weight"].T
    for i in range(cfg.num_heads):
        rows = slice(0, hidden.shape[1] - i)
        np.testing.assert_allclose(out[i, rows], g["head_hidden"][i, rows], atol=2e-4, rtol=0)
        np.testing.assert_allclose(logits[i, rows], g["head_logits"][i, rows], atol=2e-4, rtol=0)


def test_loss() -> None:
    g = clover_golden("clover2_forward")
    params, cfg, target = _model(g)
    out = clover.head_hidden(params, cfg, target, *_inputs(g))
    target_hidden = jnp.asarray(g["target_hidden"])[None]
    labels = jnp.zeros(target_hidden.shape[:2], jnp.int32)
    rows, mask = jnp.asarray(g["W.lm_head.weight"]), jnp.asarray(g["loss_mask"])[None]
    total, parts = clover_loss(cfg, out, target_hidden, labels, rows, mask, chunk=4)
    np.testing.assert_allclose(parts, g["loss_parts_smoothl1_softce"], rtol=1e-3)
    np.testing.assert_allclose(total, g["loss_total"], rtol=1e-3)


def test_tree_drafting() -> None:
    g = clover_golden("clover2_forward")
    params, cfg, target = _model(g)
    tree = tree_from_paths(g["tree_choices"])
    augmented, _ = clover.augment(params, cfg, target, *_inputs(g))
    table, head = g["W.clover_embed_tokens.weight"], g["W.lm_head.weight"]
    count = g["topk_tokens"].shape[1]
    lists: list[Any] = []
    probs: list[Any] = []

    def expand(level: int, tokens: Any, states: Any, carry: Any) -> Any:
        embeds = jnp.asarray(table)[tokens]
        states, out = clover.head(params, cfg, target, states, embeds, level)
        logits = out @ head.T
        best, ids = jax.lax.top_k(logits[0], count)
        lists.append(ids)
        probs.append(jax.nn.softmax(best, axis=-1))
        return states, logits, carry

    root = jnp.asarray(g["token_ids"][-1:])
    context = Context(None, None, None, SamplingParams.make())
    draft, _ = draft_levels(
        tree, root, augmented[:, -1], jnp.ones((1,), bool), expand, None, None, target, context,
        sampled=False,
    )  # fmt: skip
    np.testing.assert_array_equal(np.concatenate(lists), g["topk_tokens"])
    np.testing.assert_allclose(np.concatenate(probs), g["topk_probs"], atol=2e-4)
    # The golden's rows are the lists of all expanded nodes, breadth first.
    expanded = np.concatenate([level.expanded for level in tree.levels]).tolist()
    row = [expanded.index(parent) for parent in tree.parent[1:]]
    np.testing.assert_array_equal(draft.tokens[0, 1:], g["topk_tokens"][row, tree.rank[1:]])


def test_medusa() -> None:
    g = clover_golden("medusa_heads")
    heads, vocab, width = g["head_w"].shape
    cfg = medusa.MedusaConfig(num_heads=heads)
    blocks = Linear(jnp.asarray(np.swapaxes(g["res_w"], 1, 2)), jnp.asarray(g["res_b"]))
    params = medusa.Params(blocks, matrices=jnp.asarray(g["head_w"]))
    target = decoder.Config(vocab, width, 1, 1, 1, 8, 8, 8)
    nothing = decoder.Params(None, (), Norm(jnp.ones((width,))))
    x = jnp.asarray(g["x"])
    # Row m of the aligned losses is about the token after position m + 1.
    labels = jnp.asarray(g["labels"][2:])[None]
    out = medusa.head_hidden(params, cfg, x[None])[:, :, : labels.shape[1]]
    mask = jnp.ones(labels.shape, jnp.float32)
    rows = jnp.zeros((vocab, width))
    _, parts = medusa_loss(cfg, params, out, labels, rows, mask)
    np.testing.assert_allclose(parts, g["per_head_loss"], atol=1e-4, rtol=1e-4)
    logits = medusa.head_logits(params, cfg, nothing, target, None, x)
    np.testing.assert_allclose(logits, g["logits"], atol=1e-4, rtol=1e-4)
