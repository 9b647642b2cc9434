"""LongSpec's layer as a function: what each token sees, positions, and cached steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.cache import init_ring
from models import decoder, longspec
from models.attention import DensePolicy, Step
from models.longspec import Entries, LongSpecConfig
from models.params import init
from ops.attention import AttentionMask
from tests.models.tiny import config, tokens, weights

TARGET = config()
CFG = LongSpecConfig(window=4)
LENGTH = 14


def layer(cfg: LongSpecConfig = CFG) -> longspec.Params:
    made = init(longspec.specs(cfg, TARGET), jax.random.key(1))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.2 * jnp.asarray(rng.normal(size=x.shape), x.dtype), made)


PARAMS = layer()


@jax.jit
def run(
    embeds: Any,
    entries: Any,
    shift: Any,
    positions: Any,
    segments: Any = None,
    given: longspec.Params = PARAMS,
) -> Any:
    where = longspec.place(DensePolicy(), TARGET, Step(positions, segments=segments))
    return longspec.forward(given, CFG, TARGET, embeds, where, entries, shift)


def inputs(seed: int = 0) -> tuple[Any, Any, Any]:
    """Embeddings, the target's entries, positions with sink 2 and offset 9."""
    rng = np.random.default_rng(seed)
    shape = (1, LENGTH, TARGET.num_kv_heads, TARGET.head_dim)
    keys, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    embeds = jnp.asarray(rng.normal(size=(1, LENGTH, TARGET.hidden_size)), jnp.float32)
    plain = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    moved = longspec.anchor_offset_positions(plain, jnp.asarray([2]), jnp.asarray([9]))
    return embeds, (keys, values), moved


@pytest.mark.parametrize("shift", [1, 3])
def test_what_a_token_sees(shift: int) -> None:
    """Entries up to t - shift and embeddings from t - window on, by count and not by position."""
    embeds, (keys, values), positions = inputs()
    before = run(embeds, (keys, values), shift, positions)
    for at in (0, 5, 10):
        spoilt = keys.at[:, at].add(3.0), values.at[:, at].add(3.0)
        changed = np.any(run(embeds, spoilt, shift, positions) != before, axis=(0, 2))
        np.testing.assert_array_equal(changed, np.arange(LENGTH) >= at + shift)
        other = run(embeds.at[:, at].add(1.0), (keys, values), shift, positions)
        changed = np.any(other != before, axis=(0, 2))
        index = np.arange(LENGTH)
        np.testing.assert_array_equal(changed, (index >= at) & (index <= at + CFG.window))


def test_the_first_tokens_pass_the_cross_attention_unchanged() -> None:
    embeds, entries, positions = inputs()
    late = run(embeds, entries, 4, positions)
    alone = run(embeds, entries, 4, positions, None, longspec.Params(PARAMS.layer))
    np.testing.assert_allclose(late[:, :4], alone[:, :4], atol=1e-6)
    assert np.abs(late[:, 4:] - alone[:, 4:]).max(axis=2).min() > 1e-2


def test_documents_of_a_row_are_apart() -> None:
    embeds, (keys, values), positions = inputs()
    segments = jnp.asarray([[1] * 6 + [2] * (LENGTH - 6)], jnp.int32)
    both = run(embeds, (keys, values), 2, positions, segments)
    parts = [
        run(embeds[:, cut], (keys[:, cut], values[:, cut]), 2, positions[:, cut])
        for cut in (slice(0, 6), slice(6, None))
    ]
    np.testing.assert_allclose(both, jnp.concatenate(parts, axis=1), atol=1e-5)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_training_is_decoding_with_entries_hidden(shift: int) -> None:
    """One token at a time through a ring, the target's entries limited to t - shift."""
    embeds, (keys, values), positions = inputs(1)
    whole = run(embeds, (keys, values), shift, positions)

    @jax.jit
    def step(ring: Any, at: Any) -> Any:
        x = jax.lax.dynamic_slice_in_dim(embeds, at, 1, axis=1)
        index = jnp.full((1, 1), at, jnp.int32)
        here = jnp.take_along_axis(positions, index, axis=1)
        where = longspec.place(DensePolicy(), TARGET, Step(here))
        q, k, v = longspec.project_own(PARAMS, TARGET, x, where.own)
        ring = ring.append(k, v, index[0], jnp.ones(1, jnp.int32))
        held_k, held_v = ring.read()
        mixed = longspec.attend_own(q, Entries(held_k, held_v, ring.seen_from(index)))
        seen = AttentionMask(lengths=jnp.maximum(index[0] - shift + 1, 0))
        out = longspec.complete(PARAMS, TARGET, x, mixed, where, Entries(keys, values, seen))
        return ring, out[:, 0]

    ring, outs = init_ring(TARGET, 1, CFG.window, 1, jnp.float32), []
    for at in range(LENGTH):
        ring, out = step(ring, at)
        outs.append(out)
    np.testing.assert_allclose(jnp.stack(outs, axis=1), whole, atol=1e-5)


