"""Attention compiled by the real TPU compiler for v5e, v5p and v6e, on a host without a TPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from inference.cache import DenseLayer
from ops.attention import AttentionMask, attention, hybrid_tree_attention
from ops.platform import target
from tests.aot import CHIPS, compile_for, figures, mesh

pytestmark = pytest.mark.aot

S = jax.ShapeDtypeStruct
I32 = jnp.int32


def prefill_mask(b, t, s):
    return AttentionMask(
        q_positions=S((b, t), I32), k_positions=S((b, s), I32), window=S((), I32),
        q_segments=S((b, t), I32), k_segments=S((b, s), I32), lengths=S((b,), I32), causal=True,
    )  # fmt: skip


def tree_mask(b, t, s):
    return AttentionMask(
        q_positions=S((b, t), I32), k_positions=S((b, s), I32), lengths=S((b,), I32),
        tree=S((b, t, t), jnp.bool_), tree_start=S((b,), I32), causal=True,
    )  # fmt: skip


def length_mask(b, t, s):
    return AttentionMask(lengths=S((b,), I32))


SHAPES = {  # name: (b, t, s, h, g, d), mask
    "prefill_2k": ((1, 2048, 2048, 32, 8, 128), lambda b, t, s: AttentionMask(causal=True)),
    "prefill_ragged": ((2, 1000, 1300, 9, 3, 64), prefill_mask),
    "prefill_small": ((1, 300, 333, 9, 3, 64), prefill_mask),
    "prefill_32k": ((1, 32768, 32768, 9, 3, 64), prefill_mask),
    "prefill_chunk_128k": ((1, 2048, 131072, 32, 8, 128), prefill_mask),
    "decode_32k": ((4, 1, 32768, 32, 8, 128), length_mask),
    "decode_128k": ((1, 1, 131072, 32, 8, 128), length_mask),
    "verify_32k": ((4, 26, 32768, 32, 8, 128), tree_mask),
    "verify_128k": ((1, 64, 131072, 32, 8, 128), tree_mask),
    "verify_ragged": ((2, 61, 5000, 9, 3, 64), tree_mask),
    "decode_many_heads": ((2, 3, 100, 32, 32, 64), prefill_mask),
    "decode_one_head": ((2, 5, 1000, 8, 1, 256), prefill_mask),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles(name, dtype, chip):
    (b, t, s, h, g, d), mask = SHAPES[name]

    def call(q, cache, mask):
        return attention(q, *cache.read(None), mask=mask, return_lse=True, implementation="tpu")

    keys = S((b, g, s, d), dtype)
    compiled = compile_for(
        chip, call, S((b, t, h, d), dtype), DenseLayer(keys, keys), mask(b, t, s)
    )
    seen = figures(compiled)
    print(
        f"\n{name} {dtype.__name__} {chip}: " + ", ".join(f"{k} {v:.4g}" for k, v in seen.items())
    )
    kernel = "attention_decode" if name.startswith(("decode", "verify")) else "attention_prefill"
    assert kernel in compiled.as_text()
    share = 2 if name == "prefill_2k" else 1
    assert seen["flops"] >= 4 * b * h * t * s * d / share  # the kernel's own cost estimate
    if kernel == "attention_decode" and d % 128 == 0:
        cache = 2 * b * s * g * d * dtype.dtype.itemsize
        assert seen["temporary_bytes"] < max(0.1 * cache, 2**24)  # the cache is not copied


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("s, masked", [(32768, length_mask), (581, prefill_mask)])
def test_a_tree_in_two_parts_compiles(s, masked, chip):
    """Against a long cache, and against a ring that is read by position."""
    b, t, h, g, d = 4, 68, 32, 8, 128

    def call(q, cache, mask, k, v, tree):
        return hybrid_tree_attention(q, *cache.read(None), mask, k, v, tree, implementation="tpu")

    keys, new = S((b, g, s, d), jnp.bfloat16), S((b, t, g, d), jnp.bfloat16)
    cache, tree = DenseLayer(keys, keys), S((b, t, t), jnp.bool_)
    compiled = compile_for(
        chip, call, S((b, t, h, d), jnp.bfloat16), cache, masked(b, t, s), new, new, tree
    )
    seen = figures(compiled)
    print(f"\nhybrid {s} {chip}: " + ", ".join(f"{k} {v:.4g}" for k, v in seen.items()))
    assert compiled.as_text().count("attention_decode") >= 2
    assert seen["temporary_bytes"] < max(0.1 * 4 * b * s * g * d, 2**26)  # the cache is not copied


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("b, g, d", [(4, 8, 128), (1, 1, 128)])
def test_a_decoding_loop_does_not_copy_its_cache(chip, b, g, d):
    """append and attend in a while_loop: temporaries stay far below the cache."""
    s, h, width = 131072, 4 * g, 1024

    def loop(x, cache, lengths, w_q, w_kv, w_out):
        def step(carry):
            i, x, cache, n = carry
            new = (x @ w_kv).reshape(b, 1, 2, g, d)
            cache = cache.append(new[:, :, 0], new[:, :, 1], n)
            q = (x @ w_q).reshape(b, 1, h, d)
            out = attention(q, *cache.read(None), mask=AttentionMask(lengths=n + 1))
            return i + 1, out.reshape(b, h * d) @ w_out, cache, n + 1

        return jax.lax.while_loop(lambda c: c[0] < 16, step, (0, x, cache, lengths))

    bf16 = jnp.bfloat16
    keys = S((b, g, s, d), bf16)
    with target("tpu"):
        compiled = compile_for(
            chip, loop, S((b, width), bf16), DenseLayer(keys, keys), S((b,), I32),
            S((width, h * d), bf16), S((width, 2 * g * d), bf16), S((h * d, width), bf16),
            donate_argnums=(1,),
        )  # fmt: skip
    seen = figures(compiled)
    print(f"\nloop {chip}: " + ", ".join(f"{k} {v:.4g}" for k, v in seen.items()))
    assert "attention_decode" in compiled.as_text()
    assert seen["temporary_bytes"] < 0.05 * 2 * b * s * g * d * 2


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", ["prefill_ragged", "verify_32k"])
def test_compiles_inside_shard_map(name, chip):
    """Rows over `data`, heads over `tensor`; the mask is typed as varying over rows only."""
    (_, t, s, *_), mask = SHAPES[name]
    b, h, g, d = 4, 8, 4, 128
    devices = mesh(chip, data=2, tensor=4)
    heads, rows = PartitionSpec("data", None, "tensor", None), PartitionSpec("data")
    masks = mask(b, t, s)
    mask_specs = jax.tree.map(lambda x: rows if x.shape else PartitionSpec(), masks)
    sharded = jax.shard_map(
        lambda q, k, v, mask: attention(q, k, v, mask=mask, return_lse=True),
        mesh=devices,
        in_specs=(heads, heads, heads, mask_specs),
        out_specs=(heads, PartitionSpec("data", None, "tensor")),
    )

    def place(x, spec):
        return S(x.shape, x.dtype, sharding=NamedSharding(devices, spec))

    shapes = [S((b, n, heads_, d), jnp.bfloat16) for n, heads_ in ((t, h), (s, g), (s, g))]
    arguments = [place(x, heads) for x in shapes]
    with target("tpu"):
        compiled = (
            jax.jit(sharded).lower(*arguments, jax.tree.map(place, masks, mask_specs)).compile()
        )
    text = compiled.as_text() or ""
    assert "tpu_custom_call" in text
    assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.parametrize("chip", CHIPS)
def test_gradient_compiles(chip):
    """Training through the kernel: forward by the kernel, backward recomputed by XLA."""
    x = S((1, 512, 8, 128), jnp.bfloat16)

    def loss(q, k, v):
        return attention(q, k, v, mask=AttentionMask(causal=True)).astype(jnp.float32).sum()

    with target("tpu"):
        compiled = compile_for(chip, jax.value_and_grad(loss, argnums=(0, 1, 2)), x, x, x)
    assert "attention_prefill" in compiled.as_text()
