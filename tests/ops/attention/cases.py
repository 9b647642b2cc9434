"""The cases that every implementation of attention must pass, and the class that runs them.

A test module subclasses `AttentionCases` and names its implementation. Sizes are chosen off the
block grid (slots and queries are no multiples of 128) and so that a kernel takes several blocks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.attention import AttentionMask, BlockSizes, attention

BLOCKS = BlockSizes(q=128, kv=128)
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}


def tensors(
    seed: int, b: int, t: int, s: int, h: int, g: int, d: int, dv: int | None = None
) -> tuple[Any, Any, Any]:
    """Random float32 q, k, v."""
    rng = np.random.default_rng(seed)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, dv or d))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def ends(t: int, *last: int) -> Any:
    """Positions of t queries per row, the last of which stands at `last`."""
    return jnp.asarray([np.arange(t) + end + 1 - t for end in last], jnp.int32)


def segments(n: int, *cuts: int) -> Any:
    """Segment numbers of n slots, one row, a new segment at every cut."""
    return jnp.asarray(np.searchsorted(cuts, np.arange(n), side="right")[None], jnp.int32)


def random_tree(seed: int, b: int, n: int) -> Any:
    """Ancestor-or-self masks [b, n, n] of random trees."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((b, n, n), bool)
    for row in masks:
        for node in range(n):
            if node:
                row[node] = row[rng.integers(node)]
            row[node, node] = True
    return jnp.asarray(masks)


def _gaps() -> AttentionMask:
    rng = np.random.default_rng(5)
    order = np.stack([rng.permutation(1000)[:290] for _ in range(2)])
    return AttentionMask(
        q_positions=ends(7, 400, 900),
        k_positions=jnp.asarray(order, jnp.int32),
        k_valid=jnp.asarray(rng.random((2, 290)) < 0.7),
        window=jnp.int32(300),
        causal=True,
    )


def cases() -> dict[str, tuple[tuple[int, ...], AttentionMask]]:
    """Name -> (sizes b, t, s, h, g, d[, dv], mask)."""
    tree = random_tree(3, 2, 13)
    return {
        "everything": ((2, 5, 70, 4, 2, 32), AttentionMask()),
        "values_wider": ((1, 3, 40, 4, 4, 16, 48), AttentionMask()),
        "one_token": (
            (3, 1, 300, 6, 2, 32),
            AttentionMask(lengths=jnp.asarray([300, 129, 1], jnp.int32)),
        ),
        "chunk_over_cache": (
            (2, 9, 300, 8, 1, 16),
            AttentionMask(
                q_positions=ends(9, 259, 40), lengths=jnp.asarray([260, 41]), causal=True
            ),
        ),
        "gaps_and_validity": ((2, 7, 290, 4, 4, 32), _gaps()),
        "tree": (
            (2, 13, 300, 6, 3, 32),
            AttentionMask(
                q_positions=ends(13, 266, 132),
                lengths=jnp.asarray([250, 120]),
                tree=tree,
                tree_start=jnp.asarray([250, 120]),
                causal=True,
            ),
        ),
        "tree_only": (
            (2, 13, 140, 2, 2, 16),
            AttentionMask(tree=tree, tree_start=jnp.asarray([0, 127])),
        ),
        "causal": ((1, 200, 200, 4, 2, 32), AttentionMask(causal=True)),
        "window": ((1, 333, 333, 2, 1, 16), AttentionMask(window=jnp.int32(60))),
        "packed": (
            (1, 300, 300, 6, 2, 32),
            AttentionMask(
                q_segments=segments(300, 50, 129, 260),
                k_segments=segments(300, 50, 129, 260),
                causal=True,
            ),
        ),
        "encoder": (
            (2, 150, 150, 4, 2, 16),
            AttentionMask(lengths=jnp.asarray([150, 77], jnp.int32)),
        ),
        "long_chunk": (
            (2, 140, 400, 4, 1, 32),
            AttentionMask(
                q_positions=ends(140, 399, 139),
                window=jnp.int32(200),
                lengths=jnp.asarray([400, 140]),
                causal=True,
            ),
        ),
        "unseen_rows": (
            (2, 140, 260, 4, 2, 16),
            AttentionMask(
                q_segments=jnp.asarray([[7] * 70 + [1] * 70] * 2, jnp.int32),
                k_segments=jnp.ones((2, 260), jnp.int32),
                lengths=jnp.asarray([260, 0]),
            ),
        ),
    }


CASES = cases()
BF16_CASES = ("one_token", "values_wider", "tree", "causal", "long_chunk", "unseen_rows")


