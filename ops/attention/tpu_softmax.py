"""What the two TPU kernels share: one step of online softmax, and its end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return pl.cdiv(n, multiple) * multiple


def over_mesh(operands: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Makes a kernel callable inside shard_map, where all its operands must vary alike.

    Returns the operands, made to vary over every mesh axis that any of them varies over, and the
    type to give to the outputs. Outside shard_map both leave things as they are.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))

    def widen(x):
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    kind = jax.sharding.ManualAxisType(varying=axes)
    return tuple(widen(x) for x in operands), functools.partial(
        jax.ShapeDtypeStruct, manual_axis_type=kind
    )


def reset(top_ref: Any, total_ref: Any, sum_ref: Any) -> None:
    """Starts a run over key blocks."""
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)


def product(a: Any, b: Any, contract: int) -> Any:
    """a [m, n] times b in float32, contracting a's axis 1 with axis `contract` of b.

    float32 operands follow `jax_default_matmul_precision`. Narrower ones are exact in one pass
    whatever it says, and Mosaic refuses them under "highest".
    """
    precision = None if a.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def scores_of(q: Any, k: Any, scale: Any, visible: Any, change: Any = None) -> Any:
    """Scores [rows, block] in float32, -inf where not visible (whatever the key holds).

    `change` is applied to the scaled scores before they are hidden.
    """
    scores = product(q, k, 1) * scale
    return jnp.where(visible, scores if change is None else change(scores), -jnp.inf)


def values_of(v: Any, block: Any, slots: int) -> Any:
    """Values of one key block, zero past the end of the buffer (reads there are undefined)."""
    size = v.shape[0]
    if slots % size == 0:
        return v
    slot = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return jnp.where(slot < slots, v.astype(jnp.float32), 0.0).astype(v.dtype)


def accumulate(scores: Any, v: Any, top: Any, total: Any, weighted: Any) -> tuple[Any, Any, Any]:
    """One block of online softmax: new (top, total [rows, 128], weighted sum [rows, dv])."""
    new_top = jnp.maximum(top[:, :1], scores.max(axis=1, keepdims=True))
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - base)
    keep = jnp.exp(top[:, :1] - base)
    total = keep * total + weights.sum(axis=1, keepdims=True)
    fresh = product(weights.astype(v.dtype), v, 0)
    return jnp.broadcast_to(new_top, top.shape), total, keep * weighted + fresh


def finish(top: Any, total: Any, weighted: Any) -> tuple[Any, Any]:
    """Output [rows, dv] and lse [rows, 128] (every lane the same); empty rows: zeros and -inf."""
    filled = total > 0
    share = jnp.where(filled, total, 1.0)
    lse = jnp.where(filled, top + jnp.log(share), -jnp.inf)
    return weighted / share[:, :1], lse
