"""RAPID's verification against the official function with recorded randomness."""

import jax
import jax.numpy as jnp
import numpy as np

from ops.acceptance import residual
from ops.transfer import Transfer, emitted_law, shifted_law, verify_transfer_with_uniforms
from tests.goldens import golden


def test_transfer():
    want = golden("rapid", "transfer")
    q = jax.nn.softmax(jnp.asarray(want["draft_logits"]), axis=-1)
    p = jax.nn.softmax(jnp.asarray(want["target_logits"]), axis=-1)
    drafted, uniforms = jnp.asarray(want["candidates"]), jnp.asarray(want["uniforms"])
    g = drafted.shape[1]
    for e, eta in enumerate(want["eta"].tolist()):
        atol = 1e-4 if eta >= 50 else 1e-5
        transfer = Transfer.make(eta, float(want["alpha"]))
        p_hat = shifted_law(p[:, :-1], q, transfer)
        np.testing.assert_allclose(p_hat, want["shifted_target"][e], atol=atol)
        both = jnp.minimum(q, p_hat)
        np.testing.assert_allclose(both.sum(-1), want["expected_accept"][e], atol=atol)
        token = drafted[..., None]
        ratio = jnp.take_along_axis(p_hat, token, 2) / jnp.take_along_axis(q, token, 2)
        accept = jnp.minimum(ratio, 1)[..., 0]
        np.testing.assert_allclose(accept, want["accept_prob"][e], atol=atol, rtol=1e-4)
        np.testing.assert_allclose(residual(p[:, :-1], both), want["residual"][e], atol=10 * atol)
        law = emitted_law(p[:, :-1], q, transfer)
        np.testing.assert_allclose(law, want["emitted"][e], atol=atol)
        close = np.any(np.abs(np.asarray(accept) - want["uniforms"]) < 1e-5, axis=1)
        n, final = verify_transfer_with_uniforms(p, q, drafted, uniforms, transfer)
        np.testing.assert_array_equal(np.asarray(n)[~close], want["n_accepted"][e][~close])
        np.testing.assert_allclose(
            np.asarray(final)[~close], want["official_final_dist"][e][~close], atol=10 * atol
        )
        for row in np.flatnonzero(~close):
            u, cdf = want["sample_uniform"][row], np.cumsum(np.asarray(final)[row])
            if np.abs(cdf - u).min() < 1e-5:
                continue
            k = int(n[row])
            tokens = [*drafted[row, :k].tolist(), int(np.argmax(cdf >= u)), *[-1] * (g - k)]
            assert tokens == want["official_tokens"][e][row].tolist()
