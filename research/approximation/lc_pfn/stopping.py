"""Stopping hopeless runs of a model selection early, and replays that say what it saves.

Runs are made one after the other. After each epoch a run is stopped if its remaining epochs are
unlikely to beat the best value that any run has reached so far, this one included.

Source: arXiv 2310.20447 after Domhan et al. (2015), who look at the horizon alone (``final``); the
rule over all remaining epochs (``any``) and the threshold are from memory of the paper. Each
epoch's own law is asked: the probability that some epoch is better may be larger.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn.normalizer import Normalizer
from research.approximation.lc_pfn.predict import Numbers, normalized, predict, predict_logits

RULES = ("any", "final")


def should_stop(
    model: LCPFN,
    values: Numbers,
    best: float | int,
    horizon: int,
    confidence: float = 0.95,
    rule: str = "any",
    normalizer: Normalizer | None = None,
) -> bool:
    """Whether a run with these values at epochs 1 .. s will probably not beat ``best``.

    Args:
        values: so far, fewer than ``horizon``.
        best: the best value so far, the largest, or of losses the smallest.
        horizon: the last epoch of a whole run.
        confidence: stop if the probability of a better value is at most 1 minus this, ...
        rule: ... at every remaining epoch (``any``) or at the last (``final``).
        normalizer: see :func:`.predict.predict`.

    Raises:
        ValueError: an unknown rule, a confidence outside (0, 1), a run that has reached the
            horizon, or a curve that cannot be predicted.
    """
    check_rule(rule, confidence)
    if len(values) >= horizon:
        raise ValueError(f"{len(values)} values are a whole run of {horizon}: nothing is left.")
    first = horizon if rule == "final" else len(values) + 1
    later = np.arange(first, horizon + 1)
    prediction = predict(model, np.arange(1, len(values) + 1), values, later, normalizer=normalizer)
    return bool((prediction.probability_better(best) <= 1 - confidence).all())


def thresholds(
    model: LCPFN, curves: Float[np.ndarray, "runs t"], confidence: float = 0.95, rule: str = "any"
) -> Float[np.ndarray, "runs t"]:
    """For every run and number of epochs, the best value from which on it would be stopped.

    A better value than ``best`` has at most probability ``1 - confidence`` exactly if ``best`` is
    not below the value's quantile at ``confidence``, so that a replay needs no network. After the
    last epoch, and after a run that is NaN from some epoch on has ended, it is -inf.

    Args:
        curves: normalised, larger is better, at epochs 1 .. t.

    Raises:
        ValueError: an unknown rule, a confidence outside (0, 1), values outside [0, 1], or runs
            longer than the model's curves.
    """
    check_rule(rule, confidence)
    count, length = curves.shape
    if length > model.cfg.seq_len:
        raise ValueError(
            f"runs of {length} epochs are longer than the model's {model.cfg.seq_len}: give every "
            "n-th evaluation."
        )
    normalized(curves, None)
    x = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.float32)[None], (length - 1, length))
    context = jnp.arange(1, length, dtype=jnp.int32)
    level = jnp.array([confidence], jnp.float32)
    out = np.full((count, length), -np.inf)
    later = np.arange(length)[None] >= np.asarray(context)[:, None]
    if rule == "final":
        later &= np.arange(length)[None] == length - 1
    for run, values in enumerate(curves):
        y = jnp.broadcast_to(jnp.asarray(values, jnp.float32)[None], x.shape)
        logits = predict_logits(model, x, y, context)
        upper = bar.icdf(model.borders, logits, level, exact_tails=True)[..., 0]
        out[run, :-1] = np.where(later, upper, -np.inf).max(1)
    ended = np.isnan(curves)
    return np.where(ended, -np.inf, out)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a rule did to a sequence of runs.

    Attributes:
        epochs: spent.
        regret: what the best value reached falls short of the best value of all whole runs.
        stopped_at: (runs,) epochs of each run, in the order of the curves.
    """

    epochs: int
    regret: float
    stopped_at: Int[np.ndarray, " runs"]


def replay(
    curves: Float[np.ndarray, "runs t"],
    order: Sequence[int] | Int[np.ndarray, " runs"],
    limits: Float[np.ndarray, "runs t"] | None = None,
    patience: int | None = None,
) -> Replay:
    """Make recorded runs again in the given order under a stopping rule.

    Args:
        curves: larger is better; a run that diverged is NaN from there on, and ends after its
            first NaN whatever the rule.
        order: every run once.
        limits: of :func:`thresholds`; a run ends once the best value so far reaches its limit.
        patience: a run ends after so many epochs without a new best value of its own.

    With neither, nothing is stopped.

    Raises:
        ValueError: an order that is none, or a patience below 1.
    """
    count, length = curves.shape
    if sorted(order) != list(range(count)):
        raise ValueError(f"the order must name each of {count} runs once.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is {patience}: give at least 1 epoch.")
    best = -np.inf
    stopped_at = np.zeros(count, np.int64)
    for run in order:
        own, since = -np.inf, 0
        for epoch in range(length):
            stopped_at[run] = epoch + 1
            value = curves[run, epoch]
            if np.isnan(value):
                break
            own, since = (value, 0) if value > own else (own, since + 1)
            best = max(best, float(value))
            if limits is not None and best >= limits[run, epoch]:
                break
            if patience is not None and since >= patience:
                break
    return Replay(int(stopped_at.sum()), float(np.nanmax(curves)) - best, stopped_at)


def check_rule(rule: str, confidence: float) -> None:
    """Raise ValueError unless the rule is known and the confidence a probability within (0, 1)."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: choose {' or '.join(RULES)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a probability between 0 and 1.")
