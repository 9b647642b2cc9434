"""Warping against a sorting reference, the drawing functions, and the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ops.sampling import (
    SamplingParams,
    Use,
    request_key,
    sample,
    sample_without_replacement,
    warp_logits,
)

DRAWS = 20_000


def _reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One row's law by sorting, in float64."""
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    if top_k:
        scaled[order[top_k:]] = -np.inf
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    if top_p < 1:
        probs[order[before >= top_p]] = 0
    return probs / probs.sum()


_jitted_warp = jax.jit(warp_logits)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]), min_size=4, max_size=4),
    top_k=st.lists(st.integers(0, 33), min_size=4, max_size=4),
    top_p=st.lists(st.sampled_from([1e-6, 0.3, 0.8, 0.999, 1.0]), min_size=4, max_size=4),
)
def test_warp_equals_sorting(
    seed: int, temperature: list[float], top_k: list[int], top_p: list[float]
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (4, 32)).astype(np.float32)
    found = _jitted_warp(
        jnp.asarray(logits), jnp.asarray(temperature), jnp.asarray(top_k), jnp.asarray(top_p)
    )
    want = [_reference(*row) for row in zip(logits, temperature, top_k, top_p, strict=True)]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_one_setting_for_all_rows_and_more_axes() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (2, 3, 16)).astype(np.float32)
    found = SamplingParams.make(0.7, 5, 0.9).warp(jnp.asarray(logits))
    want = [[_reference(x, 0.7, 5, 0.9) for x in rows] for rows in logits]
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_ties_at_the_boundary_are_all_kept() -> None:
    logits = jnp.asarray([1.0, 2.0, 2.0, 2.0])
    third = np.asarray([0, 1, 1, 1]) / 3
    np.testing.assert_allclose(warp_logits(logits, 1.0, top_k=1), third, atol=1e-6)
    np.testing.assert_allclose(warp_logits(logits, 1.0, top_p=0.1), third, atol=1e-6)
    np.testing.assert_array_equal(warp_logits(logits, 0.0), [0, 1, 0, 0])


def test_extreme_inputs_stay_finite() -> None:
    logits = jnp.asarray([[-jnp.inf, 3e38, -3e38, 0.0], [-jnp.inf, 1.0, 1.0, -jnp.inf]])
    for temperature in (1e-38, 1.0, 1e30):
        probs = warp_logits(logits, temperature, top_k=3, top_p=0.9)
        np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)
        np.testing.assert_array_equal(probs[:, 0], 0)
    half = warp_logits(jnp.asarray([0.0, 1.0], jnp.bfloat16), 1.0)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, jax.nn.softmax(jnp.asarray([0.0, 1.0])), atol=1e-6)


def test_controls_are_data() -> None:
    """New values do not recompile; a step that no row uses is not in the program."""
    traces = []

    @jax.jit
    def warp(params: SamplingParams, x: jax.Array) -> jax.Array:
        traces.append(1)
        return params.warp(x)

    logits = jnp.arange(8.0)
    for temperature, top_k, top_p in [(0.0, 3, 0.9), (0.5, 2, 0.5), (2.0, 7, 0.1)]:
        warp(SamplingParams.make(temperature, top_k, top_p), logits)
    assert len(traces) == 1
    loops = {
        setting: str(jax.make_jaxpr(SamplingParams.make(1.0, *setting).warp)(logits)).count("scan[")
        for setting in [(0, 1.0), (4, 1.0), (0, 0.5), (4, 0.5)]
    }
    assert loops == {(0, 1.0): 0, (4, 1.0): 1, (0, 0.5): 1, (4, 0.5): 2}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": [1.0, -1.0]}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.1}, "top_p must lie above 0"),
        ({"top_p": float("nan")}, "top_p must lie above 0"),
    ],
)
def test_bad_settings(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.make(**settings_)


def test_default_is_greedy() -> None:
    np.testing.assert_array_equal(
        SamplingParams.make().warp(jnp.asarray([0.0, 5.0, 5.0])), [0, 1, 0]
    )


def _keys(use: Use) -> jax.Array:
    return jax.vmap(lambda seed: request_key(seed, 3, use))(jnp.arange(DRAWS))


def test_sample_has_the_law() -> None:
    law = np.asarray([0.5, 0.0, 0.3, 0.15, 0.05], np.float32)
    drawn = jax.vmap(sample, (0, None))(_keys(Use.TARGET), jnp.asarray(law))
    seen = np.bincount(drawn, minlength=5)
    assert seen[1] == 0
    expected = law[law > 0].astype(np.float64)
    assert stats.chisquare(seen[law > 0], expected / expected.sum() * DRAWS).pvalue > 1e-4


def test_a_draw_is_that_of_the_gumbel_trick() -> None:
    probs = jnp.asarray(np.random.default_rng(0).dirichlet([0.3] * 40), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 500)

    def gumbel(key: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.log(probs) + jax.random.gumbel(key, probs.shape, jnp.float32))

    drawn = jax.vmap(sample, (0, None))(keys, probs)
    np.testing.assert_array_equal(drawn, jax.vmap(gumbel)(keys))
    assert len(set(np.asarray(drawn).tolist())) > 10


def test_sample_of_a_point_mass() -> None:
    drawn = jax.vmap(sample, (0, None))(_keys(Use.DRAFT)[:500], jnp.asarray([0.0, 0.0, 1.0, 0.0]))
    assert set(np.asarray(drawn).tolist()) == {2}


def test_draws_without_replacement_have_the_law_of_successive_draws() -> None:
    law = np.asarray([0.5, 0.3, 0.15, 0.05])
    draw = jax.vmap(lambda key: sample_without_replacement(key, jnp.asarray(law, jnp.float32), 2))
    tokens, valid = draw(_keys(Use.DRAFT))
    assert bool(valid.all())
    seen = np.bincount(np.asarray(tokens[:, 0] * 4 + tokens[:, 1]), minlength=16).reshape(4, 4)
    want = law[:, None] * law[None] / (1 - law)[:, None] * (1 - np.eye(4))
    assert np.trace(seen) == 0
    assert stats.chisquare(seen[want > 0], want[want > 0] / want.sum() * DRAWS).pvalue > 1e-4


def test_draws_without_replacement_stop_where_the_law_ends() -> None:
    law = jnp.asarray([0.0, 0.25, 0.0, 0.75])
    tokens, valid = sample_without_replacement(request_key(0, 0, Use.DRAFT), law, 3)
    assert set(np.asarray(tokens[:2]).tolist()) == {1, 3}
    assert np.asarray(tokens)[2] == -1
    assert np.asarray(valid).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="cannot draw 5 distinct tokens out of 4"):
        sample_without_replacement(request_key(0, 0, Use.DRAFT), law, 5)


def test_keys_tell_every_part_apart_and_ignore_the_batch() -> None:
    parts = [(5, 2, use, rank) for use in Use for rank in (0, 1)]
    parts += [(6, 2, 0, 0), (5, 3, 0, 0), (2, 5, 0, 0)]
    alone = [np.asarray(jax.random.key_data(request_key(*part))) for part in parts]
    assert len({tuple(x.tolist()) for x in alone}) == len(parts)
    batch = jax.vmap(request_key)(*(jnp.asarray(x) for x in zip(*parts, strict=True)))
    np.testing.assert_array_equal(jax.random.key_data(batch), alone)
