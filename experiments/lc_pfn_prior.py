"""LC-PFN on curves of its prior: likelihood, coverage, point errors, and the posterior itself."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn.baselines import BASELINES, normal_log_density
from research.approximation.lc_pfn.posterior import (
    Posterior,
    importance_posterior,
    mcmc_posterior,
)
from research.approximation.lc_pfn.predict import predict, predict_logits
from research.approximation.lc_pfn.prior import sample_prior

COVERED = 0.9
TARGETS = (12, 20, 50, 100)
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
QUIET = 0.02
"""Contexts for importance sampling have at least this noise, ..."""
ENOUGH = 200
"""... and count only if at least so many draws fit them, in effect."""


def laws(
    model: LCPFN, curves: Float[np.ndarray, "n t"], cutoff: int
) -> Float[jax.Array, "n q buckets"]:
    """Logits at all epochs after the cut-off."""
    x = jnp.broadcast_to(jnp.arange(1, curves.shape[1] + 1, dtype=jnp.float32)[None], curves.shape)
    context = jnp.full(len(curves), cutoff, jnp.int32)
    return predict_logits(model, x, jnp.asarray(curves, jnp.float32), context)[:, cutoff:]


def measure_network(
    model: LCPFN, curves: Float[np.ndarray, "n t"], cutoffs: Sequence[int]
) -> dict[str, Any]:
    """Per cut-off: mean log-likelihood of later points, coverage, errors of the last value."""
    out: dict[str, Any] = {"log_likelihood": [], "coverage": [], "median_mse": [], "mean_mse": []}
    for cutoff in cutoffs:
        logits, later = laws(model, curves, cutoff), jnp.asarray(curves[:, cutoff:], jnp.float32)
        ends = bar.quantile(model.borders, logits, COVERED, exact_tails=True)
        inside = (later >= ends[..., 0]) & (later <= ends[..., 1])
        out["log_likelihood"].append(float(bar.log_prob(model.borders, logits, later).mean()))
        out["coverage"].append(float(inside.mean()))
        for name, point in (("median_mse", bar.median), ("mean_mse", bar.mean)):
            error = point(model.borders, logits[:, -1]) - later[:, -1]
            out[name].append(float(jnp.mean(jnp.square(error))))
    return out


def measure_baseline(
    name: str, train: np.ndarray, curves: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, Any]:
    """The same numbers of a normal law; its mean is its median."""
    out: dict[str, Any] = {"log_likelihood": [], "coverage": [], "median_mse": [], "mean_mse": []}
    half = statistics.NormalDist().inv_cdf((1 + COVERED) / 2)
    for cutoff in cutoffs:
        mean, std = BASELINES[name](train, curves, cutoff)
        later = curves[:, cutoff:]
        out["log_likelihood"].append(float(normal_log_density((mean, std), later).mean()))
        out["coverage"].append(float((np.abs(later - mean) <= half * std).mean()))
        error = float(np.square(mean[:, -1] - later[:, -1]).mean())
        out["median_mse"].append(error)
        out["mean_mse"].append(error)
    return out


def noisy_contexts(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of 1 to 10 points (NaN after) of curves with visible noise, and true values later.

    (count, 10) and (count, targets).
    """
    drawn = sample_prior(jax.random.key(seed), 4 * count)
    rows = np.flatnonzero(np.asarray(drawn.sigma) >= QUIET)[:count]
    values = np.asarray(drawn.noisy, np.float64)[rows]
    length = 1 + np.arange(len(rows)) % 10
    context = np.where(np.arange(10)[None] < length[:, None], values[:, :10], np.nan)
    return context, values[:, np.asarray(TARGETS) - 1]


def reference(seed: int, count: int, draws: int) -> tuple[np.ndarray, np.ndarray, Posterior]:
    """Contexts, true values and their posterior by importance sampling, where it is sharp."""
    context, truth = noisy_contexts(seed, count)
    key = jax.random.key(seed + 1)
    found = importance_posterior(key, context, TARGETS, LEVELS, truth, draws)
    kept = found.ess > ENOUGH
    if not kept.any() or found.log_density is None:
        raise ValueError(f"no context has {ENOUGH} effective draws: raise --importance_draws.")
    return context[kept], truth[kept], found.of(kept)


