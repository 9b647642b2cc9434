"""Work counted from a program against counts by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from models import decoder
from models.flops import layer_flops, product_depth, product_flops
from tests.inference.models import config, weights


def test_products_by_hand() -> None:
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert product_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    assert product_flops(jax.jit(lambda a, b: jnp.sin(a) @ b + 1), a, b) == 2 * 3 * 5 * 7
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    assert product_flops(batched, jnp.ones((4, 3, 5)), jnp.ones((4, 5, 7))) == 4 * 2 * 3 * 5 * 7
    assert product_flops(jnp.sin, a) == 0


def test_loops_count_every_turn_and_branches_the_dearest() -> None:
    a = jnp.ones((4, 4))
    one = 2 * 4**3
    step = lambda x, _: (x @ a, None)
    assert product_flops(lambda x: jax.lax.scan(step, x, None, length=6)[0], a) == 6 * one
    assert product_flops(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ a, x), a) == 3 * one
    branch = lambda i, x: jax.lax.switch(i, [lambda x: x, lambda x: x @ a, lambda x: x @ a @ a], x)
    assert product_flops(branch, jnp.int32(0), a) == 2 * one
    endless = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ a, x)
    with pytest.raises(ValueError, match="while loop"):
        product_flops(endless, a)
    assert product_flops(endless, a, turns=2.5) == 2.5 * one


def test_loops_around_products() -> None:
    a = jnp.ones((4, 4))
    turn = lambda x, _: (x @ a, None)

    def depth(function: Callable[[jax.Array], Any]) -> int:
        return product_depth(jax.make_jaxpr(function)(a).jaxpr)

    def repeat(x: jax.Array, n: int) -> jax.Array:
        return jax.lax.scan(turn, x, None, length=n)[0]

    def until(x: jax.Array, inner: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, inner, x)

    assert depth(jnp.sin) == 0 and depth(jax.jit(lambda x: x @ a)) == 0
    assert depth(lambda x: repeat(x, 3)) == 1 and depth(lambda x: repeat(x, 1)) == 0
    assert depth(lambda x: until(x, lambda x: x + 1) @ a) == 0
    assert depth(lambda x: until(x, lambda x: repeat(x, 2)) @ a) == 2

    def kernel(x: Any, out: Any) -> None:
        out[...] = 2 * x[...]

    double = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype))
    assert depth(double) == 0 and depth(lambda x: until(x, double)) == 1


def test_a_decoder_costs_its_layers_and_its_head() -> None:
    cfg = config()
    tokens = 6

    def run(params: decoder.Params, ids: jax.Array) -> jax.Array:
        return decoder.unembed(params, cfg, decoder.forward(params, cfg, ids).hidden)

    # Products run over all pairs of positions, those that the mask hides included.
    layers = cfg.num_layers * layer_flops(cfg, tokens - 1)
    head = 2 * cfg.hidden_size * cfg.vocab_size
    ids = jnp.zeros((1, tokens), jnp.int32)
    assert product_flops(run, weights(cfg), ids) == tokens * (layers + head)