@jax.jit
def reference(q: Any, k: Any, v: Any, mask: AttentionMask, scale: Any = None) -> Any:
    """(out, lse) of the reference implementation."""
    return attention(q, k, v, mask=mask, scale=scale, return_lse=True, implementation="reference")


class AttentionCases:
    """Runs all cases on one implementation; subclasses set `implementation`."""

    implementation = ""
    blocks = BLOCKS

    def run(self, q: Any, k: Any, v: Any, mask: AttentionMask, **options: Any) -> Any:
        """(out, lse) of the implementation under test, jitted."""

        def call(q, k, v, mask):
            return attention(
                q, k, v, mask=mask, return_lse=True, blocks=self.blocks,
                implementation=self.implementation, **options,
            )  # fmt: skip

        return jax.jit(call)(q, k, v, mask)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in BF16_CASES],
    )
    def test_equals_the_reference(self, name, dtype):
        sizes, mask = CASES[name]
        q, k, v = (x.astype(dtype) for x in tensors(1, *sizes))
        wanted = reference(q, k, v, mask)
        out, lse = self.run(q, k, v, mask)
        assert out.dtype == dtype and lse.dtype == jnp.float32
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(
            np.float32(out), np.float32(wanted[0]), rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(lse, wanted[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["one_token", "gaps_and_validity", "tree", "long_chunk"])
    def test_slots_that_nobody_sees_change_no_bit(self, name):
        sizes, mask = CASES[name]
        q, k, v = tensors(2, *sizes)
        dense = np.asarray(mask.dense(sizes[1], sizes[2]))
        seen = np.any(dense, axis=(1, 2))[:, :, None, None]
        assert not seen.all()
        dirty_k = jnp.where(seen, k, jnp.nan)
        sign = np.sign(np.random.default_rng(0).normal(size=v.shape))
        dirty_v = jnp.where(seen, v, 1e4 * sign)
        clean, dirty = self.run(q, k, v, mask), self.run(q, dirty_k, dirty_v, mask)
        assert np.isfinite(np.asarray(dirty[0])).all()
        for a, b in zip(clean, dirty, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    def test_a_query_that_sees_nothing_gives_zeros(self):
        sizes, mask = CASES["unseen_rows"]
        out, lse = self.run(*tensors(3, *sizes), mask)
        assert (np.asarray(out)[:, :70] == 0).all() and (np.asarray(out)[1] == 0).all()
        assert np.isneginf(np.asarray(lse)[:, :70]).all() and np.isneginf(np.asarray(lse)[1]).all()
        assert np.isfinite(np.asarray(lse)[0, 70:]).all()

    @pytest.mark.parametrize("scale", [0.0, 3.0, jnp.float32(0.3)])
    def test_scale(self, scale):
        sizes, mask = CASES["chunk_over_cache"]
        q, k, v = tensors(4, *sizes)
        wanted, _ = reference(q, k, v, mask, scale)
        out, _ = self.run(q, k, v, mask, scale=scale)
        np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)

    def test_lengths_window_and_tree_are_data(self):
        """Other control values reuse the compiled program."""
        sizes, mask = CASES["tree"]
        q, k, v = tensors(5, *sizes)
        traces = []

        @jax.jit
        def call(q, k, v, mask):
            traces.append(1)
            return attention(
                q, k, v, mask=mask, blocks=self.blocks, implementation=self.implementation
            )

        for length, window in ((200, 40), (90, 500), (10, 3)):
            start = jnp.asarray([length, length + 1])
            now = dataclasses.replace(
            mask,
                lengths=start, tree_start=start, window=jnp.int32(window),
                q_positions=ends(13, length + 12, length + 13),
            )  # fmt: skip
            wanted, _ = reference(q, k, v, now)
            np.testing.assert_allclose(call(q, k, v, now), wanted, rtol=1e-5, atol=1e-5)
        assert len(traces) == 1

    @pytest.mark.parametrize("name", ["causal", "chunk_over_cache", "unseen_rows"])
    def test_gradient(self, name):
        sizes, mask = CASES[name]
        q, k, v = tensors(6, *sizes)
        weight, lse_weight = tensors(7, *sizes)[0], jnp.cos(jnp.arange(sizes[1]))[None, :, None]

        def loss(implementation):
            def of(q, k, v):
                out, lse = attention(
                    q, k, v, mask=mask, return_lse=True, blocks=self.blocks,
                    implementation=implementation,
                )  # fmt: skip
                lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
                return (out * weight).sum() + (lse * lse_weight).sum()

            return jax.jit(jax.grad(of, argnums=(0, 1, 2)))(q, k, v)

        for ours, wanted in zip(loss(self.implementation), loss("reference"), strict=True):
            assert np.abs(np.asarray(wanted)).max() > 0.1
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=2e-5)
