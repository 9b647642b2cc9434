"""SeqPE's encoder of positions, and how its vectors enter attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import seqpe
from models.params import Constant, ParamSpec
from ops.attention import AttentionMask, attention
from tests.models import tiny

CFG = seqpe.Config(width=16, heads=2, axis_length=1000)
PLANE = dataclasses.replace(CFG, axis_length=100, axes=2)
MODEL = tiny.config(position="none")
encode = jax.jit(seqpe.encode, static_argnums=1)


@functools.cache
def weights(cfg: seqpe.Config) -> seqpe.Params:
    """Random weights, biases and norms too."""
    rng = np.random.default_rng(0)

    def one(spec: ParamSpec) -> jax.Array:
        constant = spec.init.value if isinstance(spec.init, Constant) else 0.0
        return jnp.asarray(constant + 0.3 * rng.normal(size=spec.shape), spec.dtype)

    return jax.tree.map(one, seqpe.specs(cfg))


def vectors(cfg: seqpe.Config, positions: Any, params: Any = None) -> np.ndarray:
    """u of positions along one axis, or of rows of positions."""
    at = np.asarray(positions, np.int32).reshape(-1, cfg.axes)
    return np.asarray(encode(weights(cfg) if params is None else params, cfg, at))


def table(cfg: seqpe.Config, shape: tuple[int, ...]) -> np.ndarray:
    """The table of a grid, compiled anew."""
    return np.asarray(jax.jit(lambda params: seqpe.extend_table(params, cfg, shape))(weights(cfg)))


# Digits.
def test_digits_and_back():
    numbers = np.asarray([0, 7, 10, 123, 999], np.int32)
    digits, real = seqpe.position_digits(numbers[:, None], 3)
    np.testing.assert_array_equal(np.asarray(digits) @ [100, 10, 1], numbers)
    wanted = [[0, 0, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    np.testing.assert_array_equal(real, np.asarray(wanted, bool))


def test_axes_follow_each_other():
    pairs = np.asarray([[3, 20], [99, 0]], np.int32)
    both, real = seqpe.position_digits(pairs, 2)
    for axis in (0, 1):
        one, its_real = seqpe.position_digits(pairs[:, axis : axis + 1], 2)
        np.testing.assert_array_equal(both[:, 2 * axis : 2 * axis + 2], one)
        np.testing.assert_array_equal(real[:, 2 * axis : 2 * axis + 2], its_real)


@pytest.mark.parametrize("position", [1000, -1])
def test_what_the_digits_cannot_tell_is_refused(position: int):
    with pytest.raises(ValueError, match="do not fit 3 digits: give 0 up to 999"):
        seqpe.encode(weights(CFG), CFG, np.asarray([[position]]))
    with pytest.raises(ValueError, match="positions have 2 axes, the encoder 1"):
        seqpe.encode(weights(CFG), CFG, np.asarray([[1, 2]]))


@pytest.mark.parametrize("shape", [(1001,), (0,), (3, 3)])
def test_tables_end_where_the_digits_do(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="1 up to 1000, which is what 3 digits can tell"):
        seqpe.extend_table(weights(CFG), CFG, shape)


# The encoder.
def test_a_vector_depends_on_its_position_alone():
    numbers = [5, 990, 17, 5]
    together, alone = vectors(CFG, numbers), [vectors(CFG, [n])[0] for n in numbers]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(vectors(CFG, numbers[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_array_equal(vectors(CFG, numbers), together)
    np.testing.assert_array_equal(together[0], together[3])


def test_a_table_holds_the_vectors(monkeypatch: pytest.MonkeyPatch):
    """In one piece or several."""
    wanted = vectors(CFG, range(20))
    for chunk in (1024, 8):
        monkeypatch.setattr(seqpe, "CHUNK", chunk)
        np.testing.assert_allclose(table(CFG, (20,)), wanted, atol=1e-5)
    pairs = [(row, column) for row in range(2) for column in range(3)]
    np.testing.assert_allclose(table(PLANE, (2, 3)), vectors(PLANE, pairs), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_masked_padding_has_no_effect_and_other_padding_has(causal: bool, masked: bool):
    cfg = dataclasses.replace(CFG, mask_padding=masked, causal=causal)
    params = weights(cfg)
    # 7 is written 007: both the zeros and their places change.
    noise = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    other = params.replace(
        token_embed=params.token_embed.at[0].add(noise[0]),
        place_embed=params.place_embed.at[:2].add(noise[1:]),
    )
    before, after = vectors(cfg, [7, 123], params), vectors(cfg, [7, 123], other)
    assert (np.abs(after[0] - before[0]).max() > 1e-3) != masked
    assert np.abs(after[1] - before[1]).max() > 1e-3  # no padding here
    assert np.isfinite(after).all()


@pytest.mark.parametrize("causal", [True, False])
def test_every_digit_counts(causal: bool):
    cfg = dataclasses.replace(CFG, causal=causal)
    one, *others = vectors(cfg, [456, 457, 466, 556])
    assert all(np.abs(one - other).max() > 1e-3 for other in others)


def test_an_order_of_tokens_that_is_causal():
    """Later digits do not change what earlier ones become: only then do both masks differ."""
    both = [vectors(dataclasses.replace(CFG, causal=c), [456]) for c in (True, False)]
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_the_last_layer_is_that_of_all_tokens():
    """Computing the last token alone changes nothing."""
    cfg = dataclasses.replace(CFG, layers=1)
    x = jax.random.normal(jax.random.key(0), (3, 4, 16))

    @jax.jit
    def both(params: seqpe.Params) -> list[jax.Array]:
        layer = jax.tree.map(lambda leaf: leaf[0], params.layers)
        return [seqpe._layer(layer, cfg, x, None, None, only_last=only) for only in (False, True)]

    whole, last = both(weights(cfg))
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_axes_are_told_apart():
    a, b = vectors(PLANE, [(3, 20), (20, 3)])
    assert np.abs(a - b).max() > 1e-3
    params = weights(PLANE)
    swapped = params.replace(axis_embed=params.axis_embed[::-1])
    assert np.abs(vectors(PLANE, [(3, 20)], swapped) - a).max() > 1e-3


def test_dropout_is_for_training():
    at = np.asarray([[5], [6]], np.int32)
    plain = encode(weights(CFG), CFG, at)
    drawn = [encode(weights(CFG), CFG, at, jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3 < np.abs(drawn[0] - plain).max()
    still = dataclasses.replace(CFG, dropout=0.0)
    np.testing.assert_array_equal(encode(weights(CFG), still, at, jax.random.key(0)), plain)


def test_the_temperature_divides():
    warm = dataclasses.replace(CFG, temperature=2.0)
    np.testing.assert_allclose(2 * vectors(warm, [5]), vectors(CFG, [5]), rtol=1e-6)


def test_initial_values_are_those_of_the_paper():
    specs = seqpe.specs(seqpe.Config(width=16, heads=2, axis_length=4096))
    spreads = {getattr(s.init, "stddev", None) for s in jax.tree.leaves(specs)}
    assert spreads == {None, 0.02} and specs.place_embed.shape == (4, 16)
    assert specs.axis_embed is None and seqpe.specs(PLANE).axis_embed.shape == (2, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads that divide the width"),
        ({"axis_length": 1}, "give 2 up to 100000000 positions"),
        ({"dropout": 1.0}, "a rate from 0 up to below 1"),
        ({"temperature": 0.0}, "a positive temperature"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **changes)


# Injection.
def attention_inputs(seed: int = 0) -> list[jax.Array]:
    """q, k, v, u_q, u_k of two rows of six tokens, with two key heads for four query heads."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 6, h, 4) for h in (4, 2, 2, 4, 2)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def attended(method: str, scale: float = 1.0, zero: bool = False) -> np.ndarray:
    q, k, v, u_q, u_k = attention_inputs()
    if zero:
        u_q, u_k = jnp.zeros_like(u_q), jnp.zeros_like(u_k)
    q, k = seqpe.apply_to_attention(q, k, u_q, u_k, seqpe.Injection(method, scalar_scale=scale))
    return np.asarray(attention(q, k, v, mask=AttentionMask(causal=True), scale=0.5))


