"""LC-PFN on recorded curves: likelihood of later points, and what early stopping saves."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.curve_files import CurveSet
from experiments.lc_pfn_prior import laws
from models.lc_pfn_io import LCPFN
from ops import bar_distribution as bar
from research.approximation.lc_pfn.baselines import BASELINES, normal_log_density
from research.approximation.lc_pfn.stopping import RULES, replay, thresholds

PATIENCE = (5, 10, 20)
KEPT = 1e-3
"""The best model counts as kept if the best value reached is this close to the best of all."""


def choose(sets: Sequence[CurveSet], tasks: int, runs: int, seed: int) -> list[CurveSet]:
    """At most so many sets, each of at most so many of its runs, drawn by the seed."""
    rng = np.random.default_rng(seed)
    some = sorted(rng.permutation(len(sets))[:tasks].tolist())
    out = []
    for i in some:
        rows = np.sort(rng.permutation(len(sets[i].values))[:runs])
        out.append(CurveSet(sets[i].name, sets[i].values[rows], sets[i].normalizer))
    return out


def likelihood(
    model: LCPFN, sets: Sequence[CurveSet], train: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, list[float | None]]:
    """Mean log-likelihood of later values per cut-off and predictor, over whole runs of all sets.

    Values are normalised ones; a cut-off that no run goes beyond has None. The baselines were
    fitted to the prior, as the network was.
    """
    out: dict[str, list[float | None]] = {"lc-pfn": []} | {name: [] for name in BASELINES}
    for cutoff in cutoffs:
        found: dict[str, list[np.ndarray]] = {name: [] for name in out}
        for one in sets:
            whole = one.curves[~np.isnan(one.curves).any(1)]
            if not len(whole) or whole.shape[1] <= cutoff:
                continue
            logits, later = laws(model, whole, cutoff), whole[:, cutoff:]
            y = jnp.asarray(later, jnp.float32)
            found["lc-pfn"].append(np.asarray(bar.log_prob(model.borders, logits, y)).ravel())
            for name, fit in BASELINES.items():
                fitted = fit(train[:, : whole.shape[1]], whole, cutoff)
                found[name].append(normal_log_density(fitted, later).ravel())
        for name, values in found.items():
            out[name].append(float(np.concatenate(values).mean()) if values else None)
    return out


def stopping(
    model: LCPFN, sets: Sequence[CurveSet], orders: int, confidence: float, seed: int
) -> dict[str, dict[str, float]]:
    """Every rule on every set in random orders of its runs, the same for all rules.

    ``speedup`` is the ratio of all epochs to those spent, over all sets and orders together;
    ``kept`` the share of orders that keep the best model, ``regret`` the mean loss of normalised
    value, ``sets_sped_up`` the share of sets with a speed-up of at least 1.5 and the best model
    kept in 90% of orders.
    """
    rng = np.random.default_rng(seed)
    results: dict[str, list[list[tuple[int, float]]]] = {}
    for one in sets:
        options: dict[str, dict[str, Any]] = {"no stopping": {}}
        options |= {f"patience {n}": {"patience": n} for n in PATIENCE}
        for rule in RULES:
            options[rule] = {"limits": thresholds(model, one.curves, confidence, rule)}
        shuffled = [rng.permutation(len(one.curves)) for _ in range(orders)]
        for name, option in options.items():
            runs = [replay(one.curves, order, **option) for order in shuffled]
            results.setdefault(name, []).append([(r.epochs, r.regret) for r in runs])
    return {name: _score(per_set, results["no stopping"]) for name, per_set in results.items()}


def _score(
    per_set: list[list[tuple[int, float]]], plain: list[list[tuple[int, float]]]
) -> dict[str, float]:
    spent = np.array([[epochs for epochs, _ in one] for one in per_set], float)
    whole = np.array([[epochs for epochs, _ in one] for one in plain], float)
    regret = np.array([[regret for _, regret in one] for one in per_set])
    kept = regret <= KEPT
    faster = (whole.sum(1) / spent.sum(1) >= 1.5) & (kept.mean(1) >= 0.9)
    return {
        "speedup": float(whole.sum() / spent.sum()),
        "kept": float(kept.mean()),
        "regret": float(regret.mean()),
        "sets_sped_up": float(faster.mean()),
    }
