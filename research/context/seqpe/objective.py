"""The two losses that shape SeqPE's vectors, and one training step's pass through the encoder.

Source: arXiv 2506.13277; scales and reductions are those of the released code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from models import seqpe
from research.context.seqpe.samplers import (
    Sampling,
    sample_contrastive,
    sample_shift,
    sample_transfer,
    unrank,
    window_positions,
)

MEASURES = ("kl", "mse")


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much the losses count beside the main task's, and how the second is measured.

    Attributes:
        contrastive, transfer: their weights; 0 trains nothing and still reports.
        beta: share of the transfer loss that moves the student, the rest moves the teacher.
        per_head: compare Gram matrices of each head, not of whole vectors.
        measure: ``kl`` both ways, or ``mse`` of the logarithms.
    """

    contrastive: float = 0.1
    transfer: float = 0.1
    beta: float = 1.0
    per_head: bool = True
    measure: str = "kl"

    def __post_init__(self):
        if self.measure not in MEASURES or not 0 <= self.beta <= 1:
            raise ValueError(
                f"measure is {self.measure!r} and beta {self.beta}: give {' or '.join(MEASURES)} "
                "and a share from 0 to 1."
            )


def contrastive_loss(
    pivots: Float[Array, "b width"],
    candidates: Float[Array, "b n width"],
    labels: Int[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy of dot products in nats, and how often the nearest scores highest."""
    scores = jnp.einsum("be,bne->bn", pivots.astype(jnp.float32), candidates.astype(jnp.float32))
    logs = jax.nn.log_softmax(scores)
    chosen = jnp.take_along_axis(logs, labels[:, None], 1)
    return -jnp.mean(chosen), jnp.mean((jnp.argmax(scores, 1) == labels).astype(jnp.float32))


def gram_logs(vectors: Float[Array, "b n width"], heads: int) -> Float[Array, "b heads n n"]:
    """Logarithms of the softmax of every row of each head's Gram matrix, which is not scaled."""
    b, n, _ = vectors.shape
    split = vectors.astype(jnp.float32).reshape(b, n, heads, -1)
    return jax.nn.log_softmax(jnp.einsum("bnhd,bmhd->bhnm", split, split), -1)


def transfer_loss(
    teacher: Float[Array, "b n width"],
    student: Float[Array, "b n width"],
    heads: int,
    beta: float = 1.0,
    measure: str = "kl",
) -> Float[Array, ""]:
    """How far two sets of vectors differ in the softmax of their Gram matrices.

    Both directions of the KL divergence, summed, over the number of all elements of all matrices
    (n times less than the mean over rows), or the mean squared difference of the logarithms. The
    value is the same for every ``beta``: that share of the gradient goes to the student, the rest
    to the teacher.
    """

    def between(a: Array, b: Array) -> Array:
        if measure == "mse":
            return jnp.mean(jnp.square(a - b))
        return jnp.mean((jnp.exp(a) - jnp.exp(b)) * (a - b))

    a, b = gram_logs(teacher, heads), gram_logs(student, heads)
    to_student = between(jax.lax.stop_gradient(a), b)
    if beta == 1:
        return to_student
    return beta * to_student + (1 - beta) * between(a, jax.lax.stop_gradient(b))


@struct.dataclass
class Pass:
    """One step's vectors of the main task, and the losses beside it."""

    window: Any  # (rows, t, width)
    contrastive: Any
    accuracy: Any  # share of pivots whose nearest candidate scores highest
    transfer: Any  # 0 where the window is shifted
    shifted: Any  # 0 or 1

    def penalty(self, weights: Weights) -> Array:
        """What is added to the main task's loss."""
        return weights.contrastive * self.contrastive + weights.transfer * self.transfer

    def metrics(self) -> dict[str, Array]:
        """For the log; the mean of ``transfer`` counts shifted steps as 0."""
        return {
            "contrastive": self.contrastive,
            "nearest": self.accuracy,
            "transfer": self.transfer,
            "shifted": self.shifted,
        }


def encoder_pass(
    params: seqpe.Params,
    cfg: seqpe.Config,
    sampling: Sampling,
    weights: Weights,
    window: tuple[int, ...],
    pivots: Int[Array, "b axes"],
    rows: int,
    key: Key[Array, ""],
) -> Pass:
    """Everything that a step asks of the encoder, in one call of it.

    Args:
        window: positions of the main task along each axis, (t,) or (rows, columns).
        rows: tables that a shifted step draws; other steps have one, repeated.
    """
    for_coin, for_shift, for_pairs, for_transfer, for_dropout = jax.random.split(key, 5)
    shifted = jax.random.bernoulli(for_coin, sampling.shift_rate)
    found = sample_contrastive(for_pairs, cfg, sampling, pivots)
    compared = [pivots[:, None], found.positions]

    def split(parts: list[Array]) -> list[Array]:
        """Vectors of (b, n, axes) positions, all encoded together."""
        flat = jnp.concatenate([part.reshape(-1, cfg.axes) for part in parts])
        vectors, ends = seqpe.encode(params, cfg, flat, for_dropout), []
        for part in parts:
            size = part.shape[0] * part.shape[1]
            ends.append((ends[-1] if ends else 0) + size)
        pieces = jnp.split(vectors, ends[:-1])
        return [
            piece.reshape(*part.shape[:2], -1) for piece, part in zip(pieces, parts, strict=True)
        ]

    def in_place() -> tuple[Array, Array, Array, Array]:
        corners, offsets = sample_transfer(for_transfer, cfg, sampling, window, pivots.shape[0])
        main = seqpe.grid_positions(window)[None]
        distilled = corners[:, None] + unrank(offsets, window)
        vectors, pivot, candidates, student = split([main, *compared, distilled])
        loss = transfer_loss(
            vectors[0][offsets],
            student,
            cfg.heads if weights.per_head else 1,
            weights.beta,
            weights.measure,
        )
        return jnp.broadcast_to(vectors, (rows, *vectors.shape[1:])), pivot, candidates, loss

    def away() -> tuple[Array, Array, Array, Array]:
        corners = sample_shift(for_shift, cfg, window, rows)
        vectors, pivot, candidates = split([window_positions(corners, window), *compared])
        return vectors, pivot, candidates, jnp.zeros((), jnp.float32)

    vectors, pivot, candidates, transfer = jax.lax.cond(shifted, away, in_place)
    contrastive, accuracy = contrastive_loss(pivot[:, 0], candidates, found.labels)
    return Pass(vectors, contrastive, accuracy, transfer, shifted.astype(jnp.float32))
