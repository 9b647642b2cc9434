"""Clover's heads as functions: identities, causality, the loss's gradients, FLOPs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import clover, decoder, params
from models.draft_head import draft_logits, draft_vocabulary, frequent_tokens, head_rows, spread
from models.layers import Linear
from ops.tree import EAGLE_25, tree_from_paths
from ops.weights import Transposed
from tests.inference.models import config, weights

TARGET = config(tied=False)
CFG = clover.CloverConfig(num_heads=3, num_layers=1)
T = 9


def inputs(key: int = 0) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(key))
    return tuple(jax.random.normal(k, (1, T, TARGET.hidden_size)) for k in keys)


def random_heads(cfg: clover.CloverConfig = CFG) -> clover.Params:
    start = clover.init_from_target(weights(TARGET), TARGET, cfg, jax.random.key(1))
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), start
    )


def test_init_copies_the_target() -> None:
    target = params.init(decoder.specs(TARGET), jax.random.key(0))
    for given in (target, decoder.unstack(target)):
        start = clover.init_from_target(given, TARGET, CFG, jax.random.key(1))
        last = jax.tree.map(lambda x: x[-1], target.segments[0].layers)
        jax.tree.map(np.testing.assert_array_equal, start.augment.segments[0].layers, last)
        np.testing.assert_array_equal(start.output_norm.scale, target.final_norm.scale)
    assert start.entry is not None and start.later is not None
    width, noise = TARGET.hidden_size, np.asarray(start.entry.q.w) - np.eye(TARGET.hidden_size)
    assert 0 <= noise.min() and 0.009 < noise.max() < 0.01
    assert np.asarray(start.entry.v.w).max() < 0.01
    later = np.asarray(start.later.w) - np.eye(2 * width, width)  # [I; 0]
    assert 0 <= later.min() and later.max() < 0.01


def test_exact_identities_make_all_heads_equal() -> None:
    start = random_heads()
    width = TARGET.hidden_size
    eye, zero = jnp.eye(width), jnp.zeros((width,))

    def still(p: clover.AttentionDecoder | None) -> clover.AttentionDecoder:
        assert p is not None
        return p.replace(v=Linear(jnp.zeros((width, width)), zero))

    start = start.replace(
        entry=still(start.entry),
        regressive=still(start.regressive),
        first=Linear(eye, zero),
        later=Linear(jnp.eye(2 * width, width), zero),
    )
    hidden, embeds = inputs()
    assert start.entry is not None
    np.testing.assert_array_equal(
        clover.attention_decoder(start.entry, TARGET, hidden, embeds), hidden
    )
    out = clover.head_hidden(start, CFG, TARGET, hidden, embeds)
    np.testing.assert_allclose(out[1], out[0], atol=1e-6)
    np.testing.assert_allclose(out[2], out[0], atol=1e-6)


def test_cosine_weights() -> None:
    q, k = (10 * jax.random.normal(jax.random.key(i), (50, 4, 3)) for i in range(2))
    weight = clover.cosine_weights(q, k, 1e-6)
    assert float(jnp.max(jnp.abs(weight))) <= 1 + 1e-6
    np.testing.assert_allclose(clover.cosine_weights(q, q, 1e-6), 1.0, atol=1e-6)
    np.testing.assert_allclose(clover.cosine_weights(7 * q, 0.1 * k, 1e-6), weight, atol=1e-6)
    zero = clover.cosine_weights(jnp.zeros_like(q), k, 1e-6)
    np.testing.assert_array_equal(zero, 0.0)
    slope = jax.grad(lambda q: jnp.sum(clover.cosine_weights(q, k, 1e-6)))(jnp.zeros_like(q))
    assert bool(jnp.all(jnp.isfinite(slope)))


def test_the_token_scale_is_a_reparametrisation() -> None:
    """Heads that read scaled tokens equal heads whose maps of tokens are scaled."""
    start = random_heads()
    hidden, embeds = inputs()
    scaled = dataclasses.replace(CFG, token_scale=8.0)

    def fold(p: clover.AttentionDecoder | None) -> clover.AttentionDecoder:
        assert p is not None
        return p.replace(v=Linear(8 * p.v.w, p.v.b))

    assert start.later is not None
    rows = jnp.arange(2 * TARGET.hidden_size)[:, None] < TARGET.hidden_size
    folded = start.replace(
        entry=fold(start.entry),
        regressive=fold(start.regressive),
        later=Linear(jnp.where(rows, 1.0, 8.0) * start.later.w, start.later.b),
    )
    got = clover.head_hidden(start, scaled, TARGET, hidden, embeds)
    want = clover.head_hidden(folded, CFG, TARGET, hidden, embeds)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(got - clover.head_hidden(start, CFG, TARGET, hidden, embeds)).max()) > 0.1


def test_values_scale_with_the_token() -> None:
    p = random_heads().entry
    assert p is not None
    p = dataclasses.replace(p, k=Linear(p.k.w), v=Linear(p.v.w))  # without biases
    hidden, embeds = inputs()
    once = clover.attention_decoder(p, TARGET, hidden, embeds) - hidden
    thrice = clover.attention_decoder(p, TARGET, hidden, 3 * embeds) - hidden
    np.testing.assert_allclose(thrice, 3 * once, atol=1e-5)


@pytest.mark.parametrize("variant", ["clover2", "clover1"])
def test_causality(variant: Any) -> None:
    """Token s + 1 and state s reach rows s on of head 1; head i at s stops at token s + i."""
    cfg = dataclasses.replace(CFG, variant=variant)
    p = random_heads(cfg)
    hidden, embeds = inputs()
    run = jax.jit(lambda hidden, embeds: clover.head_hidden(p, cfg, TARGET, hidden, embeds)[:, 0])
    base = run(hidden, embeds)
    at = 5
    by_token = np.any(run(hidden, embeds.at[0, at].add(1.0)) != base, axis=-1)
    by_state = np.any(run(hidden.at[0, at].add(1.0), embeds) != base, axis=-1)
    for i in range(cfg.num_heads):
        assert not by_state[i, :at].any() and by_state[i, at:].all()
        assert not by_token[i, : at - i].any()
        assert by_token[i, at - i]  # embeds[s] is the token after s, so row at - i reads it last


def test_second_head_reads_the_guess() -> None:
    p = random_heads()
    state, embed = inputs()[0][0], inputs(1)[0][0]
    _, first = clover.head(p, CFG, TARGET, state, embed, 1)
    _, again = clover.head(p, CFG, TARGET, state, 2 + embed, 1)
    np.testing.assert_array_equal(first, again)
    _, first = clover.head(p, CFG, TARGET, state, embed, 2)
    _, again = clover.head(p, CFG, TARGET, state, 2 + embed, 2)
    assert float(jnp.max(jnp.abs(first - again))) > 1e-3


def test_flops_by_hand() -> None:
    """Two levels, three expanded nodes: root, then both its children."""
    tree = tree_from_paths([(0,), (1,), (0, 0), (1, 0)])
    d, v, fed, context = TARGET.hidden_size, 10, 2.0, 7
    kv, q, inner = 2 * 8, 4 * 8, TARGET.intermediate_size
    layer = 2 * d * (q + kv + kv + q) + 4 * (context + 1) * q + 2 * 3 * d * inner
    one_key = 3 * 2 * d * d
    first = 2 * d * d + 2 * d * v
    later = one_key + 2 * (2 * d) * d + 2 * d * v
    expected = fed * (one_key + layer) + first + 2 * later
    assert clover.draft_flops(CFG, TARGET, tree, v, context, fed) == expected
    more = clover.draft_flops(CFG, TARGET, EAGLE_25, v, context, fed)
    assert more == fed * (one_key + layer) + first + 10 * later  # 11 nodes have children


def test_draft_vocabulary() -> None:
    for target in (TARGET, config(tied=True)):
        p = weights(target)
        ids = np.array([7, 2, 19])
        hidden = jax.random.normal(jax.random.key(0), (2, 3, target.hidden_size))
        chosen = draft_vocabulary(p, target, ids)
        full = decoder.unembed(p, target, hidden)
        part = draft_logits(p, target, chosen, hidden)
        np.testing.assert_allclose(part, full[..., np.sort(ids)], atol=1e-5)
        law = spread(chosen, target, jax.nn.softmax(part, axis=-1))
        assert law.shape == full.shape
        np.testing.assert_allclose(law[..., [2, 7, 19]], jax.nn.softmax(part), atol=1e-7)
        if p.head is not None:
            coded = p.replace(head=Transposed(p.head.T))
            np.testing.assert_allclose(
                head_rows(coded, target, jnp.asarray(ids)), head_rows(p, target, jnp.asarray(ids)),
                atol=1e-6,
            )  # fmt: skip
    assert frequent_tokens([5, 5, 1, 3, 3, 3, 0], 8, 3).tolist() == [0, 3, 5]
    for bad in ([], [-1], [24]):
        with pytest.raises(ValueError, match="token ids"):
            draft_vocabulary(weights(TARGET), TARGET, bad)


def test_bad_config_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant"):
        clover.CloverConfig(variant="clover3")
    with pytest.raises(ValueError, match="num_heads"):
        clover.CloverConfig(num_heads=0)
    with pytest.raises(ValueError, match="not divide"):
        clover.specs(CFG, dataclasses.replace(TARGET, hidden_size=18))
