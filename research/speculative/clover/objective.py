"""Losses of Clover, Medusa and EAGLE-like drafters of a frozen target, in chunks of tokens.

All heads' outputs are first aligned by the position whose hidden state (and next token) they are
meant to be, so that the target's law is computed once for all heads. The head's matrix is frozen,
so a chunk's gradient is taken together with its loss and no logits are kept or recomputed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import medusa
from models.clover import CloverConfig
from models.eagle import EagleConfig
from train.losses import token_cross_entropy


def align(outputs: Float[Array, "heads b t width"]) -> Float[Array, "heads b t width"]:
    """Head i's row s moved to row s + i, the row of its target; what moves in is zero."""
    return jnp.stack(
        [jnp.pad(x, ((0, 0), (i, 0), (0, 0)))[:, : x.shape[1]] for i, x in enumerate(outputs)]
    )


def normalized_mask(
    mask: Float[Array, "b t"], heads: int, extra: float
) -> Float[Array, "heads b t"]:
    """Weights of the targets for every head: 1 over their number plus ``extra``, or 0.

    Head i has nothing to say about the first i targets of a row.
    """
    rows = jnp.arange(mask.shape[1])
    reached = rows[None] >= jnp.arange(heads)[:, None]
    weights = mask[None] * reached[:, None].astype(mask.dtype)
    total = jnp.sum(weights, axis=(1, 2), keepdims=True) + extra
    return weights / jnp.maximum(total, 1e-6)


def smooth_l1(
    outputs: Float[Array, "heads b t width"],
    target: Float[Array, "b t width"],
    weights: Float[Array, "heads b t"],
) -> Float[Array, " heads"]:
    """Per head, the weighted sum over positions of the mean SmoothL1 distance (beta 1)."""
    error = jnp.abs(outputs.astype(jnp.float32) - target[None].astype(jnp.float32))
    loss = jnp.where(error < 1.0, 0.5 * jnp.square(error), error - 0.5)
    return jnp.sum(jnp.mean(loss, axis=-1) * weights, axis=(1, 2))


