"""LC-PFN as a pruner of Optuna: it ends runs that will probably not beat the best so far."""

from typing import ClassVar

import numpy as np
import optuna

from models.lc_pfn_io import LCPFN, load
from research.approximation.lc_pfn.normalizer import Normalizer
from research.approximation.lc_pfn.stopping import check_rule, should_stop

SHIPPED = "lc-pfn-small"


class LCPFNPruner(optuna.pruners.BasePruner):
    """Stops a trial if no remaining evaluation beats the best value so far with some probability.

    Every report counts as one epoch, numbered from 1. Values within [0, 1] that are to be maximised
    go to the network as they are. Others are normalised by what the study has seen until then: the
    soft bounds of :class:`.normalizer.Normalizer` are the best value and the median first value,
    the hard ones infinite.

    Args:
        horizon: evaluations of a whole run, at most the model's ``seq_len``.
        minimize: whether less is better.
        model: a network, or the name or folder of one.
        confidence: stop if the probability of a better value is at most 1 minus this at every
            remaining evaluation (``rule`` any) or at the last (final).
        first: evaluations that every run gets.

    Raises:
        FileNotFoundError: no such network.
        ValueError: runs longer than the network's curves, an unknown rule, or a confidence outside
            (0, 1).
    """

    needs_horizon: ClassVar[bool] = True

    def __init__(
        self,
        horizon: int,
        minimize: bool,
        model: str | LCPFN = SHIPPED,
        confidence: float = 0.95,
        rule: str = "any",
        first: int = 2,
    ):
        check_rule(rule, confidence)
        self.model = load(model) if isinstance(model, str) else model
        if horizon > self.model.cfg.seq_len:
            raise ValueError(
                f"runs of {horizon} evaluations are longer than the {self.model.cfg.seq_len} "
                "epochs of LC-PFN: evaluate less often."
            )
        self.horizon, self.minimize = horizon, minimize
        self.confidence, self.rule, self.first = confidence, rule, first

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether to stop the trial after its last report."""
        values = _curve(trial)
        if not self.first <= len(values) < self.horizon or not np.isfinite(values).all():
            return False
        others = [_curve(t) for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        curves = [np.asarray(values), *(c[np.isfinite(c)] for c in others)]
        seen = np.concatenate(curves)
        best = float(seen.min() if self.minimize else seen.max())
        if not self.minimize and 0 <= seen.min() and seen.max() <= 1:
            normalizer = None
        else:
            normalizer = self._normalizer(best, float(np.median([c[0] for c in curves if c.size])))
            if normalizer is None:
                return False
        return should_stop(
            self.model, values, best, self.horizon, self.confidence, self.rule, normalizer
        )

    def _normalizer(self, best: float, first: float) -> Normalizer | None:
        """None while nothing has become better than the first value."""
        low, high = (best, first) if self.minimize else (first, best)
        if not low < high:
            return None
        return Normalizer(-np.inf, np.inf, low, high, self.minimize)


def _curve(trial: optuna.trial.FrozenTrial) -> np.ndarray:
    """The trial's values in the order of its reports."""
    return np.array([v for _, v in sorted(trial.intermediate_values.items())], np.float64)
