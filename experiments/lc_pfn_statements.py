"""What LC-PFN's protocol says must hold, and a few things that simple rivals might do better."""

from collections.abc import Callable

import numpy as np

from experiments.statements import Row, Statement, value

SHIPPED = "shipped"
STAGE = "lc-pfn-"


def stage_name(step: int) -> str:
    """The method's name of the small network after so many updates."""
    return f"{STAGE}{step}"


def _sizes(rows: dict[str, Row]) -> list[str]:
    """The trained stages, in the order of their updates."""
    names = [name for name in rows if name.startswith(STAGE)]
    return sorted(names, key=lambda name: int(name.removeprefix(STAGE)))


def _each(row: Row, name: str, seed: int) -> np.ndarray:
    """A list of samples, per cut-off, at one seed or in the mean."""
    return np.array([value({name: one}, name, seed) for one in row[name]])


def _last(rows: dict[str, Row]) -> Row:
    """The network that the statements are about: the shipped one, else the last stage."""
    return rows[SHIPPED] if SHIPPED in rows else rows[_sizes(rows)[-1]]


def _rising(name: str, sign: int = 1) -> Callable[[dict[str, Row], int], bool]:
    """Whether the mean over cut-offs of a number rises (falls for sign -1) from stage to stage."""

    def test(rows: dict[str, Row], seed: int) -> bool:
        stages = [rows[n] for n in _sizes(rows)] + ([rows[SHIPPED]] if SHIPPED in rows else [])
        nested = isinstance(stages[0][name], list)
        means = [
            float(np.mean(_each(r, name, seed))) if nested else value(r, name, seed) for r in stages
        ]
        return bool((sign * np.diff(means) > 0).all())

    return test


def _beats(baseline: str) -> Callable[[dict[str, Row], int], bool]:
    def test(rows: dict[str, Row], seed: int) -> bool:
        mine, other = (_each(r, "log_likelihood", seed) for r in (_last(rows), rows[baseline]))
        return bool((mine > other).all())

    return test


def _covers(rows: dict[str, Row], seed: int) -> bool:
    return 0.87 <= float(_each(_last(rows), "coverage", seed).mean()) <= 0.95


def _saves(rows: dict[str, Row], seed: int) -> bool:
    row = rows["stop any"]
    return value(row, "speedup", seed) >= 1.5 and value(row, "kept", seed) >= 0.9


def _beats_patience(rows: dict[str, Row], seed: int) -> bool:
    """No patience that is at least as fast keeps the best model as often."""
    mine = rows["stop any"]
    return not any(
        value(row, "speedup", seed) >= value(mine, "speedup", seed)
        and value(row, "kept", seed) >= value(mine, "kept", seed)
        for name, row in rows.items()
        if name.startswith("stop patience")
    )


def _smaller_error(other: str, name: str) -> Callable[[dict[str, Row], int], bool]:
    def test(rows: dict[str, Row], seed: int) -> bool:
        mine = _each(_last(rows), "median_mse", seed)
        theirs = _each(_last(rows) if other == "self" else rows[other], name, seed)
        return bool((mine < theirs).all())

    return test


STATEMENTS = (
    Statement("the log-likelihood rises with training", (), _rising("log_likelihood")),
    Statement(
        "the log-likelihood rises with the number of points seen",
        (),
        lambda rows, seed: bool((np.diff(_each(_last(rows), "log_likelihood", seed)) > 0).all()),
    ),
    Statement(
        "LC-PFN is likelier than the last value with a normal law, at every cut-off",
        ("last",),
        _beats("last"),
    ),
    Statement("... than the prior's law of each epoch", ("prior",), _beats("prior")),
    Statement("... than the best linear prediction", ("joint",), _beats("joint")),
    Statement(
        "the gap to the posterior's medians shrinks with training", (), _rising("median_gap", -1)
    ),
    Statement(
        "the gap to the posterior's log density shrinks with training",
        (),
        _rising("likelihood_gap", -1),
    ),
    Statement("90% intervals cover 87 to 95% of later points, over all cut-offs", (), _covers),
    Statement(
        "the median's error at the last epoch is below the mean's, at every cut-off",
        (),
        _smaller_error("self", "mean_mse"),
    ),
    Statement(
        "... and below that of the last value", ("last",), _smaller_error("last", "median_mse")
    ),
    Statement(
        "a prediction takes less than a thousandth of the time of 50 walkers",
        ("mcmc",),
        lambda rows, seed: value(rows["mcmc"], "speed_ratio", seed) > 1000,
    ),
    Statement(
        "LC-PFN is nearer to the posterior than 50 walkers, by log density",
        ("mcmc",),
        lambda rows, seed: (
            value(_last(rows), "likelihood_gap", seed) < value(rows["mcmc"], "likelihood_gap", seed)
        ),
    ),
    Statement(
        "on recorded curves LC-PFN is likelier than the last value, at every cut-off",
        ("recorded lc-pfn", "recorded last"),
        lambda rows, seed: all(
            value(rows["recorded lc-pfn"], name, seed) > value(rows["recorded last"], name, seed)
            for name in rows["recorded lc-pfn"]
            if name != "method"
        ),
    ),
    Statement(
        "early stopping spends 1.5 times fewer epochs and keeps the best model in 90% of orders",
        ("stop any",),
        _saves,
    ),
    Statement(
        "no patience is as fast and keeps the best model as often", ("stop any",), _beats_patience
    ),
)
