"""Dual chunk attention by the TPU kernels on CPU, against the pairs; lowering for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ops.attention.merge import merge
from ops.dual_chunk import dual_chunk_attention
from ops.dual_chunk.tpu import attend_kernel
from ops.platform import target
from tests.ops.races import races_found

STRIDE = 128
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}


def tensors(t, s, heads=(4, 2), d=64, dtype=jnp.float32, b=2, seed=0):
    rng = np.random.default_rng(seed)
    h, g = heads
    shapes = ((3, b, t, h, d), (b, s, g, d), (b, s, g, d))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def ragged(t, *starts):
    """Positions of rows that start anywhere, and lengths: the last row's last token is no text."""
    at = jnp.asarray(starts, jnp.int32)[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    lengths = at[:, -1] + 1 - jnp.arange(len(starts), dtype=jnp.int32)
    return at, lengths


@functools.partial(jax.jit, static_argnames=("implementation", "stride"))
def run(q, k, v, at, lengths, implementation, stride=STRIDE):
    return dual_chunk_attention(
        q, k, v, at, stride=stride, lengths=lengths, implementation=implementation
    )


CASES = {  # t, s, (h, g), d, starts, stride
    "prefill": (300, 700, (4, 2), 64, (0, 399), 128),
    "one_chunk": (200, 200, (4, 2), 128, (0, 0), 1024),
    "narrow_values": (140, 520, (7, 1), 64, (380, 37), 256),
    "wide_heads": (150, 400, (3, 3), 128, (250, 0), 384),
    "decode": (1, 700, (6, 2), 64, (699, 127), 128),
    "few": (9, 700, (4, 2), 128, (250, 640), 256),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in ("prefill", "few")],
)
def test_equals_the_pairs(name, dtype):
    t, s, heads, d, starts, stride = CASES[name]
    q, k, v = tensors(t, s, heads, d, dtype)
    at, lengths = ragged(t, *starts)
    wanted = run(q, k, v, at, lengths, "reference", stride)
    got = run(q, k, v, at, lengths, "interpret", stride)
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(
        np.float32(got[0]), np.float32(wanted[0]), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(got[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [3, 140])
def test_shares_of_the_slots_merged_are_the_whole(t):
    """Shares of 384 begin within a chunk of 256; the first row leaves the last two empty."""
    q, k, v = tensors(t, 1536)
    at, lengths = ragged(t, 500, 1380)

    @functools.partial(jax.jit, static_argnames="implementation")
    def part(q, k, v, first, implementation):
        mine = slice(None), slice(None, 384)
        rolled = [jnp.roll(x, -first, axis=1)[mine] for x in (k, v)]
        return dual_chunk_attention(
            q, *rolled, at, stride=256, lengths=jnp.clip(lengths - first, 0, 384),
            implementation=implementation, first=first,
        )  # fmt: skip

    def merged(q, k, v, implementation):
        parts = (part(q, k, v, jnp.int32(i), implementation) for i in range(0, 1536, 384))
        return functools.reduce(lambda a, b: merge(*a, *b), parts)

    wanted = run(q, k, v, at, lengths, "reference", 256)
    for x, y in zip(merged(q, k, v, "interpret"), wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)

    def loss(implementation):
        def total(q, k, v):
            out, lse = part(q, k, v, jnp.int32(384), implementation)
            return jnp.sum(out**2) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0.0))

        return jax.grad(total, (0, 1, 2))(q, k, v)

    for x, y in zip(loss("interpret"), loss("reference"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [3, 140])
def test_every_rotation_matters(t):
    """Each of the three, exchanged for noise, changes the queries that have keys for it."""
    q, k, v = tensors(t, 512, b=1)
    at, lengths = ragged(t, 372)
    whole = np.asarray(run(q, k, v, at, lengths, "interpret")[0])
    for rotation in range(3):
        other = run(q.at[rotation].add(1.0), k, v, at, lengths, "interpret")[0]
        assert (np.abs(np.asarray(other) - whole).max(axis=(0, 2, 3)) > 1e-3).all()


def test_slots_that_nobody_sees_change_no_bit_and_empty_rows_are_zeros():
    q, k, v = tensors(150, 600)
    at, _ = ragged(150, 0, 300)
    lengths = jnp.asarray([100, 0], jnp.int32)
    clean = run(q, k, v, at, lengths, "interpret")
    seen = (jnp.arange(600)[None] < lengths[:, None])[..., None, None]
    dirty = run(q, jnp.where(seen, k, jnp.nan), jnp.where(seen, v, 1e4), at, lengths, "interpret")
    for a, b in zip(clean, dirty, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (np.asarray(clean[0])[1] == 0).all() and np.isneginf(np.asarray(clean[1])[1]).all()


@pytest.mark.parametrize("t", [5, 140])
def test_strict_interpretation(t):
    q, k, v = tensors(t, 300)
    at, lengths = ragged(t, 160, 0)
    strict = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    try:
        call = jax.jit(lambda *x: attend_kernel(*x, STRIDE, 0.125, interpret=strict))
        got = jax.block_until_ready(call(q, k, v, at, lengths))
        assert not races_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    wanted = run(q, k, v, at, lengths, "reference")
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradient_goes_through_the_pairs():
    q, k, v = tensors(140, 300, b=1)
    at, lengths = ragged(140, 150)

    def gradient(implementation):
        def loss(q, k, v):
            out, lse = run(q, k, v, at, lengths, implementation)
            return jnp.sum(out**2) + jnp.sum(jnp.cos(lse))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for ours, wanted in zip(gradient("interpret"), gradient("reference"), strict=True):
        assert np.abs(np.asarray(wanted)).max() > 0.1
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("t", "kernel"), [(1, "attention_decode"), (1000, "attention_prefill")])
def test_exports_for_tpu_by_itself(t, kernel, d, dtype):
    q, k, v = tensors(t, 1500, d=d, dtype=dtype)
    at, lengths = ragged(t, 500, 33)
    call = jax.jit(lambda *x: dual_chunk_attention(*x[:4], stride=512, lengths=x[4]))
    with target("tpu"):
        exported = jax.export.export(call, platforms=["tpu"])(q, k, v, at, lengths)
    assert kernel in exported.mlir_module()


def test_auto_leaves_other_strides_and_meshes_to_xla():
    q, k, v = tensors(2, 300)
    at, lengths = ragged(2, 150, 20)

    def lowered(stride):
        call = jax.jit(lambda *x: dual_chunk_attention(*x[:4], stride=stride, lengths=x[4]))
        with target("tpu"):
            return call.trace(q, k, v, at, lengths).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lowered(256) and "tpu_custom_call" not in lowered(96)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tensor",))):
        assert "tpu_custom_call" not in lowered(256)
    with pytest.raises(ValueError, match="stride that is a multiple of 128; got 96"):
        run(q, k, v, at, lengths, "interpret", 96)