def soft_cross_entropy(
    outputs: Float[Array, "heads b t width"],
    target: Float[Array, "b t width"],
    rows: Float[Array, "vocab width"],
    weights: Float[Array, "heads b t"],
    chunk: int = 1024,
) -> Float[Array, " heads"]:
    """Per head, the weighted sum of cross-entropies against the laws that ``target`` gives.

    Both laws are softmaxes over ``rows`` of the frozen head; ``target`` is post-norm. Only
    ``outputs`` receives a gradient. ``chunk`` is how many positions have logits at a time.
    """
    size = max(1, chunk // target.shape[0])
    hidden, weights = (_chunks(x, 2, size) for x in (outputs, weights))
    return _frozen_head_loss(hidden, _chunks(target, 1, size), rows, weights)


def hard_cross_entropy(
    outputs: Float[Array, "heads b t width"],
    labels: Int[Array, "b t"],
    rows: Float[Array, "vocab width"],
    weights: Float[Array, "heads b t"],
    chunk: int = 1024,
) -> Float[Array, " heads"]:
    """As :func:`soft_cross_entropy`, against ``labels`` (rows of the frozen head).

    Negative labels are tokens outside the draft vocabulary; they do not count.
    """
    weights = weights * (labels >= 0)[None].astype(weights.dtype)
    size = max(1, chunk // labels.shape[0])
    hidden, weights = (_chunks(x, 2, size) for x in (outputs, weights))
    return _frozen_head_loss(hidden, _chunks(labels, 1, size), rows, weights)


def _chunks(x: Array, axis: int, size: int) -> Array:
    """Axis ``axis`` (positions) cut into chunks on a new leading axis, the last padded with zeros.

    Chunks run along positions, so a batch that is sharded over devices stays where it is.
    """
    size = min(size, x.shape[axis])
    parts = -(-x.shape[axis] // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, parts * size - x.shape[axis])
    shape = (*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, pad).reshape(shape), axis, 0)


@jax.custom_vjp
def _frozen_head_loss(
    hidden: Float[Array, "chunks heads b n width"],
    teacher: Array,
    rows: Float[Array, "vocab width"],
    weights: Float[Array, "chunks heads b n"],
) -> Float[Array, " heads"]:
    return _loss_and_gradient(hidden, teacher, rows, weights, with_gradient=False)[0]


def _forward(hidden: Array, teacher: Array, rows: Array, weights: Array) -> tuple[Array, Array]:
    return _loss_and_gradient(hidden, teacher, rows, weights, with_gradient=True)


def _backward(gradient: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    scale = cotangent.reshape(1, -1, 1, 1, 1).astype(gradient.dtype)
    return gradient * scale, None, None, None


_frozen_head_loss.defvjp(_forward, _backward)


def _loss_and_gradient(
    hidden: Array, teacher: Array, rows: Array, weights: Array, with_gradient: bool
) -> tuple[Array, Any]:
    """Sums per head, and their gradients by ``hidden``; ``teacher`` is hidden states or labels."""

    def law(teacher: Array) -> Array:
        if jnp.issubdtype(teacher.dtype, jnp.integer):
            return jax.nn.one_hot(teacher, rows.shape[0], dtype=jnp.float32)
        return jax.nn.softmax(_logits(teacher, rows), axis=-1)

    def one(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Any]:
        hidden, teacher, weights = part
        p = law(teacher)[None]
        log_q = jax.nn.log_softmax(_logits(hidden, rows), axis=-1)
        total = total - jnp.sum(jnp.sum(p * log_q, axis=-1) * weights, axis=(1, 2))
        if not with_gradient:
            return total, None
        by_logits = ((jnp.exp(log_q) - p) * weights[..., None]).astype(rows.dtype)
        by_hidden = jnp.einsum("kbnv,vw->kbnw", by_logits, rows)
        return total, by_hidden.astype(hidden.dtype)

    zero = jnp.zeros((hidden.shape[1],), jnp.float32)
    return jax.lax.scan(one, zero, (hidden, teacher, weights))


def _logits(x: Float[Array, "*batch width"], rows: Float[Array, "vocab width"]) -> Array:
    return jnp.einsum("...w,vw->...v", x, rows, preferred_element_type=jnp.float32)


def clover_loss(
    cfg: CloverConfig,
    outputs: Float[Array, "heads b t width"],
    target: Float[Array, "b t width"],
    labels: Int[Array, "b t"],
    rows: Float[Array, "vocab width"],
    mask: Float[Array, "b t"],
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Float[Array, "heads parts"]]:
    """Clover's loss, and per head its regression and cross-entropy (zero, CE without distillation).

    Args:
        outputs: of :func:`models.clover.head_hidden`, not aligned.
        target: post-norm hidden states of the positions AFTER the inputs': row s is ``h_{s+1}``.
        labels: the tokens after those, as indices of ``rows``; used without distillation.
        rows: the frozen head, or the draft vocabulary's part of it.
        mask: which targets count.

    Both parts are sums over the targets that count, divided by their number plus one.
    """
    aligned, weights = align(outputs), normalized_mask(mask, cfg.num_heads, 1.0)
    if cfg.distill:
        v = smooth_l1(aligned, target, weights)
        p = soft_cross_entropy(aligned, target, rows, weights, chunk)
        each = cfg.v_weight * v + cfg.p_weight * p
    else:
        p = hard_cross_entropy(aligned, labels, rows, weights, chunk)
        v, each = jnp.zeros_like(p), p
    decay = cfg.decay ** jnp.arange(cfg.num_heads, dtype=jnp.float32)
    return jnp.sum(decay * each), jnp.stack([v, p], axis=1)


def medusa_loss(
    cfg: medusa.MedusaConfig,
    params: medusa.Params,
    outputs: Float[Array, "heads b t width"],
    labels: Int[Array, "b t"],
    rows: Float[Array, "vocab width"],
    mask: Float[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, " heads"]]:
    """Medusa-1's loss, and each head's mean cross-entropy over the tokens that count.

    Args:
        outputs: of :func:`models.medusa.head_hidden`, not aligned.
        labels, rows, mask: as for :func:`clover_loss`; ``rows`` is used by a shared head only.
    """
    aligned, weights = align(outputs), normalized_mask(mask, cfg.num_heads, 0.0)
    if params.matrices is None:
        parts = hard_cross_entropy(aligned, labels, rows, weights)
    else:
        weights = weights * (labels >= 0)[None].astype(weights.dtype)
        targets = jnp.maximum(labels, 0)
        parts = jnp.stack(
            [
                token_cross_entropy(aligned[i], params.matrices[i], targets, weights[i])
                for i in range(cfg.num_heads)
            ]
        )
    return jnp.sum(cfg.decay ** jnp.arange(cfg.num_heads, dtype=jnp.float32) * parts), parts


def eagle_loss(
    cfg: EagleConfig,
    predicted: Float[Array, "b t width"],
    target: Float[Array, "b t width"],
    rows: Float[Array, "vocab width"],
    mask: Float[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, " parts"]]:
    """EAGLE's loss, and its regression and soft cross-entropy, per target that counts."""
    weights = normalized_mask(mask, 1, 1e-5)
    v = smooth_l1(predicted[None], target, weights)[0]
    p = soft_cross_entropy(predicted[None], target, rows, weights)[0]
    return cfg.v_weight * v + cfg.p_weight * p, jnp.stack([v, p])
