"""What the documents show of learning-curve extrapolation."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.lc_pfn_statements import SHIPPED, STAGE
from experiments.report import Rendered, Statements, Table, number

PAGE = "research/approximation/lc_pfn/README.md"
RESULT = "lc_pfn"

METHODS = {
    SHIPPED: "**LC-PFN, the shipped network**",
    "last": "last value, normal law per cut-off",
    "prior": "the prior's law of each epoch",
    "joint": "best linear prediction (jointly normal)",
    "mcmc": "50 walkers, 500 steps",
}


def label(method: str) -> str:
    """A method's name in tables and legends."""
    if method.startswith(STAGE):
        return f"LC-PFN, 64 channels, {int(method.removeprefix(STAGE)):,} updates"
    return METHODS.get(method, method)


def has_likelihood(row: dict[str, Any]) -> bool:
    """Whether the row is of a predictor on held-out curves of the prior."""
    return "log_likelihood" in row


def likelihood_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Mean log-likelihood per cut-off, and coverage."""
    coverage = sum(one["mean"] for one in row["coverage"]) / len(row["coverage"])
    values = (number(one) for one in row["log_likelihood"])
    return (label(row["method"]), *values, f"{100 * coverage:.0f}%")


def error_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Mean square error of the last value per cut-off: of the median, and of the mean."""
    pairs = zip(row["median_mse"], row["mean_mse"], strict=True)
    return (label(row["method"]), *(f"{a['mean']:.4f} ({b['mean']:.4f})" for a, b in pairs))


def has_gap(row: dict[str, Any]) -> bool:
    """Whether the row was compared with the posterior."""
    return "likelihood_gap" in row


def gap_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Distance from the posterior; the ensemble's time."""
    time = f"{row['seconds']['mean']:.2f} s a curve" if "seconds" in row else ""
    if time:
        time += f", {row['speed_ratio']['mean']:,.0f} times a prediction's"
    return (
        label(row["method"]),
        number(row["median_gap"], 3),
        number(row["likelihood_gap"], 3),
        time,
    )


def is_sampler(row: dict[str, Any]) -> bool:
    """Whether the row is the rate of the prior's sampler."""
    return "curves_per_minute" in row


def sampler_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Curves of the prior that the compiled sampler draws."""
    return (f"{row['curves_per_minute']['mean'] / 1e6:.2f} million",)


def is_recorded(row: dict[str, Any]) -> bool:
    """Whether the row is a predictor on recorded curves."""
    return row["method"].startswith("recorded ")


def recorded_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Mean log-likelihood of normalised values per cut-off."""
    name = row["method"].removeprefix("recorded ")
    cells = (row.get(f"log_likelihood@{c}") for c in CUTOFFS)
    shown = ("" if cell is None else number(cell) for cell in cells)
    return ("**LC-PFN**" if name == "lc-pfn" else label(name), *shown)


def is_rule(row: dict[str, Any]) -> bool:
    """Whether the row is a stopping rule."""
    return row["method"].startswith("stop ")


def rule_row(row: dict[str, Any]) -> tuple[str, ...]:
    """What a rule saves and loses."""
    name = row["method"].removeprefix("stop ")
    names = {"any": "**LC-PFN, all later epochs**", "final": "LC-PFN, the last epoch"}
    return (
        str(names.get(name, name)),
        number(row["speedup"]) + "x",
        f"{100 * row['kept']['mean']:.0f}%",
        number(row["regret"], 4),
        f"{100 * row['sets_sped_up']['mean']:.0f}%",
    )


CUTOFFS = (5, 10, 20, 40, 80)
AFTER = tuple(f"after {cutoff}" for cutoff in CUTOFFS)
LIKELIHOOD_HEADER = ("predictor", *AFTER, "90% intervals cover")
ERROR_HEADER = ("median (mean) of", *AFTER)
GAP_HEADER = ("method", "medians apart", "nats below the posterior", "time")
RECORDED_HEADER = ("predictor", *AFTER)
RULE_HEADER = ("rule", "fewer epochs", "best model kept", "regret", "tasks 1.5x faster, best kept")


def likelihood_figure(result: dict[str, Any]) -> Canvas:
    """Mean log-likelihood of later points against the number of points seen."""
    figure, axis = plt.subplots(figsize=(8.4, 3.6))
    for row in filter(has_likelihood, result["rows"]):
        ours = row["method"] == SHIPPED or row["method"].startswith(STAGE)
        axis.errorbar(
            result["config"]["cutoffs"],
            [one["mean"] for one in row["log_likelihood"]],
            [one["spread"] for one in row["log_likelihood"]],
            marker="o",
            ms=3,
            lw=1.6 if ours else 0.9,
            ls="-" if ours else "--",
            label=label(row["method"]).replace("**", ""),
        )
    axis.set_xscale("log")
    axis.set_xticks(result["config"]["cutoffs"], map(str, result["config"]["cutoffs"]))
    axis.minorticks_off()
    axis.set_xlabel("epochs seen, of 100")
    axis.set_ylabel("mean log-likelihood of later points (nats)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def fan_figure(result: dict[str, Any]) -> Canvas:
    """Predicted quantiles over examples: curves of the prior above, recorded ones below."""
    fans = next(row for row in result["rows"] if row["method"] == "fans")
    lines = [fans[name] for name in ("prior", "recorded") if fans[name]]
    width = max(map(len, lines))
    figure, axes = plt.subplots(
        len(lines), width, figsize=(2.2 * width, 2.1 * len(lines)), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, line in enumerate(lines):
        for axis, fan in zip(axes[row], line, strict=False):
            axis.set_axis_on()
            _draw_fan(axis, fan)
        axes[row, 0].set_ylabel(("curves of the prior", "recorded")[row])
    figure.supxlabel("epoch (dots: seen; grey: what came; bands: 50% and 90%)", fontsize=9)
    figure.tight_layout()
    return figure


def _draw_fan(axis: Any, fan: dict[str, Any]) -> None:
    values, cutoff, quantiles = fan["values"], fan["cutoff"], fan["quantiles"]
    later = range(cutoff + 1, len(values) + 1)
    axis.fill_between(later, quantiles[0], quantiles[4], color="#1a73e8", alpha=0.15, lw=0)
    axis.fill_between(later, quantiles[1], quantiles[3], color="#1a73e8", alpha=0.3, lw=0)
    axis.plot(later, quantiles[2], color="#1a73e8", lw=1.2)
    axis.plot(range(1, len(values) + 1), values, color="#9aa0a6", lw=0.7)
    axis.plot(range(1, cutoff + 1), values[:cutoff], "k.", ms=2)
    axis.set_title(f"after {cutoff}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


TABLES: tuple[Rendered, ...] = (
    Table("likelihood", PAGE, RESULT, LIKELIHOOD_HEADER, likelihood_row, has_likelihood),
    Table("errors", PAGE, RESULT, ERROR_HEADER, error_row, has_likelihood),
    Table("posterior", PAGE, RESULT, GAP_HEADER, gap_row, has_gap),
    Table("sampler", PAGE, RESULT, ("accepted curves per minute",), sampler_row, is_sampler),
    Table("recorded", PAGE, RESULT, RECORDED_HEADER, recorded_row, is_recorded),
    Table("stopping", PAGE, RESULT, RULE_HEADER, rule_row, is_rule),
    Statements("statements", PAGE, RESULT),
)

FIGURES = (
    Figure("experiments/results/lc_pfn_likelihood.svg", RESULT, likelihood_figure),
    Figure("experiments/results/lc_pfn_fans.svg", RESULT, fan_figure),
)
