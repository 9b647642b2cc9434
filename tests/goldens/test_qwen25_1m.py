"""Dual chunk attention and its sparse prefill against other implementations' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.positions import RopeScaling, apply_rope, rope_angles, rope_frequencies
from ops.block_sparse import attended, block_sparse_attention
from ops.dual_chunk import chunk_positions, dual_chunk_attention
from ops.vertical_slash import Geometry, Selection, by_segment, geometry, select, to_plan
from ops.vertical_slash.geometry import INTRA, SUCCESSIVE
from research.context.qwen25_1m.retention import attention_recall
from tests.goldens import golden

qwen_golden = functools.partial(golden, "qwen25_1m")


def _rotated(x: np.ndarray, positions: jnp.ndarray, base: float) -> jnp.ndarray:
    """x [heads, tokens, width] as (1, tokens, heads, width), rotated at ``positions``."""
    inv_freq, _ = rope_frequencies(RopeScaling(), x.shape[2], base)
    return apply_rope(jnp.asarray(x).swapaxes(0, 1)[None], *rope_angles(positions[None], inv_freq))


def _dca(g: dict[str, np.ndarray]) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray, int]:
    """Rotated queries (3, 1, t, h, d), keys and values, and the stride."""
    chunk, local, base = int(g["chunk_size"]), int(g["local_size"]), float(g["rope_base"])
    at = chunk_positions(jnp.arange(g["q"].shape[1]), chunk, local)
    q = jnp.stack([_rotated(g["q"], p, base) for p in (at.intra, at.successive, at.inter)])
    v = jnp.asarray(g["v"]).swapaxes(0, 1)[None]
    return q, _rotated(g["k"], at.key, base), v, chunk - local


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dense_prefill_and_decode(implementation: str) -> None:
    g = qwen_golden("dca")
    q, k, v, stride = _dca(g)
    n = g["prefill_out"].shape[1]
    attend = functools.partial(dual_chunk_attention, stride=stride, implementation=implementation)
    positions = jnp.arange(n + 1)[None]
    out, lse = attend(q[:, :, :n], k[:, :n], v[:, :n], positions[:, :n])
    np.testing.assert_allclose(out[0].swapaxes(0, 1), g["prefill_out"], atol=1e-5)
    np.testing.assert_allclose(lse[0].T, g["lse"][:, :n], atol=1e-5)
    out, lse = attend(q[:, :, n:], k, v, positions[:, n:])
    np.testing.assert_allclose(out[0].swapaxes(0, 1), g["decode_out"], atol=1e-5)
    np.testing.assert_allclose(lse[0].T, g["lse"][:, n:], atol=1e-5)


def test_relative_positions() -> None:
    g = qwen_golden("dca")
    n = g["rel_pos"].shape[0]
    at = chunk_positions(jnp.arange(n), int(g["chunk_size"]), int(g["local_size"]))
    apart = at.chunk[:, None] - at.chunk[None]
    q = jnp.where(
        apart == 0, at.intra[:, None], jnp.where(apart == 1, at.successive[:, None], at.inter[0])
    )
    ours = jnp.where(jnp.tri(n, dtype=bool), q - at.key[None], -1)
    np.testing.assert_array_equal(ours, g["rel_pos"])


@functools.partial(jax.jit, static_argnames="queries")
def _converted(selection: Selection, where: Geometry, queries: int) -> jnp.ndarray:
    """The mask of a selection for a run of queries."""
    at = where.first[:, None] + jnp.arange(queries)[None]
    return attended(to_plan(selection, where, queries), at, selection.diagonals.shape[3])


@pytest.mark.parametrize("case", range(5))
def test_index_conversion(case: int) -> None:
    g = qwen_golden("vertical_slash_blocks")
    q_len, kv_len, causal = (int(g[f"c{case}_{name}"]) for name in ("qlen", "kvlen", "causal"))
    base = 256  # slots in front, so that every distance has a slot
    end = base + kv_len
    empty, segment = [[0]] * 3, INTRA if causal else SUCCESSIVE
    bases, ends = list(empty), list(empty)
    bases[segment], ends[segment] = [base], [end]
    if not causal:
        bases[INTRA], ends[INTRA] = [end], [end]
    first, counts = jnp.asarray([end - q_len if causal else end]), jnp.asarray([q_len])
    where = Geometry(first, counts, jnp.asarray(bases), jnp.asarray(ends))
    s = end + q_len
    diagonals = where.straight[segment, 0] - g[f"c{case}_slash"]
    columns = jnp.sort(jnp.asarray(g[f"c{case}_vertical"] + base))[None, None]
    marked = jnp.zeros((1, 1, 3, s), bool).at[0, 0, segment, diagonals].set(True)
    mask = _converted(Selection(columns, marked), where, q_len)[0, 0, :, base:end]
    np.testing.assert_array_equal(mask, g[f"c{case}_mask"])


@functools.partial(jax.jit, static_argnames=("stride", "size", "implementation"))
def _attend(
    columns: jnp.ndarray,
    diagonals: jnp.ndarray,
    q: jnp.ndarray,
    k: jnp.ndarray,
    v: jnp.ndarray,
    first: jnp.ndarray,
    counts: jnp.ndarray,
    scale: float,
    stride: int,
    size: int,
    implementation: str,
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
    """Output, lse and mask of a run of queries under a given selection."""
    where = geometry(first, counts, stride)
    plan = to_plan(by_segment(columns, diagonals, where), where, size)
    at = first[:, None] + jnp.arange(size)[None]
    out, lse = block_sparse_attention(
        q, k, v, at, plan, stride=stride, scale=scale, implementation=implementation
    )
    return out, lse, attended(plan, at, k.shape[1])


@functools.cache
def _sparse() -> tuple:
    """The sparse file's tensors and the runs of its prompt, each with our own selection."""
    g = qwen_golden("dca_sparse")
    q, k, v, stride = _dca(g)
    n = g["q"].shape[1]
    at = chunk_positions(jnp.arange(n), int(g["chunk_size"]), int(g["local_size"]))
    rotations = (at.intra, at.critical_successive, at.critical_inter)
    critical = jnp.stack([_rotated(g["q"], p, float(g["rope_base"])) for p in rotations])
    scale = float(g["attn_scaling"]) ** 2 * g["q"].shape[2] ** -0.5
    budgets = [jnp.asarray(g[f"{name}_size"])[None] for name in ("vertical", "slash")]
    runs = []
    for start in range(0, n, stride):
        stop = min(start + stride, n)
        where = geometry(jnp.asarray([start]), jnp.asarray([stop - start]), stride)
        chosen = jax.jit(select, static_argnames=("stride", "most"))(
            critical[:, :, start:stop], k, where, *budgets, stride=stride, scale=scale,
            most=(200, 200),
        )  # fmt: skip
        runs.append((start, stop, chosen))
    return g, q, k, v, stride, scale, runs


