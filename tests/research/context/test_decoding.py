"""Generation under the position schemes: ragged batches, the full forward, drafting."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import NoDrafter
from inference.drafters.draft_model import draft_model
from inference.drafters.lookup import LookupDrafter
from models import clex, decoder
from models.attention import DensePolicy, Step
from models.params import init
from research.context.clex import scheme as clex_schemes
from research.context.clex.scheme import CLEX
from research.context.giraffe.bases import Basis, make_scheme
from tests.inference.models import NEW, ROUNDING, config, engine, prompts, weights

CFG = config()
WIDTH = LookupDrafter().width


def clex_scheme(**changes: Any) -> CLEX:
    """An ODE that has learned something, over three factors of texts of 32 tokens."""
    cfg = clex.CLEXConfig(CFG.rotary_dim, CFG.rope_base, 16, 4, time_dt=0.2, **changes)
    params = init(clex.specs(cfg), jax.random.key(3))
    w_down = 0.1 * jax.random.normal(jax.random.key(4), params.w_down.shape)
    return clex_schemes.make_scheme(params.replace(w_down=w_down), cfg)


def policies() -> dict[str, DensePolicy]:
    """One policy per kind of scheme."""
    basis = Basis(scale=2.0, power=0.1, truncate=16)
    xpos = make_scheme(CFG, Basis(xpos=True), scale_base=24.0, length=64)
    return {
        "giraffe": decoder.default_policy(CFG, make_scheme(CFG, basis)),
        "xpos": decoder.default_policy(CFG, xpos),
        "clex": decoder.default_policy(CFG, clex_scheme(log_scale=True)),
    }


POLICIES = policies()


@functools.cache
def plain(name: str) -> list[list[int]]:
    """Greedy continuations without a drafter, at the width of a draft."""
    return engine(drafter=NoDrafter(WIDTH), policy=POLICIES[name]).generate(prompts(), NEW).tokens


@jax.jit
def full_logits(params: Any, policy: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    out = decoder.forward(params, CFG, tokens, step=Step(positions, lengths=length), policy=policy)
    return decoder.unembed(params, CFG, out.hidden)


@pytest.mark.parametrize("name", POLICIES)
def test_every_token_is_that_of_a_pass_over_the_whole_text(name: str):
    for prompt, new in zip(prompts(), plain(name), strict=True):
        text = np.zeros((1, 32), np.int32)
        text[0, : len(prompt) + NEW] = prompt + new
        length = jnp.asarray([len(prompt) + NEW], jnp.int32)
        logits = full_logits(weights(CFG), POLICIES[name], jnp.asarray(text), length)
        rows = np.asarray(logits)[0, len(prompt) - 1 : len(prompt) + NEW - 1]
        chosen = np.take_along_axis(rows, np.asarray(new)[:, None], 1)[:, 0]
        assert np.all(chosen >= rows.max(axis=1) - ROUNDING)


@pytest.mark.parametrize("name", POLICIES)
def test_a_row_of_a_ragged_batch_is_as_if_alone(name: str):
    eng = engine(drafter=NoDrafter(WIDTH), policy=POLICIES[name])
    for prompt, new in zip(prompts(), plain(name), strict=True):
        assert eng.generate([prompt] * 4, NEW).tokens == [new] * 4


@pytest.mark.parametrize("name", POLICIES)
def test_drafting_changes_nothing(name: str):
    eng = engine(drafter=LookupDrafter(), policy=POLICIES[name])
    found = eng.generate(prompts(), NEW)
    assert found.tokens == plain(name)
    assert found.stats.accepted.sum() > 0


def test_a_draft_model_changes_nothing():
    drafter, params = draft_model(CFG, weights(CFG), CFG, WIDTH - 1, sampled=False)
    name = list(POLICIES)[-1]
    eng = engine(drafter=drafter, drafter_params=params, policy=POLICIES[name])
    found = eng.generate(prompts(), NEW)
    assert found.tokens == plain(name)
    # The draft model has the target's weights but not its positions.
    assert 0 < found.stats.accepted.sum() < found.stats.drafted.sum()


def test_the_schemes_differ():
    texts = [engine(drafter=NoDrafter(WIDTH)).generate(prompts(), NEW).tokens]
    texts += [plain(name) for name in POLICIES]
    assert all(a != b for i, a in enumerate(texts) for b in texts[:i])
