"""The decoder's promises: causality, layer choices, taps, scan against unrolled layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.attention import DensePolicy, Frequencies, Step
from models.decoder import LayerChoice
from models.layers import add_mlp
from models.positions import rope_frequencies
from tests.models import tiny

CFG = tiny.config(num_layers=4)
run = jax.jit(decoder.forward, static_argnums=1, static_argnames=("all_hidden", "remat"))


@pytest.fixture(scope="module")
def full():
    return run(tiny.weights(CFG), CFG, tiny.tokens(), all_hidden=True)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def test_shapes_and_hidden_states(full):
    assert full.hidden.shape == (2, 10, 16) and full.hidden_states.shape == (5, 2, 10, 16)
    assert full.cache is None
    np.testing.assert_array_equal(full.hidden_states[-1], full.pre_norm)
    params = tiny.weights(CFG)
    np.testing.assert_array_equal(full.hidden_states[0], params.embed[tiny.tokens()])
    logits = decoder.unembed(params, CFG, full.hidden)
    assert logits.dtype == jnp.float32
    close(logits, full.hidden @ params.embed.T)


def test_later_tokens_do_not_reach_earlier_ones(full):
    changed = tiny.tokens().at[:, 6:].add(1) % 40
    out = run(tiny.weights(CFG), CFG, changed, all_hidden=True)
    np.testing.assert_array_equal(out.hidden[:, :6], full.hidden[:, :6])
    assert (np.abs(out.hidden[:, 6:] - full.hidden[:, 6:]).max(-1) > 1e-3).all()


def test_bidirectional_models_see_everything():
    cfg = dataclasses.replace(CFG, causal=False)
    a = run(tiny.weights(CFG), cfg, tiny.tokens()).hidden
    b = run(tiny.weights(CFG), cfg, tiny.tokens().at[:, -1].add(1)).hidden
    assert float(np.abs(a[:, 0] - b[:, 0]).max()) > 1e-4


def test_segments_are_documents_of_their_own():
    params, whole = tiny.weights(CFG), tiny.tokens(1, 10)
    segments = jnp.asarray([[1] * 4 + [2] * 6])
    positions = jnp.asarray([[*range(4), *range(6)]])
    packed = run(params, CFG, whole, step=Step(positions, segments=segments)).hidden
    close(packed[:, :4], run(params, CFG, whole[:, :4]).hidden)
    close(packed[:, 4:], run(params, CFG, whole[:, 4:]).hidden)


def test_windows_per_layer():
    params = tiny.weights(CFG)
    windowed = dataclasses.replace(CFG, windows=(3, None, 3, None))
    out = run(params, windowed, tiny.tokens(), all_hidden=True).hidden_states
    full = run(params, CFG, tiny.tokens(), all_hidden=True).hidden_states
    close(out[1][:, :3], full[1][:, :3])  # within the window nothing changes
    assert float(np.abs(out[1][:, 4:] - full[1][:, 4:]).max()) > 1e-3
    same = run(params, CFG, tiny.tokens(), policy=DensePolicy(jnp.asarray([3, 2**30, 3, 2**30])))
    np.testing.assert_array_equal(same.pre_norm, out[-1])
    with pytest.raises(ValueError, match="windows for 4 layers"):
        decoder.forward(params, CFG, tiny.tokens(), policy=DensePolicy(jnp.asarray([3, 3])))


def test_a_scan_gives_what_unrolled_layers_give(full):
    unrolled = run(decoder.unstack(tiny.weights(CFG)), CFG, tiny.tokens(), all_hidden=True)
    close(unrolled.hidden_states, full.hidden_states)


def test_mixed_segments(full):
    params = decoder.unstack(tiny.weights(CFG))
    stack = jax.tree.map(lambda x: x[1:3], tiny.weights(CFG).segments[0].layers)
    middle = decoder.Segment(stack, count=2)
    mixed = params.replace(segments=(params.segments[0], middle, params.segments[3]))
    close(run(mixed, CFG, tiny.tokens(), all_hidden=True).hidden_states, full.hidden_states)


def through(x, **choice):
    """Layers chosen in the program (Python numbers would become data as arguments of jit)."""
    build = jax.jit(
        lambda p, x: decoder.forward(
            p, CFG, embeds=x, layers=LayerChoice(**choice), all_hidden=True
        )
    )
    return build(tiny.weights(CFG), x)


@pytest.fixture(scope="module")
def chosen():
    """One compiled program for every traced choice."""
    return jax.jit(lambda p, x, layers: decoder.forward(p, CFG, embeds=x, layers=layers).pre_norm)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (1, 3), (2, 2)])
def test_layer_ranges_static_traced_and_kept_agree(full, chosen, start, stop):
    x = full.hidden_states[start]
    params = tiny.weights(CFG)
    static = through(x, start=start, stop=stop).pre_norm
    close(static, full.hidden_states[stop])
    close(chosen(params, x, LayerChoice(jnp.int32(start), jnp.int32(stop))), static)
    kept = jnp.asarray([*range(start, stop), 0, 0, 0, 0][:4])
    close(chosen(params, x, LayerChoice(kept=kept, count=jnp.int32(stop - start))), static)


def test_a_traced_choice_does_not_recompile(full, chosen):
    before = chosen._cache_size()
    for stop in (1, 2, 3):
        choice = LayerChoice(jnp.int32(0), jnp.int32(stop))
        out = chosen(tiny.weights(CFG), full.hidden_states[0], choice)
        close(out, full.hidden_states[stop])
    assert chosen._cache_size() <= before + 1


def test_a_kept_subset_is_the_model_without_the_others(full, chosen):
    params = tiny.weights(CFG)
    pruned = jax.tree.map(lambda leaf: leaf[jnp.asarray([0, 3])], params.segments[0].layers)
    small = params.replace(segments=(decoder.Segment(pruned, count=2),))
    expected = run(small, dataclasses.replace(CFG, num_layers=2), tiny.tokens())
    close(
        chosen(params, full.hidden_states[0], LayerChoice(kept=jnp.asarray([0, 3]))),
        expected.pre_norm,
    )
    assert float(np.abs(expected.pre_norm - full.pre_norm).max()) > 1e-2


def test_resuming_from_hidden_states_gives_the_rest(full):
    resumed = through(full.hidden_states[2], start=2, stop=None)
    close(resumed.hidden, full.hidden)
    close(resumed.hidden_states, full.hidden_states[2:])


@pytest.fixture(scope="module")
def by_sub_layers():
    """The stream after every layer under a traced choice of unrolled layers."""

    @jax.jit
    def states(params, x, layers):
        return decoder.forward(params, CFG, embeds=x, layers=layers, all_hidden=True).hidden_states

    return lambda x, **choice: states(decoder.unstack(tiny.weights(CFG)), x, LayerChoice(**choice))


def test_unrolled_layers_run_where_data_says(full, by_sub_layers):
    x = full.hidden_states[1]
    found = by_sub_layers(x, start=jnp.int32(1), stop=jnp.int32(3))
    close(found[3], full.hidden_states[3])
    np.testing.assert_array_equal(found[1], x)
    np.testing.assert_array_equal(found[4], found[3])


def test_skipped_sub_layers_leave_the_stream_as_it_is(full, by_sub_layers, chosen):
    x, none = full.hidden_states[0], jnp.zeros(4, bool)
    close(by_sub_layers(x, skip_attention=none, skip_mlp=none), full.hidden_states)
    skip = {"skip_attention": none.at[1].set(True), "skip_mlp": none.at[2].set(True)}
    found = by_sub_layers(x, **skip)
    stack = tiny.weights(CFG).segments[0].layers
    layer = jax.tree.map(lambda leaf: leaf[1], stack)
    close(found[2], add_mlp(layer, CFG, found[1]))
    without = dataclasses.replace(stack.mlp.down, w=stack.mlp.down.w.at[2].set(0))
    silent = stack.replace(mlp=stack.mlp.replace(down=without))
    silent = silent.replace(
        attn=stack.attn.replace(o=stack.attn.o.replace(w=stack.attn.o.w.at[1].set(0)))
    )
    params = tiny.weights(CFG).replace(segments=(decoder.Segment(silent, count=4),))
    want = run(params, CFG, tiny.tokens(), all_hidden=True)
    close(found, want.hidden_states)
    close(chosen(tiny.weights(CFG), x, LayerChoice(**skip)), want.pre_norm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1, "layers": LayerChoice(skip_mlp=jnp.zeros(3, bool))}, "one entry per layer"),
        ({}, "exactly one of tokens and embeds"),
        ({"tokens": 1, "layers": LayerChoice(1, 9)}, "layers 1 to 9 are not within the model's 4"),
        ({"tokens": 1, "cache": [None] * 4}, "a cache needs unstacked layers"),
        (
            {"tokens": 1, "all_hidden": True, "layers": LayerChoice(jnp.int32(0), 2)},
            "a traced choice of layers runs without cache",
        ),
    ],
)
def test_unsupported_combinations_are_refused(changes, message):
    changes = changes | ({"tokens": tiny.tokens()} if "tokens" in changes else {})
    with pytest.raises(ValueError, match=message):
        decoder.forward(tiny.weights(CFG), CFG, **changes)


def test_taps_reduce_what_each_layer_sees(full):
    def gram(x):
        return jnp.einsum("btc,btd->cd", x, x)

    names = ("attn_in", "attn_out_in", "mlp_in", "mlp_down_in")
    tapped = jax.jit(lambda p, t: decoder.forward(p, CFG, t, taps=dict.fromkeys(names, gram)))
    params = tiny.weights(CFG)
    out = tapped(params, tiny.tokens())
    close(out.hidden, full.hidden)
    assert {name: sums.shape for name, sums in out.taps.items()} == {
        "attn_in": (4, 16, 16), "attn_out_in": (4, 16, 16),
        "mlp_in": (4, 16, 16), "mlp_down_in": (4, 24, 24),
    }  # fmt: skip
    for layer in range(4):
        x = full.hidden_states[layer]
        scale = params.segments[0].layers.attn_norm.scale[layer]
        normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + CFG.norm_eps)
        close(out.taps["attn_in"][layer], gram(normed * scale[None, None]), 1e-3)
    unrolled = tapped(decoder.unstack(params), tiny.tokens())
    close(unrolled.taps["mlp_down_in"], out.taps["mlp_down_in"], 1e-2)


def test_rematerialisation_keeps_gradients():
    def loss(params, remat):
        out = decoder.forward(params, CFG, tiny.tokens(), remat=remat)
        return jnp.mean(jax.nn.log_softmax(decoder.unembed(params, CFG, out.hidden))[..., 3])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, rematerialised = (gradient(tiny.weights(CFG), flag) for flag in (False, True))
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    assert largest > 1e-3
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematerialised), strict=True):
        close(a, b, 1e-6 * max(1.0, largest))


def test_real_positions_shift_nothing_but_distances(full):
    positions = jnp.broadcast_to(jnp.arange(10, dtype=jnp.float32)[None] + 7.5, (2, 10))
    moved = run(tiny.weights(CFG), CFG, tiny.tokens(), step=Step(positions))
    close(moved.hidden, full.hidden, 1e-4)
    stretched = run(tiny.weights(CFG), CFG, tiny.tokens(), step=Step(2 * positions))
    assert float(np.abs(stretched.hidden - full.hidden).max()) > 1e-2


def test_a_scheme_rotates_in_place_of_the_config(full):
    params, out = tiny.weights(CFG), full
    theta, factor = rope_frequencies(CFG.rope, CFG.rotary_dim, CFG.rope_base)
    same = run(params, CFG, tiny.tokens(), policy=DensePolicy(scheme=Frequencies(theta, factor)))
    np.testing.assert_array_equal(same.hidden, out.hidden)
    halved = run(params, CFG, tiny.tokens(), policy=DensePolicy(scheme=Frequencies(theta / 2)))
    row = jnp.broadcast_to(jnp.arange(tiny.tokens().shape[1]) / 2, tiny.tokens().shape)
    moved = DensePolicy(scheme=Frequencies(theta, positions=row))
    np.testing.assert_allclose(
        halved.hidden, run(params, CFG, tiny.tokens(), policy=moved).hidden, atol=1e-5
    )
    assert np.abs(np.asarray(halved.hidden - out.hidden)).max() > 1e-3
    with pytest.raises(ValueError, match="give 2"):
        run(params, CFG, tiny.tokens(), policy=DensePolicy(scheme=Frequencies(theta[:1])))


def test_learned_positions_are_added():
    cfg = tiny.config(position="learned", norm="layer", gated_mlp=False, activation="gelu_tanh")
    params = tiny.weights(cfg)
    x = decoder.embed(params, cfg, tiny.tokens(), jnp.asarray([[*range(10)]] * 2))
    np.testing.assert_array_equal(x, params.embed[tiny.tokens()] + params.position_embed[None, :10])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"activation": "tanh"}, "unknown activation 'tanh': use one of silu, gelu, gelu_tanh"),
        ({"norm": "batch"}, "norm must be rms or layer"),
        ({"windows": (4,)}, "windows has 1 entries for 3 layers"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


def test_config_is_hashable():
    assert hash(tiny.config()) == hash(tiny.config()) and tiny.config() == tiny.config()
