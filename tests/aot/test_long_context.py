"""The kernels of long contexts compiled for real TPU targets, and what they cost by the compiler.

Shapes of a model of 7B parameters: 28 query heads, 4 key heads of 128, one piece of 32,768 queries
that ends a text of 32k, 128k or 1M tokens, in bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ops.attention import AttentionMask, alibi, attention, temperature, window_decay
from ops.block_sparse import SparsePlan
from ops.block_sparse.tpu import FETCHED, GATHERED_BYTES, attend_plan, launches_of
from ops.dual_chunk import dual_chunk_attention
from ops.vertical_slash import vertical_slash_plan
from tests.aot import CHIPS, compile_for, figures

pytestmark = pytest.mark.aot

S = jax.ShapeDtypeStruct
I32, BF16 = jnp.int32, jnp.bfloat16
PIECE, HEADS, GROUPS, WIDTH = 32768, 28, 4, 128
STRIDE = 262144 - 8192
LENGTHS = {"32k": 32768, "128k": 131072, "1M": 1048576}
RANGES, COLUMNS = 1024, 1024
MOST = (1024, 8192)
"""Bounds of budgets, as the policy has them by default."""


def compile_dense(chip, t, s, h=HEADS, g=GROUPS, d=WIDTH, dtype=BF16, stride=STRIDE, b=1):
    """Dual chunk attention; keys heads first, as the dense cache stores them."""

    def call(q, k, v, at, lengths):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        return dual_chunk_attention(
            q, k, v, at, stride=stride, lengths=lengths, implementation="tpu"
        )

    keys = S((b, g, s, d), dtype)
    q = S((3, b, t, h, d), dtype)
    return compile_for(chip, call, q, keys, keys, S((b, t), I32), S((b,), I32))


def compile_sparse(
    chip, t, s, h=HEADS, g=GROUPS, d=WIDTH, dtype=BF16, stride=STRIDE, b=1,
    ranges=RANGES, columns=COLUMNS,
):  # fmt: skip
    n = -(-t // 64)

    def call(q, k, v, at, plan):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        return attend_plan(q, k, v, at, plan, stride, d**-0.5)

    starts, single = S((b, h, n, ranges), I32), S((b, h, n, columns), I32)
    plan = SparsePlan(starts, starts, S((b, h, n), I32), single, S((b, h, n), I32))
    keys = S((b, g, s, d), dtype)
    return compile_for(chip, call, S((3, b, t, h, d), dtype), keys, keys, S((b, t), I32), plan)


def compile_plan(chip, t, s, h=HEADS, g=GROUPS, d=WIDTH, dtype=BF16, stride=STRIDE, b=1):
    """What makes a plan from queries and keys: the estimate, the selection, the lists."""

    def call(q, k, first, counts, vertical, slash):
        k = jnp.swapaxes(k, 1, 2)
        return vertical_slash_plan(q, k, first, counts, vertical, slash, stride=stride, most=MOST)

    keys, row, heads = S((b, g, s, d), dtype), S((b,), I32), S((b, h), I32)
    return compile_for(chip, call, S((3, b, t, h, d), dtype), keys, row, row, heads, heads)


def shown(name: str, compiled: Any, times: int = 1) -> dict[str, float]:
    """The compiler's figures, printed; it counts the body of a loop of launches once."""
    seen = figures(compiled)
    seen["flops"] *= times
    seen["bytes_accessed"] *= times
    print(f"\n{name} x {times}: " + ", ".join(f"{k} {v:.4g}" for k, v in seen.items()))
    return seen


