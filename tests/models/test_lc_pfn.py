"""LC-PFN's network: what its tokens see, how it starts, dropout, and its files."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models import lc_pfn, lc_pfn_io
from models.lc_pfn_io import LCPFN, import_torch_state, load, save
from models.params import count, init

CFG = lc_pfn.Config(width=16, layers=2, heads=2, ffn=32, buckets=12, seq_len=20, dropout=0.0)


def noisy(params: lc_pfn.Params, scale: float = 0.2) -> lc_pfn.Params:
    """Every parameter off its initial value, so that nothing is zero or a copy."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def params() -> lc_pfn.Params:
    return noisy(init(lc_pfn.specs(CFG), jax.random.key(0)))


@pytest.fixture(scope="module")
def curve() -> tuple[jax.Array, jax.Array]:
    """Epochs and values (2, 20)."""
    x = jnp.tile(jnp.arange(1.0, 21.0)[None], (2, 1))
    return x, jax.random.uniform(jax.random.key(1), (2, 20))


def run(params, x, y, context, key=None, cfg=CFG):
    """Logits, with one number of context tokens per row or for all."""
    return lc_pfn.forward(params, cfg, x, y, jnp.broadcast_to(jnp.asarray(context), (2,)), key)


def test_the_papers_size():
    assert count(lc_pfn.specs(lc_pfn.Config())) == 26_785_768
    small = lc_pfn.Config(width=256, layers=3, heads=2, ffn=512)
    assert count(lc_pfn.specs(small)) == pytest.approx(2.23e6, rel=0.005)


def test_queries_do_not_see_each_other(params, curve):
    x, y = curve
    full = run(params, x, y, 6)
    order = jnp.concatenate([jnp.arange(6), 6 + jax.random.permutation(jax.random.key(2), 14)])
    permuted = run(params, x[:, order], y[:, order], 6)
    np.testing.assert_allclose(permuted, full[:, order], atol=1e-5)
    fewer = run(params, x[:, :9], y[:, :9], 6)
    np.testing.assert_allclose(fewer, full[:, :9], atol=1e-5)
    moved = run(params, x.at[:, 8:].set(3.5), y, 6)
    np.testing.assert_allclose(moved[:, :8], full[:, :8], atol=1e-5)
    assert np.abs(moved[:, 8:] - full[:, 8:]).max() > 1e-2


def test_the_order_of_the_context_does_not_matter(params, curve):
    x, y = curve
    full = run(params, x, y, 10)
    order = jnp.concatenate([jax.random.permutation(jax.random.key(3), 10), jnp.arange(10, 20)])
    np.testing.assert_allclose(run(params, x[:, order], y[:, order], 10), full[:, order], atol=1e-5)
    swapped = y[:, order]  # values at other epochs: another curve
    assert np.abs(run(params, x, swapped, 10)[:, 10:] - full[:, 10:]).max() > 1e-3


def test_values_of_queries_are_never_read(params, curve):
    x, y = curve
    poisoned = run(params, x, y.at[:, 7:].set(jnp.nan), 7)
    np.testing.assert_array_equal(poisoned, run(params, x, y, 7))
    gradient = jax.grad(lambda y: jnp.sum(run(params, x, y, 7)[:, 7:]))(y)
    assert (gradient[:, 7:] == 0).all() and (gradient[:, :7] != 0).all()


def test_every_row_has_its_own_context(params, curve):
    x, y = curve
    both = run(params, x, y, jnp.array([4, 15]))
    np.testing.assert_allclose(both[0], run(params, x, y, 4)[0], atol=1e-5)
    np.testing.assert_allclose(both[1], run(params, x, y, 15)[1], atol=1e-5)


def test_the_number_of_context_points_does_not_recompile(params, curve):
    x, y = curve
    compiled = jax.jit(lambda *arguments: run(*arguments))  # a cache of its own
    for context in (1, 7, 19):
        compiled(params, x, y, context)
    assert compiled._cache_size() == 1


