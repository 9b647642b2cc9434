"""Attention over slots that several devices share is the attention of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import context_attention
from models.mesh_attention import mesh_attention, mesh_dual_chunk_attention
from models.sharding import make_mesh
from ops.attention import AttentionMask, attention

WIDTH = 8


def arrays(b: int, t: int, s: int, h: int = 4, g: int = 2) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(t + s)
    shapes = ((b, t, h, WIDTH), (b, s, g, WIDTH), (b, s, g, WIDTH))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def spoiled(k: jax.Array, v: jax.Array, lengths: list[int]) -> tuple[jax.Array, jax.Array]:
    """NaN keys and huge values behind each row's length: stale slots may hold anything."""
    stale = jnp.arange(k.shape[1])[None, :, None, None] >= jnp.asarray(lengths)[:, None, None, None]
    return jnp.where(stale, jnp.nan, k), jnp.where(stale, 1e4, v)


def mesh_of(sizes: str) -> jax.sharding.Mesh:
    count = int(np.prod([int(part.split("=")[1]) for part in sizes.split(",")]))
    return make_mesh(sizes, jax.devices()[:count])


@functools.partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, mask, implementation="xla"):
    return mesh_attention(q, k, v, mask=mask, implementation=implementation)


def assert_same(sizes: str, q, k, v, mask: AttentionMask, implementation: str = "xla"):
    """Also that nothing is not a number."""
    with jax.set_mesh(mesh_of(sizes)):
        got = attend(q, k, v, mask, implementation)
    np.testing.assert_allclose(got, attend(q, k, v, mask), atol=2e-6, equal_nan=False)
    return got


def cached(lengths: list[int], t: int, s: int, window: int | None = None) -> AttentionMask:
    """The last ``t`` of each row's tokens ask."""
    end = jnp.asarray(lengths, jnp.int32)
    return AttentionMask(
        q_positions=end[:, None] - t + jnp.arange(t, dtype=jnp.int32)[None],
        k_positions=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (len(lengths), s)),
        window=None if window is None else jnp.asarray(window, jnp.int32),
        lengths=end,
        causal=True,
    )


def tree_mask(starts: list[int], nodes: int, s: int) -> AttentionMask:
    """A draft of a root and two branches behind each row's committed slots."""
    start = jnp.asarray(starts, jnp.int32)
    parent = [-1, 0, 0, 1, 2, 3, 4][:nodes]
    seen = np.eye(nodes, dtype=bool)
    for node in range(1, nodes):
        seen[node] |= seen[parent[node]]
    depth = jnp.asarray(seen.sum(1) - 1, jnp.int32)[None]
    return AttentionMask(
        q_positions=start[:, None] + depth,
        k_positions=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (len(starts), s)),
        lengths=start + nodes,
        tree=jnp.broadcast_to(jnp.asarray(seen)[None], (len(starts), nodes, nodes)),
        tree_start=start,
        causal=True,
    )


BOTH = pytest.mark.parametrize("implementation", ["xla", "interpret"])


@pytest.mark.parametrize(
    "sizes, window", [("context=4,tensor=2", None), ("data=2,context=2,tensor=2", 5)]
)
@BOTH
def test_a_step_of_ragged_rows_some_of_which_leave_shards_empty(sizes, window, implementation):
    lengths, s = [1, 16, 17, 64], 64
    q, k, v = arrays(4, 1, s)
    assert_same(sizes, q, *spoiled(k, v, lengths), cached(lengths, 1, s, window), implementation)


@BOTH
def test_rows_that_see_nothing_give_zeros(implementation):
    mask = AttentionMask(lengths=jnp.asarray([0, 3], jnp.int32))
    got = assert_same("context=4", *arrays(2, 1, 16), mask, implementation)
    np.testing.assert_array_equal(got[0], 0.0)


