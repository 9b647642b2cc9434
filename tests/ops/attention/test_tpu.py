"""The TPU kernels on CPU: all shared cases, strict interpretation, meshes, and lowering.

The kernels move no data by hand (Pallas pipelines their blocks), so the shared cases run with the
plain interpreter. A few run again with `InterpretParams`, where memory that was never written
holds NaN and a read out of bounds is an error.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from ops.attention import AttentionMask, BlockSizes, attention
from ops.attention.tpu_decode import decode_attention, decode_block
from ops.attention.tpu_prefill import prefill_attention
from ops.platform import target
from tests.ops.attention.cases import BF16_CASES, CASES, AttentionCases, reference, tensors
from tests.ops.races import races_found


class TestInterpret(AttentionCases):
    implementation = "interpret"


@pytest.mark.parametrize("kernel", [prefill_attention, decode_attention])
@pytest.mark.parametrize("name", ["packed", "long_chunk", "unseen_rows", "tree"])
def test_strict_interpretation(kernel, name):
    """Either kernel on the same cases: poisoned memory, checked bounds, races looked for."""
    sizes, mask = CASES[name]
    if mask.tree is not None and kernel is prefill_attention:
        pytest.skip("the prefill kernel refuses trees, see test_refusals")
    q, k, v = tensors(11, *sizes)
    strict = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    try:
        out, lse = jax.jit(
            lambda *args: kernel(*args, 0.2, block_kv=128, interpret=strict)
        )(q, k, v, mask)  # fmt: skip
        jax.block_until_ready(out)
        assert not races_found()
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    wanted, wanted_lse = reference(q, k, v, mask, 0.2)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0, 120, 128, 290, 300])
def test_tree_at_every_edge(start):
    """Scratch slots inside one block, across two, at the end of the cache and past it."""
    (_, t, *_), mask = CASES["tree"]
    sizes = (2, t, 300, 6, 3, 32)
    now = dataclasses.replace(
            mask,
        tree_start=jnp.asarray([start, 40]), lengths=jnp.asarray([start, 40]),
        q_positions=None, causal=False,
    )  # fmt: skip
    q, k, v = tensors(12, *sizes)
    out, lse = _decode(q, k, v, now)
    wanted, wanted_lse = reference(q, k, v, now)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@jax.jit
def _decode(q, k, v, mask):
    return decode_attention(q, k, v, mask, q.shape[3] ** -0.5, block_kv=128, interpret=True)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("name", ["tree", "causal"])
def test_inside_shard_map(implementation, name):
    """Rows and heads over a mesh; the mask is split by rows and the same for all heads."""
    sizes, mask = CASES[name]
    rows = sizes[0]
    devices = np.array(jax.devices()[: 2 * rows]).reshape(rows, 2)
    mesh = Mesh(devices, ("data", "tensor"))
    heads = PartitionSpec("data", None, "tensor", None)
    q, k, v = tensors(13, rows, sizes[1], sizes[2], 4, 2, 16)
    by_rows = jax.tree.map(lambda x: PartitionSpec(*(("data",) if jnp.ndim(x) else ())), mask)

    def call(q, k, v, mask):
        return attention(
            q, k, v, mask=mask, return_lse=True, implementation=implementation,
            blocks=BlockSizes(q=128, kv=128),
        )  # fmt: skip

    sharded = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(heads, heads, heads, by_rows),
        out_specs=(heads, PartitionSpec("data", None, "tensor")),
        check_vma=implementation == "xla",  # the interpreter's own loops are not typed for it
    )
    out, lse = jax.jit(sharded)(q, k, v, mask)
    wanted, wanted_lse = reference(q, k, v, mask)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in BF16_CASES],
)
def test_lowers_for_tpu_without_one(name, dtype):
    sizes, mask = CASES[name]
    q, k, v = (x.astype(dtype) for x in tensors(14, *sizes))
    function = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask))
    with target("tpu"):
        lowered = function.trace(q, k, v, mask).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_exports_for_tpu():
    q, k, v = tensors(15, *CASES["causal"][0])
    function = jax.jit(lambda q, k, v: attention(q, k, v, mask=AttentionMask(causal=True)))
    with target("tpu"):
        exported = jax.export.export(function, platforms=["tpu"])(q, k, v)
    assert "attention_prefill" in exported.mlir_module()


def test_which_kernel_serves():
    def names(sizes, mask):
        q, k, v = tensors(16, *sizes)
        call = jax.jit(lambda q, k, v, m: attention(q, k, v, mask=m, implementation="tpu"))
        text = call.trace(q, k, v, mask).lower(lowering_platforms=("tpu",)).as_text()
        return [n for n in ("attention_prefill", "attention_decode") if n in text]

    assert names(*CASES["one_token"]) == ["attention_decode"]
    assert names(*CASES["tree"]) == ["attention_decode"]
    assert names(*CASES["causal"]) == ["attention_prefill"]


def test_default_key_block_fits():
    assert decode_block(rows=16, g=8, d=128, dv=128, itemsize=2) == 512
    assert decode_block(rows=16, g=32, d=128, dv=128, itemsize=4) == 128
    assert decode_block(rows=16, g=1, d=64, dv=64, itemsize=2) == 2048
    assert decode_block(rows=4096, g=1, d=64, dv=64, itemsize=2) == 128


def test_refusals():
    q, k, v = tensors(17, *CASES["tree"][0])
    with pytest.raises(ValueError, match="no tree mask"):
        prefill_attention(q, k, v, CASES["tree"][1], 1.0)
    with pytest.raises(ValueError, match="multiples of 128"):
        prefill_attention(q, k, v, AttentionMask(), 1.0, block_q=64)
    with pytest.raises(ValueError, match="multiples of 128"):
        decode_attention(q, k, v, AttentionMask(), 1.0, block_kv=100)
