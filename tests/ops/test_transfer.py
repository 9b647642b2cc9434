"""Knowledge transfer: the moved law, what is emitted, and what does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.sampling import SamplingParams, warp_logits
from ops.transfer import (
    GUARDS,
    Transfer,
    emitted_law,
    shift_logits,
    shifted_law,
    verify_transfer_greedily,
    verify_transfer_with_uniforms,
)
from ops.verify import LOSSLESS, emitted_tokens, verify

VOCAB = 7


def logits(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, VOCAB)) * 2, jnp.float32)


def laws(seed: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    """Laws p and q."""
    return jax.nn.softmax(logits(seed, *shape), -1), jax.nn.softmax(logits(seed + 1, *shape), -1)


@pytest.mark.parametrize("guard", GUARDS)
def test_without_eta_the_emitted_law_is_the_targets(guard):
    p, q = laws(0, 50)
    none = Transfer.make(0.0, guard=guard)
    np.testing.assert_allclose(shifted_law(p, q, none), p, atol=1e-6)
    np.testing.assert_allclose(emitted_law(p, q, none), p, atol=1e-6)


@pytest.mark.parametrize("guard", GUARDS)
def test_with_eta_the_emitted_law_is_a_law_but_another(guard):
    p, q = laws(0, 50)
    transfer = Transfer.make(5.0, guard=guard)
    law = emitted_law(p, q, transfer)
    np.testing.assert_allclose(law.sum(-1), 1, atol=1e-6)
    assert np.all(law >= 0)
    above = jnp.minimum(q, shifted_law(p, q, transfer)) > p + 1e-6
    differs = np.abs(np.asarray(law - p)).max(-1) > 1e-5
    # Equal exactly where p is never below what is accepted.
    np.testing.assert_array_equal(differs, np.any(above, axis=-1))
    assert differs.any()


@pytest.mark.parametrize("eta", [0.0, 5.0])
def test_the_emitted_law_is_what_accepting_and_resampling_emits(eta):
    p, q = laws(3)
    transfer, rows = Transfer.make(eta), 200_000
    rng = np.random.default_rng(0)
    law = np.asarray(q, np.float64)
    drafted = rng.choice(VOCAB, rows, p=law / law.sum())
    # One accept decision per token suffices: each token's acceptance probability is its own.
    both = np.minimum(q, shifted_law(p, q, transfer))
    uniforms = jnp.asarray(rng.random((rows, 1)), jnp.float32)
    spread = jnp.broadcast_to
    accepted, law = jax.jit(verify_transfer_with_uniforms)(
        spread(p, (rows, 2, VOCAB)), spread(q, (rows, 1, VOCAB)),
        jnp.asarray(drafted)[:, None], uniforms, transfer,
    )  # fmt: skip
    accepted, law = np.asarray(accepted), np.asarray(law)
    assert abs(accepted.mean() - both.sum()) < 5e-3
    rejected = law[accepted == 0]
    got = np.bincount(drafted[accepted == 1], minlength=VOCAB) / rows
    got += rejected.sum(0) / rows
    np.testing.assert_allclose(got, emitted_law(p, q, transfer), atol=5e-3)
    # After all drafted tokens the law is the target's own, not a moved one.
    np.testing.assert_allclose(law[accepted == 1][0], p, atol=1e-7)


@pytest.mark.parametrize("guard", GUARDS)
def test_equal_laws_are_not_moved_and_always_accepted(guard):
    p, _ = laws(0, 1, 4)
    transfer = Transfer.make(20.0, guard=guard)
    np.testing.assert_allclose(shifted_law(p, p, transfer), p, atol=1e-6)
    full = jnp.concatenate([p, p[:, :1]], axis=1)
    n, law = verify_transfer_with_uniforms(
        full, p, jnp.asarray([[0, 1, 2, 3]]), jnp.full((1, 4), 0.9999), transfer
    )
    assert int(n[0]) == 4
    np.testing.assert_allclose(law, p[:, 0], atol=1e-6)


def test_the_guard_leaves_implausible_tokens_bit_for_bit():
    z, (_, q) = logits(0, 20), laws(5, 20)
    p = jax.nn.softmax(z, -1)
    free = shift_logits(z, p, q, Transfer.make(5.0, guard=None)) - z
    np.testing.assert_allclose(free.sum(-1), 0, atol=1e-4)
    teacher = np.asarray(shift_logits(z, p, q, Transfer.make(5.0)))
    low = np.asarray(q < 0.1 * q.max(-1, keepdims=True))
    assert low.any() and not low.all()
    np.testing.assert_array_equal(teacher[low], np.asarray(z)[low])
    np.testing.assert_allclose(teacher[~low], (z + 5 * (q - p))[~low], atol=1e-5)
    shifted = np.asarray(shift_logits(z, p, q, Transfer.make(5.0, guard="shifted")))
    law = jax.nn.softmax(z + 5 * (q - p), -1)
    kept = np.asarray(law < 0.1 * law.max(-1, keepdims=True))
    np.testing.assert_array_equal(shifted[kept], np.asarray(z)[kept])
    assert np.all(shifted[~kept] != np.asarray(z)[~kept])


def test_temperature_is_a_scale_of_the_logits():
    z, zd = logits(0, 5), logits(9, 5)
    heat, eta = 0.7, 5.0
    p, q = jax.nn.softmax(z / heat, -1), jax.nn.softmax(zd / heat, -1)
    raw = jax.nn.softmax((z + eta * heat * (q - p)) / heat, -1)
    np.testing.assert_allclose(shifted_law(p, q, Transfer.make(eta, guard=None)), raw, atol=1e-6)


@pytest.mark.parametrize("guard", ["teacher", None])
def test_a_small_step_brings_the_target_towards_the_drafter(guard):
    p, q = laws(0, 50)

    def divergence(eta):
        return jnp.sum(
            q * (jnp.log(q) - jnp.log(shifted_law(p, q, Transfer.make(eta, guard=guard)))), -1
        )

    assert np.all(divergence(0.01) <= divergence(0.0) + 1e-6)
    assert np.mean(divergence(0.01) < divergence(0.0)) > 0.9
    np.testing.assert_allclose(
        jnp.sum(jnp.abs(shifted_law(q, q, Transfer.make(0.01, guard=guard)) - q)), 0, atol=1e-5
    )


def test_tokens_that_warping_removed_stay_out():
    p = warp_logits(logits(0, 30), 1.0, top_k=3)
    q = warp_logits(logits(1, 30), 1.0, top_k=3)
    transfer = Transfer.make(10.0)
    p_hat = np.asarray(shifted_law(p, q, transfer))
    np.testing.assert_array_equal(p_hat[np.asarray(p) == 0], 0)
    law = np.asarray(emitted_law(p, q, transfer))
    assert not np.any(np.isnan(law)) and np.all(law[np.asarray(p) == 0] == 0)
    np.testing.assert_allclose(law.sum(-1), 1, atol=1e-6)


def test_greedy_verification_takes_the_best_of_the_moved_logits():
    z, q = logits(0, 1, 4), laws(7, 1, 3)[1]
    transfer = Transfer.make(40.0)
    p = jax.nn.softmax(z[:, :-1], -1)
    best = jnp.argmax(shift_logits(z[:, :-1], p, q, transfer), -1)
    assert np.any(best != jnp.argmax(z[:, :-1], -1))
    n, token = verify_transfer_greedily(z, q, best, transfer)
    assert (int(n[0]), int(token[0])) == (3, int(jnp.argmax(z[0, 3])))
    wrong = best.at[0, 1].add(1) % VOCAB
    n, token = verify_transfer_greedily(z, q, wrong, transfer)
    assert (int(n[0]), int(token[0])) == (1, int(best[0, 1]))
    cut = jnp.asarray([[True, False, False]])
    n, token = verify_transfer_greedily(z, q, best, transfer, cut)
    # Where nothing was drafted there is nothing to move towards.
    assert (int(n[0]), int(token[0])) == (1, int(jnp.argmax(z[0, 1])))


def chain_case(rows: int, length: int = 3):
    parent = jnp.arange(-1, length)[None]
    q = jnp.broadcast_to(laws(2)[1], (rows, length + 1, VOCAB))
    keys = jax.random.split(jax.random.key(1), rows)
    drafted = jax.vmap(lambda k: jax.random.categorical(k, jnp.log(q[0, 0]), shape=(length,)))(keys)
    tokens = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), drafted.astype(jnp.int32)], 1)
    return tokens, parent, jnp.ones_like(tokens, bool), q


def run(mode, temperature, seeds, transfer=None):
    tokens, parent, valid, q = chain_case(len(seeds))
    z = jnp.broadcast_to(logits(2), (len(seeds), 4, VOCAB))
    verdict = verify(
        mode, tokens, parent, valid, z, SamplingParams.make(temperature), seeds,
        jnp.zeros_like(seeds), q, transfer=transfer,
    )  # fmt: skip
    return verdict, emitted_tokens(tokens, verdict)


def test_the_mode_without_eta_is_the_lossless_chain_rule():
    seeds = jnp.arange(64)
    a, _ = run("chain", 0.8, seeds)
    b, _ = run("transfer", 0.8, seeds, Transfer.make(0.0))
    np.testing.assert_array_equal(a.num_accepted, b.num_accepted)
    np.testing.assert_array_equal(a.path, b.path)
    # The residual is the same up to rounding, so draws hardly ever differ.
    assert np.mean(a.next_token == b.next_token) > 0.95
    assert not LOSSLESS["transfer"] and LOSSLESS["chain"]


def test_the_mode_at_temperature_0_without_eta_is_greedy():
    seeds = jnp.arange(64)
    tokens, parent, valid, q = chain_case(64)
    z = jnp.broadcast_to(logits(2), (64, 4, VOCAB))
    right = jax.random.bernoulli(jax.random.key(0), 0.7, tokens.shape)
    tokens = jnp.where(right, jnp.argmax(z, axis=-1).astype(jnp.int32), tokens)
    given = (tokens, parent, valid, z, SamplingParams.make(), seeds, jnp.zeros_like(seeds))
    want = verify("greedy", *given)
    got = verify("transfer", *given, q, transfer=Transfer.make(0.0))
    np.testing.assert_array_equal(got.path, want.path)
    np.testing.assert_array_equal(got.next_token, want.next_token)
    assert {0, 1, 2, 3} == set(want.num_accepted.tolist())


def test_more_is_accepted_with_a_moderate_eta():
    seeds = jnp.arange(512)
    plain = run("transfer", 1.0, seeds, Transfer.make(0.0))[0].num_accepted
    moved = run("transfer", 1.0, seeds, Transfer.make(2.0))[0].num_accepted
    assert moved.mean() > plain.mean()


def test_bad_settings_are_refused():
    for bad in ({"eta": -1.0}, {"alpha": 2.0}, {"guard": "student"}):
        with pytest.raises((ValueError, TypeError), match=r"transfer needs eta|guard"):
            Transfer.make(**bad)
    seeds = jnp.arange(2)
    with pytest.raises(ValueError, match="needs its settings"):
        run("transfer", 1.0, seeds)
    with pytest.raises(ValueError, match="other modes take none"):
        run("chain", 1.0, seeds, Transfer.make())
