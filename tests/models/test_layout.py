"""Matrices by rows: the same numbers, read another way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafters.draft_model import draft_model
from inference.drafters.lookup import LookupDrafter
from inference.engine import make_engine
from models import decoder
from models.layers import Linear
from models.layout import by_rows, for_decoding
from models.load import Model
from models.params import init
from ops.platform import target
from ops.weights import FEW, Transposed, WeightLeaf, matmul, take, times_rows
from tests.inference.models import VOCAB, assert_greedy, config, letters, weights


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


@pytest.mark.parametrize(
    "lead", [(), (1,), (2,), (5,), (3, 5), (26,), (2, FEW // 2), (FEW + 1,)], ids=str
)
@pytest.mark.parametrize("outer", [24, 22, 23])
def test_products_and_rows_are_those_of_the_plain_matrix(lead: tuple[int, ...], outer: int):
    w, x, y = normal(6, outer), normal(*lead, 6), normal(*lead, outer)
    turned = Transposed(w.T)
    np.testing.assert_allclose(matmul(x, turned), x @ w, atol=2e-6)
    np.testing.assert_allclose(matmul(y, turned, transpose=True), y @ w.T, atol=5e-6)
    np.testing.assert_allclose(matmul(x, w.T, transpose=True), x @ w, atol=2e-6)
    ids = jnp.arange(np.prod(lead, dtype=int), dtype=jnp.int32).reshape(lead) % 6
    np.testing.assert_array_equal(take(turned, ids), take(w, ids))
    assert turned.nbytes() == w.nbytes and turned.nbits() == 8 * w.nbytes


def test_products_keep_their_dtype():
    assert (
        matmul(normal(3, 6, dtype=jnp.bfloat16), Transposed(normal(8, 6, dtype=jnp.bfloat16))).dtype
        == jnp.bfloat16
    )


def parts_of(rows: int, platform: str) -> bool:
    """Whether the product of so many rows is cut into parts."""
    with target(platform):
        return "8,1,6" in str(jax.make_jaxpr(times_rows)(normal(rows, 6), normal(8, 6)))


def test_products_of_a_few_rows_on_a_cpu_are_cut_into_parts():
    assert [parts_of(rows, "cpu") for rows in (1, 2, FEW, FEW + 1)] == [False, True, True, False]
    assert not parts_of(2, "tpu") and not parts_of(2, "gpu")


def test_numbers_of_rows_that_are_slow_on_a_cpu_are_filled_up():
    def rows_of(count: int) -> int:
        with target("cpu"):
            jaxpr = jax.make_jaxpr(times_rows)(normal(count, 6), normal(8, 6))
        (product,) = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return max(x.aval.shape[0] for x in product.invars if x.aval.ndim == 2)

    assert [rows_of(n) for n in (2, 4, 5, 8, 9, 26, 31)] == [2, 4, 8, 8, 16, 32, 32]


def test_matrices_of_layers_are_turned_and_nothing_else():
    params = decoder.unstack(weights(config(qkv_bias=True)))
    turned = by_rows(params)
    layer, plain = turned.segments[0].layers, params.segments[0].layers
    assert isinstance(layer.mlp.up.w, Transposed) and isinstance(layer.attn.q.w, Transposed)
    np.testing.assert_array_equal(layer.attn.q.w.rows, plain.attn.q.w.T)
    assert layer.attn.q.b is plain.attn.q.b and turned.embed is params.embed
    again = by_rows(turned)
    assert again.segments[0].layers.mlp.up.w is layer.mlp.up.w  # a codec's matrix stays
    stacked = by_rows(init(decoder.specs(config()), jax.random.key(0)))
    assert not any(isinstance(x, WeightLeaf) for x in leaves(stacked))
    with target("tpu"):
        assert by_rows(params) is params


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, WeightLeaf))


@pytest.mark.parametrize("drafted", [False, True], ids=["lookup", "draft model"])
def test_texts_are_those_of_the_plain_layout(drafted: bool):
    model = for_decoding(Model(weights(config()), config(), letters(VOCAB), "tiny"))
    drafter: Any = LookupDrafter(4, (2, 1))
    params: Any = None
    if drafted:
        small = config(num_layers=1)
        drafter, params = draft_model(config(), weights(small, 1), small)
        params = by_rows(params)
        assert any(isinstance(x, WeightLeaf) for x in leaves(params))
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    prompts = [[1, 2, 3, 1, 2], [5], [7, 7, 7, 7]]
    made = engine.generate(prompts, 16)
    assert sum(made.stats.drafted) > 0
    for prompt, new in zip(prompts, made.tokens, strict=True):
        assert_greedy(config(), prompt, new)


def test_a_model_for_decoding_is_the_same_function():
    model = Model(weights(config()), config(), letters(VOCAB), "tiny")
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % VOCAB
    turned = for_decoding(model)
    assert sum(isinstance(x, WeightLeaf) for x in leaves(turned.params)) == 7 * config().num_layers
    assert isinstance(turned.params.segments[0].layers.mlp.gate, Linear)
    ours, plain = (
        decoder.forward(p, model.cfg, tokens).hidden for p in (turned.params, model.params)
    )
    np.testing.assert_allclose(ours, plain, atol=2e-5)
