"""The block-sparse kernel on CPU against a dense mask, its refusals, and lowering for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from ops.block_sparse import BLOCK, SparsePlan
from ops.block_sparse.tpu import RANGES, attend_plan
from tests.ops.races import races_found

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def random_plan(at, lengths, h, stride, ranges, columns, seed=0):
    """Random lists that keep the contract, and visible [b, h, t, s] of what they show."""
    rng = np.random.default_rng(seed)
    b, t = at.shape
    n, s = -(-t // BLOCK), int(lengths.max())
    starts, stops = np.zeros((2, b, h, n, ranges), np.int32)
    listed = np.zeros((b, h, n, columns), np.int32)
    counts = np.zeros((2, b, h, n), np.int32)
    visible = np.zeros((b, h, n * BLOCK, s), bool)
    for row, head, i in np.ndindex(b, h, n):
        chunk = at[row, i * BLOCK] // stride
        free, end = 0, min(lengths[row], at[row, : (i + 1) * BLOCK].max() + 1)
        shown = np.zeros(s, bool)
        for r in range(rng.integers(ranges + 1)):
            start = free + int(rng.integers(0, 40) * (rng.random() < 0.6))
            stop = min(start + int(rng.integers(0, BLOCK + 1)), end)
            for border in range(max(chunk - 1, 0), s // stride + 1):
                if start < border * stride < stop:
                    stop = border * stride
            if start >= stop:
                break
            starts[row, head, i, r], stops[row, head, i, r] = start, stop
            counts[0, row, head, i], free = r + 1, stop
            shown[start:stop] = True
        rest = np.flatnonzero(~shown[:end])
        some = np.sort(rng.permutation(rest)[: rng.integers(columns + 1)])
        listed[row, head, i, : len(some)], counts[1, row, head, i] = some, len(some)
        shown[some] = True
        visible[row, head, i * BLOCK : (i + 1) * BLOCK] = shown
    visible = visible[:, :, :t] & (np.arange(s) <= at[:, None, :, None])
    fields = (starts, stops, counts[0], listed, counts[1])
    return SparsePlan(*(jnp.asarray(x) for x in fields)), visible


def expected(q, k, v, at, stride, visible):
    """Float64, pair by pair."""
    s, r = visible.shape[3], q.shape[3] // k.shape[2]
    k, v = (np.repeat(np.float64(x[:, :s]), r, axis=2) for x in (k, v))
    scores = np.einsum("xbthd,bshd->xbhts", np.float64(q), k) * q.shape[4] ** -0.5
    apart = (at[:, :, None] // stride - np.arange(s) // stride)[:, None]
    scores = np.where(apart <= 0, scores[0], np.where(apart == 1, scores[1], scores[2]))
    weights = np.where(visible, np.exp(scores), 0.0)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    share = np.where(total > 0, total, 1.0)[..., None]
    return np.einsum("bhts,bshd->bthd", weights / share, v), lse.transpose(0, 2, 1)


@functools.partial(jax.jit, static_argnames=("stride", "gathered_bytes"))
def run(q, k, v, at, plan, stride, gathered_bytes=2**28):
    return attend_plan(
        q, k, v, at, plan, stride, q.shape[4] ** -0.5,
        gathered_bytes=gathered_bytes, interpret=True,
    )  # fmt: skip


CASES = {  # t, s, (h, g), d, starts, stride, ranges, columns, seed
    "two_chunks": (130, 400, (4, 2), 64, (270, 40), 256, 11, 20, 0),
    "many_chunks": (100, 700, (3, 1), 128, (600, 511), 96, 9, 140, 1),
    "one_chunk": (64, 200, (2, 2), 64, (136, 0), 1024, 3, 5, 2),
    "slots_off_the_grid": (70, 333, (2, 1), 128, (263, 100), 128, 8, 7, 3),
    "queries_over_many_chunks": (64, 150, (2, 1), 64, (80, 3), 20, 8, 30, 4),
}


def case(name, dtype=jnp.float32):
    t, s, (h, g), d, starts, stride, ranges, columns, seed = CASES[name]
    rng = np.random.default_rng(seed)
    b = len(starts)
    shapes = ((3, b, t, h, d), (b, s, g, d), (b, s, g, d))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    at = np.array(starts, np.int32)[:, None] + np.arange(t, dtype=np.int32)
    lengths = np.array([min(s, a[-1] + 1) for a in at])
    plan, visible = random_plan(at, lengths, h, stride, ranges, columns, seed)
    return (q, k, v, jnp.asarray(at), plan, stride), visible


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [("two_chunks", jnp.bfloat16)],
)
def test_equals_the_dense_mask(name, dtype):
    arguments, visible = case(name, dtype)
    q, k, v, at, plan, stride = arguments
    out, lse = run(*arguments)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    # The case has what it is for: several tiles of ranges, or columns, and empty rows somewhere.
    assert int(plan.range_counts.max()) > (RANGES if name == "two_chunks" else 0)
    assert int(plan.column_counts.max()) > (128 if name == "many_chunks" else 0)
    wanted = expected(*(np.float32(x) for x in (q, k, v)), np.asarray(at), stride, visible)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(np.float32(out), wanted[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-5, atol=1e-5)
    empty = ~visible.any(axis=3).transpose(0, 2, 1)
    assert (np.asarray(out)[empty] == 0).all() and np.isneginf(np.asarray(lse)[empty]).all()


def test_launches_in_parts_change_nothing():
    arguments, _ = case("two_chunks")
    whole, parts = run(*arguments), run(*arguments, gathered_bytes=1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)


def test_empty_lists_give_zeros():
    (q, k, v, at, plan, stride), _ = case("one_chunk")
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape[:3] + (0,) * (x.ndim - 3), x.dtype), plan)
    out, lse = run(q, k, v, at, empty, stride)
    assert (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


def test_keys_that_no_list_shows_change_no_bit():
    (q, k, v, at, plan, stride), visible = case("one_chunk")
    seen = np.zeros((2, k.shape[1], 2), bool)
    seen[:, : visible.shape[3]] = visible.any(axis=2).transpose(0, 2, 1)
    assert not seen.all()
    clean = run(q, k, v, at, plan, stride)
    dirty_k = jnp.where(seen[..., None], k, jnp.nan)
    dirty = run(q, dirty_k, jnp.where(seen[..., None], v, 1e4), at, plan, stride)
    for a, b in zip(clean, dirty, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", ["two_chunks", "slots_off_the_grid"])
def test_strict_interpretation(name):
    """Copies that happen only when they are waited for, poisoned memory, and races looked for."""
    arguments, visible = case(name)
    q, k, v, at, plan, stride = (x[:1] if i in (1, 2, 3) else x for i, x in enumerate(arguments))
    q, plan = q[:, :1], jax.tree.map(lambda x: x[:1], plan)
    strict = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    try:
        call = jax.jit(lambda *x: attend_plan(*x, stride, q.shape[4] ** -0.5, interpret=strict))
        out, lse = jax.block_until_ready(call(q, k, v, at, plan))
        assert not races_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    wanted = expected(*(np.float32(x) for x in (q, k, v)), np.asarray(at), stride, visible[:1])
    np.testing.assert_allclose(out, wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["two_chunks", "many_chunks"])
def test_exports_for_tpu(name, dtype):
    (*arrays, stride), _ = case(name, dtype)
    call = jax.jit(lambda *x: attend_plan(*x, stride, 0.1))
    exported = jax.export.export(call, platforms=["tpu"])(*jax.tree.map(jnp.asarray, arrays))
    assert "attention_block_sparse" in exported.mlir_module()


def test_refusals():
    (q, k, v, at, plan, stride), _ = case("one_chunk")
    with pytest.raises(ValueError, match="2 rows of 128 queries"):
        attend_plan(jnp.tile(q, (1, 1, 2, 1, 1)), k, v, jnp.tile(at, (1, 2)), plan, stride, 1.0)
    with pytest.raises(ValueError, match="has no gradient: differentiate implementation='xla'"):
        jax.grad(lambda q: run(q, k, v, at, plan, stride)[0].sum())(q)