def test_selection() -> None:
    g, *_, runs = _sparse()
    n = g["q"].shape[1]
    agree = total = 0
    for i, (_, stop, chosen) in enumerate(runs):
        # Columns that stand in for a segment's empty list are not selected ones.
        columns = np.zeros((len(g["q"]), n + 1), bool)
        np.put_along_axis(columns, np.minimum(np.asarray(chosen.columns[0]), n), True, axis=1)
        both = (
            (columns[:, :n], np.unpackbits(g["vertical_selected"][:, i], axis=-1, count=n)),
            (
                np.asarray(chosen.diagonals[0].any(axis=1)),
                np.unpackbits(g["slash_selected"][:, i], axis=-1, count=n),
            ),
        )
        for ours, theirs in both:
            agree += np.sum(ours & (theirs == 1))
            total += np.sum(theirs)
            assert not ours[:, stop:].any()
    assert agree >= 0.995 * total


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sparse_prefill(implementation: str) -> None:
    g, q, k, v, stride, scale, runs = _sparse()
    n = g["q"].shape[1]
    mask = np.unpackbits(g["mask"], axis=-1, count=n).astype(bool)
    recalls = []
    for i, (start, stop, _) in enumerate(runs):
        columns, diagonals = (
            jnp.asarray(np.unpackbits(g[f"{name}_selected"][:, i], axis=-1, count=n), bool)
            for name in ("vertical", "slash")
        )
        columns = jnp.sort(jnp.where(columns, jnp.arange(n)[None], n), axis=-1)
        out, lse, kept = _attend(
            columns[None], diagonals[None], q[:, :, start:stop], k, v, jnp.asarray([start]),
            jnp.asarray([stop - start]), scale, stride, stop - start, implementation,
        )  # fmt: skip
        np.testing.assert_array_equal(kept[0], mask[:, start:stop])
        np.testing.assert_allclose(out[0].swapaxes(0, 1), g["sparse_out"][:, start:stop], atol=2e-5)
        np.testing.assert_allclose(lse[0].T, g["sparse_lse"][:, start:stop], atol=2e-5)
        dense = jnp.asarray(g["dense_lse"][:, start:stop]).T[None]
        counted = jnp.ones((1, stop - start), bool)
        recalls.append(attention_recall(lse, dense, counted) * (stop - start))
    np.testing.assert_allclose(sum(recalls) / n, g["attention_recall"], atol=2e-5)


def test_dense_with_temperature() -> None:
    g, q, k, v, stride, scale, _ = _sparse()
    at = jnp.arange(g["q"].shape[1])[None]
    out, lse = dual_chunk_attention(q, k, v, at, stride=stride, scale=scale)
    np.testing.assert_allclose(out[0].swapaxes(0, 1), g["dense_out"], atol=2e-5)
    np.testing.assert_allclose(lse[0].T, g["dense_lse"], atol=2e-5)
