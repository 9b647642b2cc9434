"""Losses that several tasks share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_ROWS = 2048
"""Logits are made for about this many tokens at a time: wide enough for full matmul speed."""


def token_cross_entropy(
    hidden: Float[Array, "b t width"],
    head: Float[Array, "vocab width"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
) -> Float[Array, ""]:
    """Masked sum over tokens of ``-log softmax(hidden @ head.T)[target]``, in nats.

    The logits of the whole batch never exist. When differentiated, each chunk of positions gives
    its loss and both of its gradients at once, so that the backward pass only scales them: three
    products per chunk, with nothing recomputed. Sums are float32. Chunks run along ``t``, which
    leaves a batch that is sharded over devices where it is.
    """
    return _chunked(hidden, head, targets, mask)


@jax.custom_vjp
def _chunked(hidden: Array, head: Array, targets: Array, mask: Array) -> Array:
    def add(total: Array, chunk: tuple) -> tuple[Array, None]:
        logits, lse = _logits(chunk[0], head)
        return total + _chunk_loss(logits, lse, *chunk[1:]), None

    return _scan_chunks(add, jnp.zeros((), jnp.float32), (hidden, targets, mask))[0]


def _forward(hidden: Array, head: Array, targets: Array, mask: Array) -> tuple[Array, tuple]:
    def add(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        total, d_head = carry
        h, target, weight = chunk
        logits, lse = _logits(h, head)
        total = total + _chunk_loss(logits, lse, target, weight)
        hit = jnp.arange(head.shape[0], dtype=target.dtype)[None, None] == target[..., None]
        d_logits = (jnp.exp(logits - lse[..., None]) - hit) * weight[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vw->btw", d_logits, head)
        d_head = d_head + jnp.einsum(  # the narrow factor first: that one is copied
            "btw,btv->wv", h, d_logits, preferred_element_type=jnp.float32
        )
        return (total, d_head), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape[::-1], jnp.float32))
    (total, d_head), d_hidden = _scan_chunks(add, start, (hidden, targets, mask))
    return total, (_join(d_hidden), d_head.T.astype(head.dtype))


def _backward(saved: tuple, scale: Array) -> tuple:
    d_hidden, d_head = saved
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None


_chunked.defvjp(_forward, _backward)


def _logits(h: Array, head: Array) -> tuple[Array, Array]:
    logits = jnp.einsum("btw,vw->btv", h, head, preferred_element_type=jnp.float32)
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _chunk_loss(logits: Array, lse: Array, target: Array, weight: Array) -> Array:
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jnp.sum((lse - chosen) * weight)


def _scan_chunks(body, start, arrays):
    """Scan over chunks of axis 1: the largest divisor of t with at most CHUNK_ROWS rows."""
    b, t = arrays[1].shape
    size = max(n for n in range(1, t + 1) if t % n == 0 and (n == 1 or b * n <= CHUNK_ROWS))

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, t // size, size, *x.shape[2:]), 1, 0)

    chunks = jax.tree.map(split, arrays)
    if t == size:  # no loop around a single chunk
        carry, out = body(start, jax.tree.map(lambda x: x[0], chunks))
        return carry, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(body, start, chunks)


def _join(chunks: Array) -> Array:
    n, b, size = chunks.shape[:3]
    return jnp.moveaxis(chunks, 0, 1).reshape(b, n * size, *chunks.shape[3:])
