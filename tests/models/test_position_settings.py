"""Decoders without rotations: ALiBi, sinusoids, learned tables between their rows, nothing."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import decoder
from models.alibi import alibi_slopes
from models.attention import DensePolicy, Step
from models.hf import load_hf, save_hf
from models.hf_config import from_hf, to_hf
from models.position_embeddings import grid_sinusoids, learned, resized, sinusoids
from ops.attention import AttentionMask, attention
from tests.models import tiny

run = jax.jit(decoder.forward, static_argnums=1)


def inputs(length: int = 7) -> list[jax.Array]:
    """q, k, v of two rows, with two key heads for four query heads."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, length, h, 4)), jnp.float32) for h in (4, 2, 2)]


# ALiBi.
def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(4), [2.0**-i for i in (2, 4, 6, 8)])
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-i for i in (2, 4, 6, 8, 1, 3)])


@pytest.mark.parametrize("first", [0, 5000])
def test_attention_falls_off_with_distance(first: int):
    """The two channels are the bias of the definition, also far out and for grouped heads."""
    cfg, (q, k, v) = tiny.config(position="alibi"), inputs()
    positions = first + jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
    policy, step = DensePolicy(), Step(positions)
    found = policy.attend(None, policy.prepare(cfg, step), q, k, v, None, step, None).out
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
    distance = np.arange(7)[:, None] - np.arange(7)[None]
    scores = np.einsum("bthd,bshd->bhts", q, k) / 2
    scores = scores - alibi_slopes(4)[None, :, None, None] * distance
    scores = np.where(distance >= 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(found, wanted, atol=1e-3 if first else 1e-5)
    assert policy.key_width(cfg) == 6


def test_positions_are_exact_in_bfloat16():
    cfg = tiny.config(position="alibi")
    positions = jnp.asarray([[0, 255, 256, 4095, 65_535]], jnp.int32)
    channels = DensePolicy().prepare(cfg, Step(positions))
    k = channels.rotate_k(jnp.zeros((1, 5, 1, 4), jnp.bfloat16))[0, :, 0, 4:]
    q = channels.rotate_q(jnp.zeros((1, 5, 4, 4), jnp.bfloat16))[0, 0, :, 4:]
    found = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    np.testing.assert_array_equal(found, 2 * alibi_slopes(4)[:, None] * np.asarray(positions))


# What is added to the inputs.
def test_sinusoids():
    found = np.asarray(sinusoids(jnp.asarray([0.0, 2.5]), 6))
    rates = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    wanted = [[f(x * r) for r in rates for f in (math.sin, math.cos)] for x in (0.0, 2.5)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    grid = np.asarray(grid_sinusoids((2, 3), 8))
    np.testing.assert_allclose(grid[1, 2, :4], np.asarray(sinusoids(jnp.asarray([1]), 4))[0])
    np.testing.assert_allclose(grid[1, 2, 4:], np.asarray(sinusoids(jnp.asarray([2]), 4))[0])
    with pytest.raises(ValueError, match="a width that 4 divides, got 6"):
        grid_sinusoids((2, 3), 6)


def test_sinusoids_are_as_large_as_initial_embeddings():
    cfg = tiny.config(position="sinusoidal", init_stddev=0.5)
    params, tokens = tiny.weights(cfg), tiny.tokens()
    at = jnp.arange(10)[None]
    added = decoder.embed(params, cfg, tokens, at) - params.embed[tokens]
    np.testing.assert_allclose(added[0], 0.5 * sinusoids(at, 16)[0], atol=1e-6)
    with pytest.raises(ValueError, match="sinusoids need an even hidden_size, got 15"):
        tiny.config(position="sinusoidal", hidden_size=15)


def test_between_the_rows_of_a_table():
    table = jnp.asarray([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
    found = learned(table, jnp.asarray([[0.0, 0.25, 1.5, 2.0]]))
    np.testing.assert_allclose(found[0], [[0, 1], [0.5, 2], [3, 4], [4, 3]])
    np.testing.assert_array_equal(learned(table, jnp.asarray([2, 0])), table[jnp.asarray([2, 0])])


def test_a_resized_grid_keeps_its_corners():
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    larger = np.asarray(resized(grid, (5, 3)))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_allclose(larger[corner], grid[corner], atol=1e-6)
    np.testing.assert_allclose(larger[2, 1], (grid[1, 0] + grid[1, 1]) / 2, atol=1e-6)
    np.testing.assert_allclose(larger[1, 0], (grid[0, 0] + grid[1, 0]) / 2, atol=1e-6)
    np.testing.assert_allclose(resized(grid, (3, 2)), grid, atol=1e-6)


# Models.
def test_without_positions_only_the_set_of_earlier_tokens_counts():
    """In one layer, and in no other setting."""
    tokens = tiny.tokens(1, 6)
    swapped = tokens[:, jnp.asarray([1, 0, 2, 3, 4, 5])]
    for position in decoder.POSITIONS:
        cfg = tiny.config(position=position, num_layers=1)
        a, b = (run(tiny.weights(cfg), cfg, x).hidden[:, -1] for x in (tokens, swapped))
        assert (np.abs(a - b).max() < 1e-5) == (position == "none"), position


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"position one of rope, learned, .*got 'rms', 'xpos'"):
        tiny.config(position="xpos")


@pytest.mark.parametrize("position", ["none", "alibi", "sinusoidal"])
def test_what_no_family_has_is_written_in_a_form_of_its_own(position: str, tmp_path: pathlib.Path):
    cfg = tiny.config(position=position, norm="layer", gated_mlp=False, windows=(4, None, 4))
    save_hf(tmp_path / "model", tiny.weights(cfg), cfg)
    params, found = load_hf(tmp_path / "model")
    assert found == cfg
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(tiny.weights(cfg)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_form_of_another_version_is_refused():
    told = to_hf(tiny.config(position="none"))
    assert told["model_type"] == "longreach" and from_hf(told) == tiny.config(position="none")
    for wrong in ({}, {**told["decoder"], "colour": 1}):
        with pytest.raises(ValueError, match="no decoder of this version"):
            from_hf({**told, "decoder": wrong})


def test_a_scale_that_is_given_takes_the_place_of_the_width():
    """What two more channels rely on: the scale is that of the head's own width."""
    q, k, v = inputs()
    cfg = dataclasses.replace(tiny.config(), position="none")
    step = Step(jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7)))
    found = DensePolicy().attend(None, None, q, k, v, None, step, None).out
    wanted = attention(q, k, v, mask=AttentionMask(causal=True), scale=0.5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert DensePolicy().prepare(cfg, step) is None