def by_definition(scale: float) -> np.ndarray:
    """Softmax of (q k + scale u_q u_k) / 2, with every key head repeated."""
    q, k, v, u_q, u_k = (np.asarray(x, np.float64) for x in attention_inputs())
    k, v, u_k = (np.repeat(x, 2, axis=2) for x in (k, v, u_k))
    scores = np.einsum("bthd,bshd->bhts", q, k) + scale * np.einsum("bthd,bshd->bhts", u_q, u_k)
    scores = np.where(np.tril(np.ones((6, 6), bool)), scores / 2, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def test_the_scalar_form_is_a_sum_of_products():
    for scale in (1.0, 0.7):
        np.testing.assert_allclose(attended("attn_scalar", scale), by_definition(scale), atol=1e-5)


def test_without_a_signal_it_is_attention_without_positions():
    plain = by_definition(0.0)
    np.testing.assert_allclose(attended("attn_scalar", zero=True), plain, atol=1e-5)
    np.testing.assert_allclose(attended("attn_scalar", 0.0), plain, atol=1e-5)
    np.testing.assert_allclose(attended("attn_add", zero=True), plain, atol=1e-5)
    assert np.abs(attended("attn_scalar") - plain).max() > 1e-2
    assert np.abs(attended("attn_mul", zero=True) - plain).max() > 1e-2


def test_the_other_forms():
    q, k, _, u_q, u_k = attention_inputs()
    for method, form in (("attn_mul", jnp.multiply), ("attn_add", jnp.add)):
        found = seqpe.apply_to_attention(q, k, u_q, u_k, seqpe.Injection(method))
        np.testing.assert_array_equal(found[0], form(q, u_q))
        np.testing.assert_array_equal(found[1], form(k, u_k))
    still = seqpe.apply_to_attention(q, k, u_q, u_k, seqpe.Injection("input_add", "none"))
    assert still[0] is q and still[1] is k


def test_projections():
    for kind, count in (("single", 1), ("multi", 3)):
        specs = seqpe.projection_specs(seqpe.Injection("attn_scalar", kind), 16, MODEL)
        assert specs is not None and specs.w.shape == (count, 16, (4 + 2) * 4)
    assert seqpe.projection_specs(seqpe.Injection("input_add", "none"), 16, MODEL) is None
    u = jnp.arange(8.0).reshape(1, 1, 8)
    as_it_is = seqpe.head_vectors(u, None, 2, 2, 4)
    np.testing.assert_array_equal(as_it_is[0][0, 0], np.arange(8).reshape(2, 4))
    shared = seqpe.head_vectors(u[..., :4], None, 2, 2, 4)
    np.testing.assert_array_equal(shared[1][0, 0], np.tile(np.arange(4), (2, 1)))


@pytest.mark.parametrize(
    ("injection", "out", "changes", "message"),
    [
        (("attn_scalar", "single"), 16, {"position": "rope"}, "set the model's position to 'none'"),
        (("attn_scalar", "single"), 16, {"windows": (4, 4, 4)}, "not defined for sliding windows"),
        (("input_add", "none"), 8, {}, "u is 8 wide and is added to embeddings of 16"),
        (("attn_mul", "none"), 16, {}, "as many key heads as query heads"),
        (("attn_mul", "none"), 12, {"num_kv_heads": 4}, r"all heads \(16\) or as one \(4\)"),
    ],
)
def test_injections_that_do_not_fit_are_refused(injection, out, changes, message):
    with pytest.raises(ValueError, match=message):
        seqpe.check_injection(
            seqpe.Injection(*injection), out, dataclasses.replace(MODEL, **changes)
        )


def test_unknown_injections_are_refused():
    for arguments in (("attn_sum",), ("attn_mul", "double")):
        with pytest.raises(ValueError, match="unknown injection"):
            seqpe.Injection(*arguments)
    with pytest.raises(ValueError, match="set projection='none'"):
        seqpe.Injection("input_add")