@pytest.mark.parametrize("s", [64, 16], ids=["within", "wider than a shard"])
@BOTH
def test_trees_within_and_across_shards(s, implementation):
    """Drafts begin in front of a shard, in it, at its first slot, and in the last one."""
    starts = [s // 4 - 2, s // 2, 3, s - 7]
    q, k, v = arrays(4, 7, s)
    k, v = spoiled(k, v, [x + 7 for x in starts])
    assert_same("context=4,tensor=2", q, k, v, tree_mask(starts, 7, s), implementation)


@pytest.mark.parametrize("s, window", [(192, None), (512, 70)], ids=["keys", "queries"])
@BOTH
def test_long_runs_of_queries_are_split(s, window, implementation):
    """Keys travel where there are few of them, otherwise queries do."""
    lengths = [128, 190]
    q, k, v = arrays(2, 128, s)
    k, v = spoiled(k, v, lengths)
    mask = cached(lengths, 128, s, window)
    got = assert_same("context=4,tensor=2", q, k, v, mask, implementation)
    assert got.sharding.spec[1] == "context"
    with jax.set_mesh(mesh_of("context=4,tensor=2")):
        text = attend.lower(q, k, v, mask, implementation).as_text()
    assert ("collective_permute" in text) == (s == 192)
    assert ("reduce_scatter" in text) == (s == 512)


@pytest.mark.parametrize("s", [128, 512], ids=["keys", "queries"])
def test_segments_and_invalid_slots(s):
    mask = AttentionMask(
        q_segments=jnp.arange(128, dtype=jnp.int32)[None] // 50,
        k_segments=jnp.arange(s, dtype=jnp.int32)[None] // 50,
        k_valid=(jnp.arange(s)[None] + jnp.arange(2)[:, None]) % 3 > 0,
    )
    assert_same("context=4", *arrays(2, 128, s), mask)


@pytest.mark.parametrize(
    "t, s", [(128, 128), pytest.param(8, 64, marks=pytest.mark.slow)], ids=["keys", "queries"]
)
def test_gradients(t, s):
    """Training under the axis; without a cache the mask has no positions."""
    mask = AttentionMask(causal=True) if t == s else cached([8, 20], t, s)

    def loss(qkv, attend):
        return jnp.sum(jnp.sin(attend(*qkv, mask=mask)))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    want = gradient(arrays(2, t, s), attention)
    with jax.set_mesh(mesh_of("context=4")):
        got = gradient(arrays(2, t, s), mesh_attention)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, want)


@functools.partial(jax.jit, static_argnames=("stride", "implementation"))
def attend_chunks(q, k, v, at, lengths, stride, implementation):
    return mesh_dual_chunk_attention(
        q, k, v, at, stride=stride, lengths=lengths, implementation=implementation
    )


@pytest.mark.parametrize(
    ("t", "s", "how"),
    [(1, 64, ""), (40, 64, ""), (128, 192, "permute"), (128, 768, "reduce_scatter")],
    ids=["step", "piece", "keys", "queries"],
)
def test_dual_chunks_over_shards_that_begin_anywhere_in_a_chunk(t, s, how):
    """The stride divides no shard, the shorter row leaves shards empty, the last slot is hidden."""
    ends = [t, s - 3]
    q, k, v = arrays(2, t, s)
    k, v = spoiled(k, v, ends)
    lengths = jnp.asarray(ends, jnp.int32) - 1
    at = lengths[:, None] + 1 - t + jnp.arange(t, dtype=jnp.int32)[None]
    args = jnp.stack([q, q[::-1], q[:, :, ::-1]]), k, v, at, lengths, 20, "auto"
    with jax.set_mesh(mesh_of("context=4,tensor=2")):
        got = attend_chunks(*args)
        assert how in attend_chunks.lower(*args).as_text()
    for ours, want in zip(got, attend_chunks(*args), strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-6, equal_nan=False)


def test_the_kernels_of_dual_chunks_run_on_each_device_s_rows_and_heads():
    q, k, v = arrays(4, 3, 384)
    at = jnp.asarray([[0], [100], [250], [381]]) + jnp.arange(3, dtype=jnp.int32)[None]
    args = jnp.stack([q, q[::-1], q[:, ::-1]]), k, v, at, at[:, -1] + 1, 128
    want = attend_chunks(*args, "xla")
    with jax.set_mesh(make_mesh("data=4,tensor=2")):
        got = attend_chunks(*args, "interpret")
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_slots_that_the_axis_does_not_divide_stay_whole():
    assert_same("context=4", *arrays(2, 1, 30), cached([3, 30], 1, 30))


def test_a_mask_of_a_shard_is_that_part_of_the_whole_one():
    mask = tree_mask([14, 40, 3], 7, 64)
    dense = np.asarray(jax.jit(lambda mask: mask.dense(7, 64))(mask))
    part = jax.jit(lambda cut, first: context_attention.of_shard(cut, first, 16).dense(7, 16))
    for first in range(0, 64, 16):
        cut = mask.replace(k_positions=mask.k_positions[:, first : first + 16])
        np.testing.assert_array_equal(part(cut, first), dense[..., first : first + 16])
