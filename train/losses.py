"""Losses that several tasks share."""

from typing import Any

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
    return _chunked(hidden, head, None, targets, mask)


def law_cross_entropy(
    hidden: Float[Array, "b t width"],
    head: Float[Array, "vocab width"],
    teacher: Float[Array, "b t width_teacher"],
    teacher_head: Float[Array, "vocab width_teacher"],
    mask: Float[Array, "b t"],
) -> Float[Array, ""]:
    """As :func:`token_cross_entropy`, in the mean over the tokens of another model's law.

    That law is ``softmax(teacher @ teacher_head.T)`` and gets no gradient. Its entropy is the least
    value; what is above it is the KL divergence from the teacher's law to the model's.
    """
    return _chunked(hidden, head, teacher_head, teacher, mask)


@jax.custom_vjp
def _chunked(hidden: Array, head: Array, law_head: Any, targets: Array, mask: Array) -> Array:
    def add(total: Array, chunk: tuple) -> tuple[Array, None]:
        h, target, weight = chunk
        return total + jnp.sum(_nats(h, head, law_head, target)[0] * weight), None

    return _scan_chunks(add, jnp.zeros((), jnp.float32), (hidden, targets, mask))[0]


def _forward(
    hidden: Array, head: Array, law_head: Any, targets: Array, mask: Array
) -> tuple[Array, tuple]:
    def add(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        total, d_head = carry
        h, target, weight = chunk
        nats, by_logits = _nats(h, head, law_head, target)
        d_logits = (by_logits * weight[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vw->btw", d_logits, head)
        d_head = d_head + jnp.einsum(  # the narrow factor first: that one is copied
            "btw,btv->wv", h, d_logits, preferred_element_type=jnp.float32
        )
        return (total + jnp.sum(nats * weight), d_head), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape[::-1], jnp.float32))
    (total, d_head), d_hidden = _scan_chunks(add, start, (hidden, targets, mask))
    return total, (_join(d_hidden), d_head.T.astype(head.dtype))


def _backward(saved: tuple, scale: Array) -> tuple:
    d_hidden, d_head = saved
    scaled = (x * scale.astype(x.dtype) for x in (d_hidden, d_head))
    return (*scaled, None, None, None)


_chunked.defvjp(_forward, _backward)


def _logits(h: Array, head: Array) -> Array:
    return jnp.einsum("btw,vw->btv", h, head, preferred_element_type=jnp.float32)


def _nats(h: Array, head: Array, law_head: Any, target: Array) -> tuple[Array, Array]:
    """Cross-entropy of every token, and its derivative by the logits.

    ``target`` holds token ids, or with ``law_head`` the hidden states of another model's law.
    """
    logits = _logits(h, head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    if law_head is None:
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        law = jnp.arange(head.shape[0], dtype=target.dtype)[None, None] == target[..., None]
    else:
        law = jax.nn.softmax(_logits(target, law_head), axis=-1)
        chosen = jnp.sum(law * logits, axis=-1)
    return lse - chosen, jnp.exp(logits - lse[..., None]) - law


def _scan_chunks(body, start, arrays):
    """Scan over chunks of axis 1: the largest divisor of t with at most CHUNK_ROWS rows."""
    b, t = arrays[-1].shape
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