def gap(
    model: LCPFN, context: np.ndarray, truth: np.ndarray, posterior: Posterior
) -> dict[str, float]:
    """How far a network is from the posterior.

    ``median_gap``: mean absolute difference of medians. ``likelihood_gap``: what the posterior's
    mean log density of the true values is above the network's, in nats.
    """
    medians, densities = [], []
    for values, true in zip(context, truth, strict=True):
        seen = values[~np.isnan(values)]
        # Values may leave [0, 1] here, so that the checked entry would refuse them.
        x = np.concatenate([np.arange(1, len(seen) + 1), TARGETS, np.ones(10 - len(seen))])
        y = np.concatenate([seen, np.zeros(len(x) - len(seen))])
        rows = (jnp.asarray(a[None], jnp.float32) for a in (x, y))
        logits = predict_logits(model, *rows, jnp.array([len(seen)]))[0]
        logits = logits[len(seen) : len(seen) + len(TARGETS)]
        medians.append(bar.median(model.borders, logits))
        densities.append(bar.log_prob(model.borders, logits, jnp.asarray(true, jnp.float32)))
    apart = np.abs(np.asarray(medians) - posterior.quantiles[:, :, LEVELS.index(0.5)])
    assert posterior.log_density is not None
    return {
        "median_gap": float(apart.mean()),
        "likelihood_gap": float((posterior.log_density - np.asarray(densities)).mean()),
    }


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call that was made before."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def chains(
    model: LCPFN, context: np.ndarray, truth: np.ndarray, posterior: Posterior, steps: int
) -> dict[str, float]:
    """An ensemble of 50 walkers on the given contexts: its distance from the posterior, and time.

    ``seconds`` are per curve, compiled beforehand; ``network_seconds`` those of a prediction of the
    same targets from the same context, all checks and conversions included.
    """
    found = mcmc_posterior(jax.random.key(0), context, TARGETS, LEVELS, truth, steps=steps)
    assert found.log_density is not None and posterior.log_density is not None
    apart = np.abs(found.quantiles - posterior.quantiles)[:, :, LEVELS.index(0.5)]
    seen = np.clip(context[0][~np.isnan(context[0])], 0, 1)
    epochs = np.arange(1, len(seen) + 1)
    return {
        "median_gap": float(apart.mean()),
        "likelihood_gap": float((posterior.log_density - found.log_density).mean()),
        "seconds": seconds(
            lambda: mcmc_posterior(jax.random.key(1), context[:1], TARGETS, LEVELS, steps=steps), 3
        ),
        "network_seconds": seconds(lambda: predict(model, epochs, seen, TARGETS), 20),
    }


def sampler_rate(curves: int = 20_000) -> float:
    """Curves of the prior per minute."""
    key = jax.random.key(0)
    return 60 * curves / seconds(lambda: sample_prior(key, curves).noisy.block_until_ready(), 3)


def fans(
    model: LCPFN, curves: Float[np.ndarray, "n t"], cutoffs: Sequence[int]
) -> list[dict[str, Any]]:
    """Values, cut-offs and quantiles of the later epochs, for fan charts."""
    out = []
    for values in curves:
        ends = int((~np.isnan(values)).sum())
        for cutoff in (c for c in cutoffs if c < ends):
            logits = laws(model, values[None, :ends], cutoff)[0]
            quantiles = bar.icdf(model.borders, logits, jnp.array(LEVELS, jnp.float32))
            out.append(
                {
                    "values": np.round(values[:ends], 5).tolist(),
                    "cutoff": cutoff,
                    "quantiles": np.round(np.asarray(quantiles).T, 5).tolist(),
                }
            )
    return out


def collect(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of one method, a seed each, as lists per name: of numbers, or of numbers per cut-off.

    What some seed lacks is left out.
    """
    names = [name for name in runs[0] if all(name in r for r in runs)]
    return {
        name: [list(values) for values in zip(*(r[name] for r in runs), strict=True)]
        if isinstance(runs[0][name], list)
        else [r[name] for r in runs]
        for name in names
    }