def test_nan_counts_as_the_middle(params, curve):
    x, y = curve
    at_nan = run(params, x, y.at[:, 2].set(jnp.nan), 5)
    np.testing.assert_allclose(at_nan, run(params, x, y.at[:, 2].set(0.5), 5), atol=1e-6)
    x_nan = run(params, x.at[:, 9].set(jnp.nan), y, 5)
    np.testing.assert_allclose(x_nan, run(params, x.at[:, 9].set(10.5), y, 5), atol=1e-5)


def test_layers_start_as_copies_that_only_normalise(curve):
    x, y = curve
    start = init(lc_pfn.specs(CFG), jax.random.key(0))
    for leaf in jax.tree.leaves(start.layers):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    for linear in (start.layers.attn.o, start.layers.mlp.down):
        assert not linear.w.any() and not linear.b.any()
    logits = run(start, x, y, 8)
    # A query knows its own epoch and nothing of the context.
    np.testing.assert_array_equal(logits[:, 8:], run(start, x, y * 0.3 + 1, 8)[:, 8:])
    assert np.abs(logits[0, 8] - logits[0, 9]).max() > 1e-3


def test_initial_values_have_pytorchs_ranges():
    start = init(lc_pfn.specs(dataclasses.replace(CFG, width=64)), jax.random.key(0))
    for array, bound in (
        (start.x_embed.w, 1.0),
        (start.x_embed.b, 1.0),
        (start.layers.attn.q.w, math.sqrt(6 / 256)),
        (start.layers.mlp.up.w, 1 / 8),
        (start.layers.mlp.up.b, 1 / 8),
        (start.hidden.w, 1 / 8),
        (start.out.w, 32**-0.5),
    ):
        assert 0.85 * bound < np.abs(array).max() <= bound
    assert not start.layers.attn.q.b.any()


def test_dropout_is_random_and_unbiased_in_its_scale(params, curve):
    x, y = curve
    cfg = dataclasses.replace(CFG, dropout=0.5)
    plain = run(params, x, y, 8, cfg=cfg)
    one, two = (run(params, x, y, 8, jax.random.key(i), cfg) for i in (1, 2))
    assert np.abs(one - two).max() > 1e-2 and np.abs(one - plain).max() > 1e-2
    np.testing.assert_array_equal(run(params, x, y, 8, jax.random.key(1), cfg), one)
    np.testing.assert_array_equal(run(params, x, y, 8, jax.random.key(1)), run(params, x, y, 8))
    dropped = lc_pfn._drop(jnp.ones((100, 100)), 0.2, jax.random.key(0))
    assert np.unique(dropped).tolist() == [0.0, 1.25]
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


def test_bfloat16_stays_near_float32(params, curve):
    x, y = curve
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    found = run(half, x, y, 8)
    assert found.dtype == jnp.float32
    full = run(params, x, y, 8)
    assert float(jnp.sqrt(jnp.mean((found - full) ** 2))) < 0.05 * float(jnp.std(full))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "do not divide"),
        ({"layers": 0}, "layers of at least 1"),
        ({"buckets": 1}, "at least 2 buckets"),
        ({"dropout": 1.0}, "below 1"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)


@pytest.fixture
def model(params) -> LCPFN:
    return LCPFN(params, jnp.linspace(-0.5, 1.5, 13), CFG)


def test_a_folder_gives_the_network_back(model: LCPFN, tmp_path: pathlib.Path):
    save(tmp_path / "net", model)
    back = load(tmp_path / "net")
    assert back.cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, back, model)


def test_half_precision_leaves_the_borders(model: LCPFN, tmp_path: pathlib.Path):
    save(tmp_path / "net", model, ml_dtypes.bfloat16)
    back = load(tmp_path / "net")
    np.testing.assert_array_equal(back.borders, model.borders)
    assert not np.array_equal(back.params.out.w, model.params.out.w)
    np.testing.assert_allclose(back.params.out.w, model.params.out.w, rtol=1e-2)


