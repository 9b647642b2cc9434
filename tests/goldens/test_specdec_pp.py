"""SpecDec++ against the official head, loss, token mixing and stopping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.drafters.adaptive import Limits, draft_until
from models import acceptance_head
from models.acceptance_head import AcceptanceConfig
from models.layers import Linear
from research.speculative.specdec_pp.objective import (
    IGNORED,
    acceptance_labels,
    acceptance_loss,
    mix_tokens,
)
from tests.goldens import golden


@pytest.fixture(scope="module")
def want() -> dict[str, np.ndarray]:
    return golden("specdec_pp", "head_and_stop")


@pytest.mark.parametrize("tied", [True, False])
def test_head_logits(want, tied):
    w, b = want["res_w"], want["res_b"]
    w, b = (w[None], b[None]) if tied else (want["res_w_untied"], want["res_b_untied"])
    params = acceptance_head.Params(
        Linear(jnp.asarray(w.swapaxes(1, 2)), jnp.asarray(b)),
        Linear(jnp.asarray(want["out_w"].T), jnp.asarray(want["out_b"])),
    )
    cfg = AcceptanceConfig(num_layers=int(want["num_layers"]), tie_blocks=tied)
    got = jax.jit(lambda p, x: acceptance_head.logits(p, cfg, x))(params, want["x"])
    key = "logits_tied" if tied else "logits_untied"
    np.testing.assert_allclose(got, want[key], atol=1e-4)


def test_weighted_soft_loss(want):
    labels = jnp.asarray(want["soft_labels"])
    logits = jnp.asarray(want["logits_tied"]).reshape(*labels.shape, 2)
    got = acceptance_loss(logits, labels, float(want["weight_mismatch"]))
    np.testing.assert_allclose(got, want["loss"], rtol=1e-4)


def test_labels_and_mixing(want):
    p_acc = acceptance_labels(jnp.asarray(want["target_logp"]), jnp.asarray(want["draft_logp"]))
    np.testing.assert_allclose(p_acc, want["p_acc"], atol=1e-6)
    taken = jnp.asarray(want["mix_mask"]).astype(bool)
    tokens, labels = mix_tokens(
        taken, jnp.asarray(want["target_tokens"]), jnp.asarray(want["draft_tokens"]), p_acc
    )
    np.testing.assert_array_equal(tokens, want["mixed_tokens"])
    np.testing.assert_allclose(labels, want["labels_after_mix"], atol=1e-6)
    assert np.all(np.asarray(labels)[np.asarray(taken)] == IGNORED)


@pytest.mark.parametrize("bounds", ["none", "2_20"])
@pytest.mark.parametrize("threshold", ["0.3", "0.5", "0.7"])
def test_stop_counts(want, threshold, bounds):
    """The drafter's own loop, fed with the head's logits as each token is drawn."""
    logits = jnp.asarray(want["head_logits_by_step"])
    rounds, steps, _ = logits.shape
    shortest, longest = (1, steps) if bounds == "none" else map(int, bounds.split("_"))
    accepted = jax.nn.softmax(logits, axis=-1)[..., 1]
    never = jnp.zeros((rounds,), bool)

    def step(count, known):
        known = jnp.where(count > 0, known * accepted[:, count], known)
        return 1.0 - known, never, known

    @jax.jit
    def run(limits):
        first = step(jnp.asarray(0), jnp.ones((rounds,)))
        most = jnp.full((rounds,), steps, jnp.int32)
        return draft_until(step, first, ~never, limits, most)[0]

    got = run(Limits.make(float(threshold), shortest, longest))
    np.testing.assert_array_equal(got, want[f"num_drafted_h{threshold}_bound_{bounds}"])
