import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import acceptance_head, params
from models.acceptance_head import AcceptanceConfig
from tests.inference.models import config

DRAFT = config()
HIDDEN = jax.random.normal(jax.random.key(1), (3, 5, DRAFT.hidden_size))


def logits(cfg: AcceptanceConfig, weights: acceptance_head.Params) -> jax.Array:
    return jax.jit(lambda p: acceptance_head.logits(p, cfg, HIDDEN))(weights)


def weights(cfg: AcceptanceConfig) -> acceptance_head.Params:
    return params.init(acceptance_head.specs(cfg, DRAFT), jax.random.key(0))


@pytest.mark.parametrize(("depth", "equal"), [(1, True), (3, False)])
def test_tied_and_untied_heads_agree_only_with_one_block(depth, equal):
    untied, tied = (AcceptanceConfig(depth, tie_blocks=tie) for tie in (False, True))
    first = weights(untied)
    shared = jax.tree.map(lambda x: x[:1], first.blocks)
    a, b = logits(untied, first), logits(tied, first.replace(blocks=shared))
    assert np.array_equal(a, b) == equal
    # Three copies of one block are the tied head.
    copies = jax.tree.map(lambda x: jnp.repeat(x, depth, axis=0), shared)
    np.testing.assert_allclose(logits(untied, first.replace(blocks=copies)), b, atol=1e-6)


def test_the_head_runs_in_float32_and_starts_as_linear_layers_do():
    cfg = AcceptanceConfig()
    start = weights(cfg)
    bound = DRAFT.hidden_size**-0.5
    for leaf in jax.tree.leaves(start):
        assert 0 < np.abs(leaf).max() <= bound
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start)
    assert logits(cfg, low).dtype == jnp.float32
    p = acceptance_head.acceptance(start, cfg, HIDDEN)
    assert p.shape == (3, 5)
    np.testing.assert_allclose(p, jax.nn.softmax(logits(cfg, start))[..., 1], atol=1e-6)


@pytest.mark.parametrize("changes", [{"num_layers": 0}, {"rejection_weight": 0.0}])
def test_heads_of_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="an acceptance head needs"):
        AcceptanceConfig(**changes)
