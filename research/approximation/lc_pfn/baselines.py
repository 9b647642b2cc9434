"""Simple predictors of learning curves that were fitted to curves of the same prior.

Each gives a normal law of every later value, or of all of them; means and standard deviations are
(curves, later epochs).
"""

import numpy as np
from jaxtyping import Float

Train = Float[np.ndarray, "m t"]
Test = Float[np.ndarray, "n t"]
Laws = tuple[Float[np.ndarray, "n q"], Float[np.ndarray, "n q"]]

LOG_2PI = float(np.log(2 * np.pi))


def last_value(train: Train, test: Test, cutoff: int) -> Laws:
    """The last value, plus the mean change from there; one standard deviation per cut-off."""
    change = train[:, cutoff:] - train[:, cutoff - 1 : cutoff]
    mean = np.broadcast_to(test[:, cutoff - 1 : cutoff] + change.mean(), test[:, cutoff:].shape)
    return mean, np.full(mean.shape, change.std())


def prior_marginal(train: Train, test: Test, cutoff: int) -> Laws:
    """Mean and standard deviation of the prior at each epoch: the context counts for nothing."""
    shape = test[:, cutoff:].shape
    mean = np.broadcast_to(train[:, cutoff:].mean(0), shape)
    return mean, np.broadcast_to(train[:, cutoff:].std(0), shape)


def joint_normal(train: Train, test: Test, cutoff: int) -> Laws:
    """The conditional law if all values of a curve were jointly normal: the best linear guess."""
    centre, covariance = train.mean(0), np.cov(train, rowvar=False)
    seen = covariance[:cutoff, :cutoff] + 1e-9 * np.eye(cutoff)
    gain = np.linalg.solve(seen, covariance[:cutoff, cutoff:])
    mean = centre[cutoff:] + (test[:, :cutoff] - centre[:cutoff]) @ gain
    left = np.diag(covariance)[cutoff:] - (covariance[cutoff:, :cutoff] * gain.T).sum(1)
    return mean, np.broadcast_to(np.sqrt(left), mean.shape)


BASELINES = {"last": last_value, "prior": prior_marginal, "joint": joint_normal}
"""The predictors by name."""


def normal_log_density(laws: Laws, values: Float[np.ndarray, "n q"]) -> Float[np.ndarray, "n q"]:
    """Log density of the values, in nats."""
    mean, std = laws
    return -0.5 * (((values - mean) / std) ** 2 + LOG_2PI) - np.log(std)
