"""LongSpec's draft layer, positions, merged attention and beam against re-expressed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder, longspec
from models.attention import DensePolicy, Step
from models.layers import MLP, Attention, Layer, Linear, Norm
from ops.attention import AttentionMask, attention, hybrid_tree_attention
from ops.dynamic_tree import Frontier, beam_tree
from ops.sampling import SamplingParams
from ops.verify import emitted_tokens, verify
from tests.goldens import golden


def _layer(g: dict[str, np.ndarray]) -> tuple[longspec.Params, decoder.Config]:
    width, head_dim = g["W.ln_in"].shape[0], g["target_k"].shape[2]
    cfg = decoder.Config(
        vocab_size=8, hidden_size=width, num_layers=1, num_heads=g["W.sa_q"].shape[0] // head_dim,
        num_kv_heads=g["target_k"].shape[1], head_dim=head_dim,
        intermediate_size=g["W.up"].shape[0], max_length=64, norm_eps=1e-6,
    )  # fmt: skip

    def linear(name: str, bias: str | None = None) -> Linear:
        b = None if bias is None else jnp.asarray(g[f"W.{bias}"])
        return Linear(jnp.asarray(g[f"W.{name}"].T), b)

    def norm(name: str) -> Norm:
        return Norm(jnp.asarray(g[f"W.{name}"]))

    attn = Attention(*(linear(f"sa_{x}", None if x == "o" else f"sa_{x}b") for x in "qkvo"))
    mlp = MLP(*(linear(x) for x in ("up", "down", "gate")))
    layer = Layer(norm("ln_in"), attn, norm("ln_post_ca"), mlp)
    cross = longspec.Cross(norm("ln_post_sa"), linear("ca_q", "ca_qb"), linear("ca_o"))
    return longspec.Params(layer, cross), cfg


def test_draft_block() -> None:
    g = golden("longspec", "draft_block")
    params, target = _layer(g)
    positions = jnp.asarray(g["position_ids"])[None]
    cfg = longspec.LongSpecConfig(window=int(g["window"]))
    where = longspec.place(DensePolicy(), target, Step(positions))
    entries = jnp.asarray(g["target_k"])[None], jnp.asarray(g["target_v"])[None]
    embeds = jnp.asarray(g["token_embeddings"])[None]
    run = jax.jit(lambda j: longspec.forward(params, cfg, target, embeds, where, entries, j))
    shifts = [int(name.removeprefix("hidden_shift")) for name in g if name.startswith("hidden_")]
    assert shifts
    for shift in shifts:
        np.testing.assert_allclose(run(shift)[0], g[f"hidden_shift{shift}"], atol=1e-4)
    plain = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    sink, offset = jnp.asarray(g["sink"])[None], jnp.asarray(g["offset"])[None]
    moved = longspec.anchor_offset_positions(plain, sink, offset)
    np.testing.assert_array_equal(moved, positions)


def test_anchor_offset_positions() -> None:
    g = golden("longspec", "anchor_offset_positions")
    sink, offset = jnp.asarray(g["sink"]), jnp.asarray(g["offset"])
    plain = jnp.broadcast_to(
        jnp.arange(int(g["seq_len"]), dtype=jnp.int32)[None], g["position_ids"].shape
    )
    moved = longspec.anchor_offset_positions(plain, sink, offset)
    np.testing.assert_array_equal(moved, g["position_ids"])


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_lse_merge(implementation: str) -> None:
    g = golden("longspec", "lse_merge")
    q, k_prefix, v_prefix, k_tree, v_tree = (
        jnp.swapaxes(jnp.asarray(g[name]), 0, 1)[None]
        for name in ("q", "k_prefix", "v_prefix", "k_tree", "v_tree")
    )
    tree = jnp.asarray(g["tree_mask"] != 0)[None]
    nodes = AttentionMask(tree=tree, tree_start=jnp.zeros(1, jnp.int32))

    @jax.jit
    def parts() -> tuple:
        options = {"return_lse": True, "implementation": implementation}
        prefix = attention(q, k_prefix, v_prefix, **options)
        among = attention(q, k_tree, v_tree, mask=nodes, **options)
        return prefix, among, hybrid_tree_attention(
            q, k_prefix, v_prefix, AttentionMask(), k_tree, v_tree, tree,
            implementation=implementation,
        )  # fmt: skip

    prefix, among, merged = parts()
    for (out, lse), name in ((prefix, "prefix"), (among, "tree")):
        np.testing.assert_allclose(out[0], np.swapaxes(g[f"{name}_out"], 0, 1), atol=1e-5)
        np.testing.assert_allclose(lse[0], g[f"{name}_lse"].T, atol=1e-5)
    np.testing.assert_allclose(merged[0], np.swapaxes(g["merged_out"], 0, 1), atol=1e-5)


def test_beam_tree() -> None:
    g = golden("longspec", "beam_tree")
    table = jax.nn.log_softmax(jnp.asarray(g["draft_logit_table"]), axis=-1)
    root = int(g["root_token"])

    def step(state: None, frontier: Frontier) -> tuple[jax.Array, None]:
        return table[frontier.tokens], state

    shape = tuple(int(n) for n in g["tree_shape"])
    made, _ = jax.jit(lambda: beam_tree(step, table[root][None], None, shape))()
    tokens = made.tokens.at[:, 0].set(root)
    np.testing.assert_array_equal(tokens[0], g["tree_tokens"])
    np.testing.assert_array_equal(made.tree.parent[0], g["parent"])
    np.testing.assert_array_equal(made.tree.mask[0], g["tree_mask"] != 0)
    np.testing.assert_allclose(made.scores[0], g["cum_logprob"], atol=1e-5)
    logits = jnp.asarray(g["target_logit_table"])[tokens]
    np.testing.assert_array_equal(jnp.argmax(logits[0], axis=-1), g["node_argmax"])
    one = jnp.zeros(1, jnp.int32)
    verdict = verify(
        "deterministic",
        tokens=tokens,
        parent=made.tree.parent,
        valid=made.tree.valid,
        target_logits=logits,
        params=SamplingParams.make(),
        seeds=one,
        index=one,
        max_depth=len(shape),
    )
    kept = int(verdict.num_accepted[0]) + 1
    np.testing.assert_array_equal(verdict.path[0, :kept], g["accepted_nodes"])
    emitted = emitted_tokens(tokens, verdict)
    np.testing.assert_array_equal(emitted[0, :kept], g["emitted_tokens"])
