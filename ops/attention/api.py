"""One entry to attention, and the choice of its implementation."""

import functools
from typing import Any, Literal, overload

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ops.attention.hooks import LogitHook
from ops.attention.mask import AttentionMask
from ops.attention.reference import reference_attention
from ops.attention.tpu_decode import decode_attention
from ops.attention.tpu_prefill import prefill_attention
from ops.attention.xla import xla_attention
from ops.platform import implementation_of

DECODE_ROWS = 256
"""Up to this many query rows per key head (h / g * t) the decode kernel serves a TPU call."""


@flax.struct.dataclass
class BlockSizes:
    """Static block sizes: queries and key slots per step. None leaves the choice to the kernel.

    On TPU both are multiples of 128. The XLA path uses `q` as its chunk of queries.
    """

    q: int | None = flax.struct.field(pytree_node=False, default=None)
    kv: int | None = flax.struct.field(pytree_node=False, default=None)


@overload
def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    *,
    mask: AttentionMask | None = ...,
    scale: float | Float[Array, ""] | None = ...,
    implementation: str = ...,
    return_lse: Literal[False] = ...,
    blocks: BlockSizes | None = ...,
    hooks: tuple[LogitHook, ...] = ...,
) -> Float[Array, "b t h dv"]: ...


@overload
def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    *,
    mask: AttentionMask | None = ...,
    scale: float | Float[Array, ""] | None = ...,
    implementation: str = ...,
    return_lse: Literal[True],
    blocks: BlockSizes | None = ...,
    hooks: tuple[LogitHook, ...] = ...,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]: ...


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g dv"],
    *,
    mask: AttentionMask | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
    blocks: BlockSizes | None = None,
    hooks: tuple[LogitHook, ...] = (),
) -> Float[Array, "b t h dv"] | tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]:
    """Grouped-query attention: softmax(scale * q k^T) v over the slots that `mask` shows.

    Head i of q reads key head i // (h / g). Sums are float32 and the output has q's dtype. A query
    that sees nothing gives zeros and lse -inf. Slots that no query sees do not change the output
    by a bit: their keys may hold anything, their values anything finite.

    Args:
      q, k, v: queries [b, t, h, d], keys [b, s, g, d], values [b, s, g, dv]; h % g == 0.
      mask: visibility; None shows everything.
      scale: multiplies the scores in float32, may be traced; default d ** -0.5.
      implementation: "auto" takes the kernel of `ops.platform.target_platform()`; a name takes
        that one and fails if it cannot serve the call. "interpret" runs the TPU kernels on CPU.
      return_lse: also return the log-sum-exp of the scaled scores, float32 [b, t, h].
      blocks: block sizes, static.
      hooks: changes of the scaled scores by the mask's positions, in order (`LogitHook`). A mask
        without q_positions stands for 0..t-1, and needs t == s.

    Raises:
      ValueError: shapes, mask, hooks or implementation that do not fit, with the reason.
    """
    mask = AttentionMask() if mask is None else mask
    blocks = BlockSizes() if blocks is None else blocks
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads; "
            "grouped-query attention needs h % g == 0"
        )
    mask.validate(q.shape[0], q.shape[1], k.shape[1])
    for hook in hooks:
        hook.validate(q.shape[2])
    if hooks and mask.q_positions is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"logit hooks over {q.shape[1]} queries and {k.shape[1]} slots need mask.q_positions: "
            "without them query i is taken to stand at slot i"
        )
    scaled_by = q.shape[3] ** -0.5 if scale is None else scale
    implementation = implementation_of(implementation)
    if implementation == "reference":
        out, lse = reference_attention(q, k, v, mask, scaled_by, hooks)
    elif implementation == "xla":
        out, lse = xla_attention(q, k, v, mask, scaled_by, hooks, chunk=blocks.q)
    elif implementation in ("tpu", "interpret"):
        scaled_by = jnp.asarray(scaled_by, jnp.float32)
        interpret = implementation == "interpret"
        result: Any = _kernel_attention(blocks, interpret, q, k, v, mask, scaled_by, hooks)
        out, lse = result
    else:
        raise ValueError(
            f"unknown attention implementation {implementation!r}; "
            "name one of auto, reference, xla, tpu, interpret"
        )
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_attention(blocks, interpret, q, k, v, mask, scale, hooks):
    """The TPU kernel that fits the call; gradients recompute through the XLA path."""
    rows = q.shape[2] // k.shape[2] * q.shape[1]
    if mask.tree is not None or rows <= DECODE_ROWS:
        return decode_attention(
            q, k, v, mask, scale, hooks, block_kv=blocks.kv, interpret=interpret
        )
    return prefill_attention(
        q, k, v, mask, scale, hooks,
        block_q=blocks.q or 512, block_kv=blocks.kv or 512, interpret=interpret,
    )  # fmt: skip


def _forward(blocks, interpret, *args):
    return _kernel_attention(blocks, interpret, *args), args


def _backward(blocks, interpret, saved: Any, cotangents: Any):
    q, k, v, mask, scale, hooks = saved

    def recompute(q, k, v, scale, hooks):
        return xla_attention(q, k, v, mask, scale, hooks, chunk=blocks.q)

    dq, dk, dv, dscale, dhooks = jax.vjp(recompute, q, k, v, scale, hooks)[1](cotangents)
    return dq, dk, dv, None, dscale, dhooks


_kernel_attention.defvjp(_forward, _backward)
