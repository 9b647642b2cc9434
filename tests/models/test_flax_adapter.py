"""Our models as linen modules, and weights taken from linen and NNX modules."""

import jax
import numpy as np
import pytest
from flax import linen, nnx

from models import decoder
from models.flax_adapter import LinenModule, from_linen, from_nnx, to_linen
from models.layers import MLP, Linear
from models.params import ParamSpec, path_name
from tests.models import tiny

CFG = tiny.config(num_layers=1, qk_norm=True)
SPECS = decoder.specs(CFG)


def logits(params, tokens):
    return decoder.unembed(params, CFG, decoder.forward(params, CFG, tokens).hidden)


def test_a_linen_module_computes_what_the_function_computes():
    module = LinenModule(SPECS, logits)
    variables = jax.jit(module.init)(jax.random.key(0), tiny.tokens())
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(SPECS)}
    assert set(variables["params"]) == names
    params = from_linen(variables, SPECS)
    apply, compute = jax.jit(module.apply), jax.jit(logits)
    expected = compute(params, tiny.tokens())
    np.testing.assert_array_equal(apply(variables, tiny.tokens()), expected)
    ours = tiny.weights(CFG)
    found = apply(to_linen(ours), tiny.tokens())
    np.testing.assert_array_equal(found, compute(ours, tiny.tokens()))
    assert float(np.abs(found - expected).max()) > 1e-2


WIDTH, INNER = 6, 10
MLP_SPECS = MLP(
    up=Linear(ParamSpec((WIDTH, INNER), (None, None)), ParamSpec((INNER,), (None,))),
    down=Linear(ParamSpec((INNER, WIDTH), (None, None)), ParamSpec((WIDTH,), (None,))),
)


def mlp(params, x):
    hidden = jax.nn.relu(x @ params.up.w + params.up.b[None])
    return hidden @ params.down.w + params.down.b[None]


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(WIDTH, name="two")(jax.nn.relu(linen.Dense(INNER, name="one")(x)))


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(WIDTH, INNER, rngs=rngs, bias_init=nnx.initializers.normal(1.0))
        self.two = nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.two(jax.nn.relu(self.one(x)))


PATHS = {
    ".up.w": ("one", "kernel"), ".up.b": ("one", "bias"),
    ".down.w": ("two", "kernel"), ".down.b": ("two", "bias"),
}  # fmt: skip


def test_weights_from_a_linen_module():
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))
    module = LinenMLP()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    params = from_linen(variables, MLP_SPECS, PATHS)
    np.testing.assert_allclose(mlp(params, x), module.apply(variables, x), atol=1e-6)


def test_weights_from_an_nnx_module():
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))
    module = NNXMLP(nnx.Rngs(0))
    params = from_nnx(module, MLP_SPECS, PATHS)
    np.testing.assert_allclose(mlp(params, x), module(x), atol=1e-6)
    assert float(np.abs(params.up.b).max()) > 0.1


def test_a_function_on_the_way():
    module = NNXMLP(nnx.Rngs(0))
    flipped = MLP_SPECS.replace(up=Linear(ParamSpec((INNER, WIDTH), (None, None)), MLP_SPECS.up.b))
    paths = PATHS | {".up.w": (("one", "kernel"), lambda w: w.T)}
    np.testing.assert_array_equal(from_nnx(module, flipped, paths).up.w, module.one.kernel[...].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".up.w": None}, r"the path map has no entry for parameter \.up\.w"),
        ({".up.w": ("three", "kernel")}, r"no parameter at .*three.* asked for \.up\.w"),
        ({".up.w": ("two", "kernel")}, r"\.up\.w has shape \(10, 6\)"),
    ],
)
def test_a_bad_path_map_is_refused(changes, message):
    paths = {k: v for k, v in (PATHS | changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        from_nnx(NNXMLP(nnx.Rngs(0)), MLP_SPECS, paths)
