"""Losses and other ranges mapped to accuracies in [0, 1], and back.

Source: the released code of arXiv 2310.20447. Between the soft bounds the map is nearly linear,
towards the hard bounds, which may be infinite, it bends as a sigmoid does.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logit


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """A map of [``lb``, ``ub``] onto [0, 1], rising, or falling if ``minimize``.

    ``soft_lb`` and ``soft_ub`` are the range that values are expected in. The sigmoid of
    ``2 (v - soft_lb) / (soft_ub - soft_lb) - 1`` is stretched so that the hard bounds go to 0 and
    1. Everything is float64.

    Raises:
        ValueError: bounds out of order, or soft bounds that are not finite.
    """

    lb: float
    ub: float
    soft_lb: float
    soft_ub: float
    minimize: bool = False

    def __post_init__(self):
        soft = math.isfinite(self.soft_lb) and math.isfinite(self.soft_ub)
        if not soft or not self.lb <= self.soft_lb < self.soft_ub <= self.ub:
            raise ValueError(
                f"bounds {self.lb}, {self.soft_lb}, {self.soft_ub}, {self.ub} are not in the order "
                "lb <= soft_lb < soft_ub <= ub with finite soft bounds: give them so."
            )

    def __call__(self, values: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
        """Normalised values; NaN stays.

        Raises:
            ValueError: a value beyond the hard bounds.
        """
        values = np.asarray(values, np.float64)
        if (values < self.lb).any() or (values > self.ub).any():
            raise ValueError(
                f"values from {np.nanmin(values):g} to {np.nanmax(values):g} go beyond the "
                f"normaliser's bounds {self.lb:g} and {self.ub:g}: widen them, or clip the values."
            )
        low, high = self._ends()
        unit = (self._sigmoid(values) - low) / (high - low)
        return np.asarray(1 - unit if self.minimize else unit)

    def inverse(self, units: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
        """Values of normalised ones; what lies outside [0, 1] gives the hard bounds."""
        unit = np.clip(np.asarray(units, np.float64), 0.0, 1.0)
        low, high = self._ends()
        bent = low + (high - low) * (1 - unit if self.minimize else unit)
        values = self.soft_lb + (logit(bent) + 1) / 2 * (self.soft_ub - self.soft_lb)
        return np.asarray(np.clip(values, self.lb, self.ub))

    def _sigmoid(self, values: np.ndarray) -> np.ndarray:
        linear = 2 * (values - self.soft_lb) / (self.soft_ub - self.soft_lb) - 1
        return np.asarray(expit(linear))

    def _ends(self) -> tuple[float, float]:
        """The sigmoid at the hard bounds."""
        low, high = self._sigmoid(np.array([self.lb, self.ub]))
        return float(low), float(high)
