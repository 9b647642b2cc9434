"""Long texts squeezed into the positions of a model that adds them to its inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafter import NoDrafter
from inference.drafters.lookup import LookupDrafter
from inference.policies.registry import make_policy
from models import decoder
from models.attention import Step
from tests.inference.models import config, engine, prompts, weights

CFG = config(position="learned", max_length=9)


def inputs(lengths: list[int] | None, size: int) -> np.ndarray:
    """Position parts of the first layer's inputs, a row per length."""
    rows = 1 if lengths is None else len(lengths)
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (rows, size))
    step = Step(positions, lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32))
    params, tokens = weights(CFG), jnp.zeros((rows, size), jnp.int32)
    policy = make_policy("interpolated", CFG)
    return np.asarray(policy.embed(params, CFG, tokens, None, step)) - np.asarray(params.embed[0])


def test_texts_within_the_table_are_read_as_they_are():
    for lengths in ([9], [3], None):
        found = inputs(lengths, 9)[0]
        np.testing.assert_allclose(found, weights(CFG).position_embed, atol=1e-6)


def test_longer_texts_are_squeezed():
    """Rows by their own length: 17 positions lie on the rows and halfway between them."""
    table = np.asarray(weights(CFG).position_embed)
    long, short = inputs([17, 9], 17)
    np.testing.assert_allclose(long[::2], table, atol=1e-6)
    np.testing.assert_allclose(long[1::2], (table[1:] + table[:-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(short[:9], table, atol=1e-6)
    np.testing.assert_allclose(inputs(None, 17)[0], long, atol=1e-6)


def test_generation_beyond_the_table():
    """A row as if alone, with a draft and without."""
    policy, width = make_policy("interpolated", CFG), LookupDrafter().width
    plain = engine(CFG, drafter=NoDrafter(width), policy=policy, context_limit=64)
    drafted = engine(CFG, drafter=LookupDrafter(), policy=policy, context_limit=64)
    texts = plain.generate(prompts(), 16).tokens
    assert drafted.generate(prompts(), 16).tokens == texts
    assert plain.generate([prompts()[2]], 16).tokens == [texts[2]]
    text = prompts()[3] + texts[3]
    step = Step(
        jnp.arange(len(text), dtype=jnp.int32)[None], lengths=jnp.asarray([len(text)], jnp.int32)
    )
    out = decoder.forward(
        weights(CFG), CFG, jnp.asarray([text], jnp.int32), step=step, policy=policy
    )
    rows = np.asarray(decoder.unembed(weights(CFG), CFG, out.hidden))[0, 6:-1]
    chosen = np.take_along_axis(rows, np.asarray(texts[3])[:, None], 1)[:, 0]
    assert np.all(chosen >= rows.max(1) - 1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_other_models_are_refused(position: str):
    with pytest.raises(ValueError, match=f"the model has '{position}'"):
        make_policy("interpolated", config(position=position))