def test_damaged_and_foreign_folders(model: LCPFN, tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match="trained LC-PFN"):
        load(tmp_path)
    save(tmp_path / "net", model)
    with pytest.raises(FileExistsError):
        save(tmp_path / "net", model)
    config = tmp_path / "net" / "config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"schema": 9}, "schema 9"),
        ({"width": 32}, "has shape"),
        ({"colour": 1}, "unknown settings"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "net")
    for text, message in (("{", "not JSON"), ("[]", "no settings")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "net")
    with pytest.raises(ValueError, match="borders"):
        save(tmp_path / "other", dataclasses.replace(model, borders=jnp.zeros(5)))


def torch_state(model: LCPFN) -> dict[str, np.ndarray]:
    """The state dict that the released code would hold for these parameters."""
    state: dict[str, np.ndarray] = {}

    def put(name: str, linear) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = np.asarray(linear.w).T, linear.b

    p = model.params
    for name, linear in (
        ("encoder.2", p.x_embed),
        ("y_encoder.1", p.y_embed),
        ("decoder.0", p.hidden),
        ("decoder.2", p.out),
    ):
        put(name, linear)
    for i in range(CFG.layers):
        name = f"transformer_encoder.layers.{i}"
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p.layers)
        attn = layer.attn
        packed = [np.asarray(x.w).T for x in (attn.q, attn.k, attn.v)]
        state[f"{name}.self_attn.in_proj_weight"] = np.concatenate(packed)
        state[f"{name}.self_attn.in_proj_bias"] = np.concatenate([attn.q.b, attn.k.b, attn.v.b])
        put(f"{name}.self_attn.out_proj", attn.o)
        put(f"{name}.linear1", layer.mlp.up)
        put(f"{name}.linear2", layer.mlp.down)
        for norm, mine in (("norm1", layer.attn_norm), ("norm2", layer.mlp_norm)):
            state[f"{name}.{norm}.weight"] = mine.scale
            state[f"{name}.{norm}.bias"] = mine.bias
    state["criterion.borders"] = np.asarray(model.borders)
    state["criterion.bucket_widths"] = np.diff(model.borders)
    return state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_import_of_a_torch_state(model: LCPFN, prefix: str):
    state = {f"{prefix}{name}": array for name, array in torch_state(model).items()}
    back = import_torch_state(state, heads=2)
    assert dataclasses.replace(back.cfg, seq_len=20, dropout=0.0) == CFG
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    np.testing.assert_array_equal(back.borders, model.borders)
    assert import_torch_state(state).cfg.heads == 1  # one per 128 channels, at least one


def test_torch_states_that_do_not_fit(model: LCPFN):
    state = torch_state(model)

    def without(name: str) -> dict[str, np.ndarray]:
        return {k: v for k, v in state.items() if k != name}

    layer = "transformer_encoder.layers.1"
    for bad, message in (
        (without("criterion.borders"), "criterion.borders is missing"),
        (without("decoder.0.bias"), "decoder.0.bias is missing"),
        ({**state, "pos_encoder.pe": np.zeros(3)}, "pos_encoder.pe is no parameter"),
        ({**state, "criterion.borders": -state["criterion.borders"]}, "do not rise"),
        ({**state, f"{layer}.linear1.bias": np.zeros(5)}, "shape"),
        ({k: v for k, v in state.items() if "layers.0" not in k}, "not 0, 1"),
        ({**state, f"{layer}.self_attn.in_proj_bias": np.zeros(5)}, "packs q, k and v"),
    ):
        with pytest.raises(ValueError, match=message):
            import_torch_state(bad, heads=2)
    given = import_torch_state(without("criterion.borders"), 2, np.linspace(0, 1, 13))
    assert lc_pfn_io.specs(given.cfg).borders.shape == (13,)
