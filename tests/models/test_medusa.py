"""Medusa's heads as functions."""

import jax
import numpy as np
import pytest

from models import decoder, medusa
from models.draft_head import draft_vocabulary
from ops.tree import MEDUSA_63
from tests.inference.models import config, weights

TARGET = config()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ids", [None, [1, 5, 9]])
def test_untrained_heads_give_the_targets_logits(shared: bool, ids: list[int] | None) -> None:
    """Blocks start at zero and matrices as copies, so every head starts as the target's own."""
    p = weights(TARGET)
    vocabulary = None if ids is None else draft_vocabulary(p, TARGET, ids)
    size = None if ids is None or shared else len(ids)
    cfg = medusa.MedusaConfig(num_heads=3, shared_head=shared, rank=2, draft_vocab=size)
    start = medusa.init_from_target(p, TARGET, cfg, jax.random.key(0), vocabulary)
    hidden = jax.random.normal(jax.random.key(1), (2, 5, TARGET.hidden_size))
    logits = medusa.head_logits(start, cfg, p, TARGET, vocabulary, hidden)
    expected = decoder.unembed(p, TARGET, hidden)
    expected = expected if ids is None else expected[..., np.array(ids)]
    for head in logits:
        np.testing.assert_allclose(head, expected, atol=1e-5)


def test_low_rank_map_is_linear_in_the_block() -> None:
    cfg = medusa.MedusaConfig(num_heads=2, shared_head=True, rank=2)
    start = medusa.init_from_target(weights(TARGET), TARGET, cfg, jax.random.key(0))
    trained = start.replace(up=jax.random.normal(jax.random.key(2), start.up.shape))
    hidden = jax.random.normal(jax.random.key(1), (4, TARGET.hidden_size))
    out = medusa.head_hidden(trained, cfg, hidden)
    for k in range(2):
        expected = hidden + hidden @ trained.down[k] @ trained.up[k]
        np.testing.assert_allclose(out[k], expected, atol=1e-4)


def test_flops_by_hand() -> None:
    width, vocab = TARGET.hidden_size, TARGET.vocab_size
    cfg = medusa.MedusaConfig(num_heads=4)
    each = 2 * width * width + 2 * width * vocab
    assert medusa.draft_flops(cfg, TARGET, MEDUSA_63) == 4 * each
    cfg = medusa.MedusaConfig(num_heads=4, shared_head=True, rank=3)
    each = 2 * width * width + 2 * 2 * width * 3 + 2 * width * 10
    assert medusa.draft_flops(cfg, TARGET, MEDUSA_63, vocabulary=10) == 4 * each


def test_bad_config_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        medusa.MedusaConfig(num_heads=0)
    vocabulary = draft_vocabulary(weights(TARGET), TARGET, [1, 2])
    with pytest.raises(ValueError, match="make them equal"):
        medusa.init_from_target(
            weights(TARGET), TARGET, medusa.MedusaConfig(), jax.random.key(0), vocabulary
        )
