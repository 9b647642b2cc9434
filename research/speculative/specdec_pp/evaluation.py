"""How well an acceptance head predicts: its ranking, its calibration, its distance from the labels.

Labels are probabilities, so a position counts as accepted with weight y and as rejected with weight
1 - y. Everything is a sum over a fine histogram of predictions, so parts of a data set add up.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

BINS = 1000
_COARSE = 10


@struct.dataclass
class Scores:
    """Sums over positions, those of the histogram by predicted probability."""

    accepted: Any  # (bins,) labels y
    rejected: Any  # (bins,) 1 - y
    predicted_accepted: Any  # (bins,) y times the prediction
    predicted_rejected: Any  # (bins,) (1 - y) times the prediction
    divergence: Any  # () KL from label to prediction

    def __add__(self, other: "Scores") -> "Scores":
        return jax.tree.map(lambda a, b: a + b, self, other)


def score(logits: Float[Array, "*batch 2"], labels: Float[Array, "*batch"]) -> Scores:
    """The sums of one batch; labels below 0 do not count."""
    counts = (labels >= 0).reshape(-1)
    y = jnp.where(counts, labels.reshape(-1), 0.0)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(-1, 2)
    p = jnp.exp(log_p[:, 1])
    place = jnp.clip((p * BINS).astype(jnp.int32), 0, BINS - 1)
    accepted, rejected = jnp.where(counts, y, 0.0), jnp.where(counts, 1.0 - y, 0.0)

    def spread(values: Array) -> Array:
        return jnp.zeros((BINS,), jnp.float32).at[place].add(values)

    def plogp(x: Array) -> Array:
        return jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)

    kl = plogp(accepted) + plogp(rejected) - accepted * log_p[:, 1] - rejected * log_p[:, 0]
    return Scores(
        spread(accepted), spread(rejected), spread(accepted * p), spread(rejected * p), jnp.sum(kl)
    )


def summarise(scores: Scores, rejection_weight: float = 1.0) -> dict[str, float]:
    """``auc``, ``calibration_error``, ``kl``, mean label and mean prediction.

    ``auc`` is the chance that an accepted token has a higher prediction than a rejected one (half
    for those of one bin). The calibration error is the mean distance between predicted and observed
    acceptance over ten bins, rejections counting ``rejection_weight`` times: what a head trained
    with that weight is calibrated for. Without any accepted or any rejected token ``auc`` is 0.5.
    """
    a, r, pa, pr = (
        np.asarray(x, np.float64)
        for x in (
            scores.accepted, scores.rejected, scores.predicted_accepted, scores.predicted_rejected
        )
    )  # fmt: skip
    total = max(float(a.sum() + r.sum()), 1e-9)
    pairs = a.sum() * r.sum()
    below = np.cumsum(r) - r
    auc = float((a * (below + 0.5 * r)).sum() / pairs) if pairs > 0 else 0.5
    weight = a + rejection_weight * r
    gap = np.abs((a - pa - rejection_weight * pr).reshape(_COARSE, -1).sum(axis=1))
    return {
        "auc": auc,
        "calibration_error": float(gap.sum() / max(weight.sum(), 1e-9)),
        "kl": float(scores.divergence) / total,
        "label": float(a.sum()) / total,
        "prediction": float(pa.sum() + pr.sum()) / total,
    }
