"""What the protocol of MetricGrids says must hold, and what it says does not show."""

from collections.abc import Callable

from experiments.statements import Statement, Test, value

SIZES = (8, 9, 10)


def ahead(a: str, b: str, margin: float, name: str = "quality") -> Test:
    """Whether method ``a`` is more than ``margin`` ahead of ``b``."""
    return lambda rows, seed: value(rows[a], name, seed) - value(rows[b], name, seed) > margin


def at_every_size(a: str, b: str, margin: float, name: str = "quality") -> Test:
    """The same at every table size."""
    tests: list[Callable] = [ahead(f"{a}-{n}", f"{b}-{n}", margin, name) for n in SIZES]
    return lambda rows, seed: all(test(rows, seed) for test in tests)


def at_sizes(*methods: str) -> tuple[str, ...]:
    """The methods' names at all sizes."""
    return tuple(f"{method}-{n}" for method in methods for n in SIZES)


STATEMENTS: dict[str, tuple[Statement, ...]] = {
    "table": (
        Statement(
            "modulators are worth more than 2 dB at every table size",
            at_sizes("full", "no-modulators"),
            at_every_size("full", "no-modulators", 2.0),
        ),
        Statement(
            "at the same table and learning rate (1e-3) MetricGrids is more than 3 dB ahead of "
            "instant-ngp",
            at_sizes("full", "ngp"),
            at_every_size("full", "ngp", 3.0, "common_rate"),
        ),
        Statement(
            "at the same table, each with its own best rate, MetricGrids is ahead of instant-ngp",
            at_sizes("full", "ngp"),
            at_every_size("full", "ngp", 0.0),
        ),
        Statement(
            "not expected at this scale: three metric spaces are more than 0.5 dB ahead of one "
            "grid under the same decoder",
            at_sizes("full", "one-grid"),
            at_every_size("full", "one-grid", 0.5),
        ),
    ),
    "variants": (
        Statement(
            "one table for all spaces is at least as good as separate, shorter ones",
            ("full", "separate"),
            ahead("full", "separate", 0.0),
        ),
        Statement(
            "MetricGrids is ahead of a SIREN of as many parameters",
            ("full", "siren"),
            ahead("full", "siren", 0.0),
        ),
    ),
    "total": (
        Statement(
            "at equal total parameters, each with its own best rate, MetricGrids is not behind "
            "instant-ngp",
            ("full", "ngp"),
            ahead("full", "ngp", 0.0),
        ),
        Statement(
            "not expected at this scale: three metric spaces are more than 0.5 dB ahead of one "
            "grid under the same decoder",
            ("full", "one-grid"),
            ahead("full", "one-grid", 0.5),
        ),
    ),
    "photo": (
        Statement(
            "on whole images, at the same table, each with its own best rate, MetricGrids is "
            "ahead of instant-ngp",
            ("full", "ngp"),
            ahead("full", "ngp", 0.0),
        ),
        Statement(
            "three metric spaces are more than 0.5 dB ahead of one grid under the same decoder",
            ("full", "one-grid"),
            ahead("full", "one-grid", 0.5),
        ),
    ),
    "sdf": (
        Statement(
            "at the same table MetricGrids overlaps at least as well as instant-ngp",
            ("full", "ngp"),
            ahead("full", "ngp", -1e-9),
        ),
        Statement(
            "modulators help",
            ("full", "no-modulators"),
            ahead("full", "no-modulators", 0.0),
        ),
        Statement(
            "three metric spaces are ahead of one grid under the same decoder",
            ("full", "one-grid"),
            ahead("full", "one-grid", 0.0),
        ),
    ),
}
"""By part of the experiment."""
