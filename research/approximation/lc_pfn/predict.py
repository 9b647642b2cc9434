"""What comes after the first points of a learning curve, from one forward pass."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from models.lc_pfn import forward
from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn.normalizer import Normalizer

Numbers = Sequence[float | int] | Real[np.ndarray, "..."]
"""A list of numbers in whatever form users have it."""

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Laws of a curve's values at some epochs, in the units of the curve.

    Attributes:
        epochs: (q,) where.
        levels: of the quantiles, rising.
        quantiles: (levels, q); at level p lies the value that is undercut with probability p, for
            losses too.
        median: (q,).
        mean: (q,) with a normaliser that of the normalised value, mapped back, which is not the
            mean of the values. Wide tails pull at it: as a point estimate the median is better.
        logits: (q, buckets) of the normalised values' binned law.
        borders: (buckets + 1,).
        normalizer: None if values are their own normalised ones.
    """

    epochs: Float[np.ndarray, " q"]
    levels: tuple[float, ...]
    quantiles: Float[np.ndarray, "levels q"]
    median: Float[np.ndarray, " q"]
    mean: Float[np.ndarray, " q"]
    logits: Float[np.ndarray, "q buckets"]
    borders: Float[np.ndarray, " borders"]
    normalizer: Normalizer | None

    def probability_better(self, best: float | int) -> Float[np.ndarray, " q"]:
        """Probability at each epoch of a value above ``best``, of losses below it.

        The half-normal tails count, so that a best value beyond all bins is beaten with some
        probability.
        """
        unit = best if self.normalizer is None else self.normalizer(float(best))
        y = jnp.full(self.epochs.shape, unit, jnp.float32)
        below = bar.cdf(jnp.asarray(self.borders), jnp.asarray(self.logits), y, exact_tails=True)
        return np.asarray(1 - below)


def predict(
    model: LCPFN,
    epochs: Numbers,
    values: Numbers,
    query: Numbers,
    levels: Sequence[float] = LEVELS,
    normalizer: Normalizer | None = None,
    exact_tails: bool = False,
) -> Prediction:
    """Laws of the values at ``query`` epochs, given the values at ``epochs``.

    Args:
        epochs: rising, from 1 to the model's ``seq_len``; some may be left out.
        values: one for each epoch: accuracies in [0, 1], or anything that ``normalizer`` takes.
        query: epochs of any order, from 1 to the model's ``seq_len``, one at least.
        levels: of the quantiles, between 0 and 1.
        normalizer: for losses and other ranges.
        exact_tails: quantiles in the outermost bins from their half-normals; by default these bins
            are uniform there, as in the released code.

    All curves share one compiled program, unless they ask for so many epochs that context and
    query together exceed ``seq_len``.

    Raises:
        ValueError: no values, or not one per epoch; NaN; epochs that do not rise or go beyond the
            model's horizon; values out of bounds; levels outside (0, 1).
    """
    x, y, at = (np.asarray(numbers, np.float64) for numbers in (epochs, values, query))
    check_curve(x, y, model.cfg.seq_len)
    _check_epochs(at, "query epochs", model.cfg.seq_len)
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels {tuple(levels)} must lie between 0 and 1, without the ends.")
    units = normalized(y, normalizer)
    rising = tuple(sorted(float(level) for level in levels))
    falls = normalizer is not None and normalizer.minimize
    asked = [1 - level if falls else level for level in (*rising, 0.5)]
    # Padding consists of queries, which no other token sees.
    tokens = np.concatenate([x, at, np.ones(-(len(x) + len(at)) % model.cfg.seq_len)])
    seen = np.concatenate([units, np.zeros(len(tokens) - len(units))])
    arrays = _summarise(
        model,
        jnp.asarray(tokens[None], jnp.float32),
        jnp.asarray(seen[None], jnp.float32),
        jnp.asarray([len(units)], jnp.int32),
        jnp.asarray(asked, jnp.float32),
        exact_tails=exact_tails,
    )
    rows = slice(len(x), len(x) + len(at))
    logits, quantiles, mean = (np.asarray(array)[rows] for array in arrays)
    if normalizer is not None:
        quantiles, mean = normalizer.inverse(quantiles), normalizer.inverse(mean)
    return Prediction(
        epochs=at,
        levels=rising,
        quantiles=quantiles[:, :-1].T,
        median=quantiles[:, -1],
        mean=mean,
        logits=logits,
        borders=np.asarray(model.borders),
        normalizer=normalizer,
    )


def check_curve(
    epochs: Float[np.ndarray, "..."], values: Float[np.ndarray, "..."], horizon: int
) -> None:
    """Raise ValueError unless ``epochs`` rise from at least 1 to at most ``horizon``, one for each
    of the ``values``, none of which is NaN."""
    _check_epochs(epochs, "epochs", horizon)
    if (np.diff(epochs) <= 0).any():
        raise ValueError("epochs must rise: sort the curve, and give one value per epoch.")
    if values.shape != epochs.shape:
        raise ValueError(
            f"{epochs.size} epochs do not go with {values.size} values: give one value per epoch."
        )
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite: leave its epoch out, or end the curve there.")


def normalized(
    values: Float[np.ndarray, "..."], normalizer: Normalizer | None
) -> Float[np.ndarray, "..."]:
    """Values as the network takes them.

    Raises:
        ValueError: values outside [0, 1] without a normaliser, or outside its bounds.
    """
    if normalizer is not None:
        return normalizer(values)
    if (values < 0).any() or (values > 1).any():
        raise ValueError(
            f"values from {np.nanmin(values):g} to {np.nanmax(values):g} are not accuracies in "
            "[0, 1]: give a Normalizer with the bounds of your metric."
        )
    return values


@jax.jit
def predict_logits(
    model: LCPFN,
    x: Float[Array, "b t"],
    y: Float[Array, "b t"],
    num_context: Int[Array, " b"],
) -> Float[Array, "b t buckets"]:
    """Logits for many curves at once, unchecked; see :func:`models.lc_pfn.forward`."""
    return forward(model.params, model.cfg, x, y, num_context)


def _check_epochs(epochs: Float[np.ndarray, "..."], name: str, horizon: int) -> None:
    if epochs.ndim != 1 or not epochs.size:
        raise ValueError(f"{name} must be a list of at least one number.")
    if not (epochs >= 1).all():
        raise ValueError(f"{name} must be numbers from 1 on: the first epoch is 1.")
    if epochs.max() > horizon:
        raise ValueError(
            f"{name} reach {epochs.max():g} but the model was trained on curves of {horizon}: "
            "give every n-th point, numbered from 1, or use a model with a larger seq_len."
        )


@functools.partial(jax.jit, static_argnames="exact_tails")
def _summarise(
    model: LCPFN,
    x: Float[Array, "1 t"],
    y: Float[Array, "1 t"],
    num_context: Int[Array, "1"],
    levels: Float[Array, " levels"],
    exact_tails: bool,
) -> tuple[Float[Array, "t buckets"], Float[Array, "t levels"], Float[Array, " t"]]:
    """Logits, quantiles and mean at every token."""
    logits = forward(model.params, model.cfg, x, y, num_context)[0]
    quantiles = bar.icdf(model.borders, logits, levels, exact_tails)
    return logits, quantiles, bar.mean(model.borders, logits)
