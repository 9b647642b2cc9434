"""The EAGLE-like drafter against the official drafter's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from inference.cache import init_cache
from models import decoder, eagle
from models.attention import Step
from models.layers import MLP, Attention, Linear, Norm
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
