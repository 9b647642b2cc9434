"""Dual chunk attention by the TPU kernels of `ops.attention`, which pick a rotation per block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ops.attention.api import DECODE_ROWS
from ops.attention.mask import AttentionMask
from ops.attention.tpu_decode import decode_attention
from ops.attention.tpu_prefill import prefill_attention
from ops.dual_chunk.pairs import attend_pairs


def attend_kernel(
    q: Float[Array, "3 b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    q_positions: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    stride: int,
    scale: float | Float[Array, ""],
    *,
    first: Int[Array, ""] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Output in v's dtype and log-sum-exp; the gradient recomputes through all pairs, in XLA.

    Up to `DECODE_ROWS` query rows per key head run in the decode kernel, more in the prefill one.

    `first` is the position of slot 0 where the slots are a share of a row's.

    Raises:
      ValueError: a stride or a share that is not a multiple of 128.
    """
    scale = jnp.asarray(scale, jnp.float32)
    attended: Any = _attend(stride, interpret, q, k, v, q_positions, lengths, scale, first)
    out, lse = attended
    return out.astype(v.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(stride, interpret, q, k, v, q_positions, lengths, scale, first):
    slots = None if first is None else _slots(k, first)
    mask = AttentionMask(q_positions, slots, lengths=lengths, causal=True)
    few = q.shape[3] // k.shape[2] * q.shape[2] <= DECODE_ROWS
    kernel = decode_attention if few else prefill_attention
    return kernel(q, k, v, mask, scale, stride=stride, origin=first, interpret=interpret)


def _slots(k, first):
    slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None] + first
    return jnp.broadcast_to(slots, k.shape[:2])


def _forward(stride, interpret, *args):
    return _attend(stride, interpret, *args), args


def _backward(stride, interpret, saved: Any, cotangents: Any):
    q, k, v, q_positions, lengths, scale, first = saved
    slots = _slots(k, 0 if first is None else first)
    mask = AttentionMask(q_positions, slots, lengths=lengths, causal=True)

    def recompute(q, k, v, scale):
        chunks = q_positions // stride, slots // stride
        out, lse = attend_pairs(q, k, v, *chunks, mask, scale, rows=128)
        return out.astype(q.dtype), lse

    dq, dk, dv, dscale = jax.vjp(recompute, q, k, v, scale)[1](cotangents)
    return dq, dk, dv, None, None, dscale, None


_attend.defvjp(_forward, _backward)