def test_the_targets_last_entries_are_those_of_its_cache() -> None:
    text = tokens(2, 9)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], text.shape)

    @jax.jit
    def three(stacked: Any) -> Any:
        unrolled = decoder.unstack(stacked)
        where = longspec.place(DensePolicy(), TARGET, Step(positions))
        before = decoder.forward(stacked, TARGET, text, all_hidden=True).hidden_states[-2]
        layers = tuple(_Kept() for _ in range(TARGET.num_layers))
        step = Step(positions, start=jnp.zeros(2, jnp.int32), slot_positions=positions)
        cached = decoder.forward(unrolled, TARGET, text, step=step, cache=layers).cache[-1]
        made = (longspec.last_layer_entries(p, TARGET, before, where) for p in (stacked, unrolled))
        return *made, cached.read(None)

    wanted, again, cached = three(weights(TARGET))
    for a, b, c in zip(wanted, again, cached, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-5)


class _Kept:
    """A layer's cache that keeps what is appended, as it came."""

    def append(self, k: Any, v: Any, start: Any) -> "_Kept":
        self.entries = k, v
        return self

    def read(self, extent: int | None) -> tuple[Any, Any]:
        return self.entries


def test_an_offset_without_sink_changes_no_logit() -> None:
    """Rotations are relative; a sink makes the difference that training is to see."""
    text = tokens(1, 12)
    plain = jnp.arange(12, dtype=jnp.int32)[None]

    @jax.jit
    def logits(sink: Any, offset: Any) -> Any:
        positions = longspec.anchor_offset_positions(plain, sink[None], offset[None])
        out = decoder.forward(weights(TARGET), TARGET, text, step=Step(positions))
        return decoder.unembed(weights(TARGET), TARGET, out.hidden)

    still = logits(jnp.asarray(0), jnp.asarray(0))
    np.testing.assert_allclose(logits(jnp.asarray(0), jnp.asarray(900)), still, atol=2e-3)
    assert np.abs(logits(jnp.asarray(3), jnp.asarray(900)) - still).max() > 1e-2


def test_sinks_and_offsets_are_drawn_within_bounds() -> None:
    draw = jax.jit(longspec.draw_anchor_offset, static_argnums=(1, 2, 3))
    cfg = LongSpecConfig(max_sink=4, reach=100)
    sink, offset = draw(jax.random.key(0), cfg, 4000, 40)
    assert set(np.unique(sink).tolist()) == set(range(5))
    assert int(offset.min()) == 0 and int(offset.max()) == 60
    assert len(np.unique(offset)) == 61
    for reach, length in ((30, 40), (0, 40), (30000, 1201)):
        still = LongSpecConfig(reach=reach)
        _, offset = draw(jax.random.key(1), still, 50, length)
        assert int(offset.max()) == 0
    _, offset = draw(jax.random.key(1), LongSpecConfig(), 50, 1200)
    assert int(offset.max()) > 20000


def test_the_layer_has_biases_on_queries_keys_and_values_alone() -> None:
    made = init(longspec.specs(CFG, TARGET), jax.random.key(0))
    attn = made.layer.attn
    assert all(x.b is not None and not np.any(x.b) for x in (attn.q, attn.k, attn.v))
    assert attn.o.b is None and made.cross.o.b is None and made.layer.mlp.up.b is None
    assert made.cross.q.b.shape == (TARGET.num_heads * TARGET.head_dim,)
    for x in (attn.o, made.layer.mlp.down, made.cross.o):
        np.testing.assert_allclose(np.std(x.w), TARGET.init_stddev, rtol=0.3)
    assert longspec.specs(LongSpecConfig(cross=False), TARGET).cross is None


@pytest.mark.parametrize("changes", [{"window": 0}, {"max_shift": 0}, {"reach": -1}])
def test_settings_are_checked(changes: Any) -> None:
    with pytest.raises(ValueError, match="LongSpec needs a window and max_shift of 1 or more"):
        LongSpecConfig(**changes)