@pytest.mark.parametrize("name", LENGTHS)
def test_dense_and_sparse_prefill_of_a_7b_model(name):
    s = LENGTHS[name]
    dense_program, sparse_program = compile_dense("v5p", PIECE, s), compile_sparse("v5p", PIECE, s)
    launches = launches_of(1, HEADS, PIECE // 64, COLUMNS, 2 * WIDTH * 2, GATHERED_BYTES)
    dense = shown(f"dense {name}", dense_program)
    sparse = shown(f"sparse {name}", sparse_program, launches)
    assert "attention_prefill" in dense_program.as_text()
    assert "attention_block_sparse" in sparse_program.as_text()
    # Memory beside arguments and results does not grow with the text.
    assert dense["temporary_bytes"] < 2**23
    assert sparse["temporary_bytes"] < 2 * 2**30
    dense_flops = 4 * HEADS * PIECE * s * WIDTH
    dense_bytes = HEADS * (PIECE // 512) * s * WIDTH * 2 * 2
    assert dense["flops"] == pytest.approx(dense_flops, rel=0.02)
    assert dense["bytes_accessed"] == pytest.approx(dense_bytes, rel=0.2 if name != "32k" else 0.5)
    keys = RANGES * FETCHED + COLUMNS
    assert sparse["flops"] == pytest.approx(4 * HEADS * PIECE * keys * WIDTH, rel=0.05)
    assert sparse["bytes_accessed"] > HEADS * PIECE // 64 * keys * WIDTH * 2 * 2
    if name == "1M":
        assert sparse["flops"] < 0.1 * dense["flops"]
        assert sparse["bytes_accessed"] < dense["bytes_accessed"]


@pytest.mark.parametrize("name", LENGTHS)
def test_plan_of_a_7b_model(name):
    plan = shown(f"plan {name}", compile_plan("v5p", PIECE, LENGTHS[name]))
    # The lists are most of it; scores of all heads at once would be 7 GiB at 1M tokens.
    assert plan["temporary_bytes"] < 3 * 2**30
    lists = HEADS * (PIECE // 64) * (2 * LENGTHS[name] // 64 + MOST[0]) * 4
    assert plan["output_bytes"] == pytest.approx(lists, rel=0.1)


def test_long_lists_of_a_7b_model_move_more_than_dense():
    """What bounds useful budgets: a range serves 64 queries, a block of the dense kernel 512."""
    program = compile_sparse("v5p", PIECE, LENGTHS["1M"], ranges=6 * RANGES)
    launches = launches_of(1, HEADS, PIECE // 64, COLUMNS, 2 * WIDTH * 2, GATHERED_BYTES)
    sparse = shown("sparse 1M, long lists", program, launches)
    assert sparse["flops"] < 0.5 * 4 * HEADS * PIECE * LENGTHS["1M"] * WIDTH
    assert sparse["bytes_accessed"] > 4 * HEADS * (PIECE // 512) * LENGTHS["1M"] * WIDTH


@pytest.mark.parametrize("chip", CHIPS)
def test_longest_lists_fit(chip):
    """As many ranges as a text of 1M tokens can have: their scalars fit beside one another."""
    compiled = compile_sparse(chip, 512, LENGTHS["1M"], ranges=16387, columns=6144)
    assert "attention_block_sparse" in compiled.as_text()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("d", [64, 128])
def test_every_width_and_type_compiles(chip, dtype, d):
    sizes = dict(h=6, g=2, d=d, dtype=dtype, b=2)
    for t in (1, 1000):  # the decode and the prefill kernel
        name = "attention_decode" if t == 1 else "attention_prefill"
        compiled = compile_dense(chip, t, 3000, stride=768, **sizes)
        assert name in compiled.as_text() and figures(compiled)["flops"] > 0
    compiled = compile_sparse(chip, 1000, 3000, stride=768, ranges=40, columns=150, **sizes)
    assert "attention_block_sparse" in compiled.as_text() and figures(compiled)["flops"] > 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("t", [1, 1000])
def test_hooks_compile(chip, t):
    def call(q, k, v, at, slopes, factor):
        hooks = alibi(slopes), window_decay(factor, 100.0), temperature(512.0)
        mask = AttentionMask(q_positions=at, causal=True)
        return attention(q, k, v, mask=mask, hooks=hooks, implementation="tpu")

    q, keys = S((2, t, 8, 128), BF16), S((2, 3000, 2, 128), BF16)
    compiled = compile_for(chip, call, q, keys, keys, S((2, t), I32), S((8,), jnp.float32),
                           S((), jnp.float32))  # fmt: skip
    assert ("attention_decode" if t == 1 else "attention_prefill") in compiled.as_text()
