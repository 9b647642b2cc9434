"""What the documents show of operator learning."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.figures import Figure
from experiments.report import Rendered, Statements, Table, number

PAGE = "research/approximation/deeponet/README.md"

MODELS = {
    "deeponet": "**DeepONet**",
    "no-bias": "DeepONet without bias",
    "stacked": "stacked DeepONet",
    "stacked-no-bias": "stacked, without bias",
    "fnn": "fully connected network",
    "linear": "linear regression",
    "kernel": "Gaussian-process regression",
    "trapezoid": "trapezoid rule on the sensors",
    "vanilla": "DeepONet",
    "pod": "**POD-DeepONet**",
    "pod+trunk": "POD and learned trunk",
    "pod-ridge": "POD and ridge regression",
    "ridge": "ridge regression",
    "mean": "mean of the training outputs",
}


def scientific(value: dict[str, Any]) -> str:
    """``mean ± spread`` of a sample with one exponent."""
    mean, spread = value["mean"], value["spread"]
    if mean <= 0:
        return f"{mean:.1e}"
    exponent = math.floor(math.log10(mean))
    scaled = [x / 10.0**exponent for x in (mean, spread)]
    if spread == 0:
        return f"{scaled[0]:.1f}e{exponent}"
    return f"({scaled[0]:.1f} ± {scaled[1]:.1f})e{exponent}"


def percent(value: dict[str, Any], digits: int = 2) -> str:
    """``mean ± spread`` of a share."""
    scaled = {name: 100 * value[name] for name in ("mean", "spread")}
    return f"{number(scaled, digits)}%"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}".replace("e+0", "e")


def rival_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the antiderivative's comparison."""
    return (
        str(row["size"]),
        MODELS[row["model"]],
        scientific(row["train_mse"]),
        scientific(row["mse"]),
        scientific(row["mse_without_outliers"]),
        _ratio(row["ratio"]["mean"]) if row["train_mse"]["mean"] > 1e-12 else "",
        f"{row['seconds']['mean']:.0f}" if "seconds" in row else "",
    )


RIVAL_HEADER = (
    "functions",
    "method",
    "training error",
    "test error",
    "without worst 0.1%",
    "test / training",
    "seconds",
)


def system_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of other operators and of data from files."""
    return (
        row["system"],
        MODELS[row["model"]],
        scientific(row["mse"]),
        percent(row["relative_l2"]),
    )


SYSTEM_HEADER = ("operator", "method", "test error", "relative L2")


def pod_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the POD study."""
    return (
        MODELS[row["model"]],
        str(row["modes"] or ""),
        row.get("activation", "").replace("relu", "ReLU").replace("gelu", "GELU"),
        f"{row['functions']:,}",
        f"{row['steps']:,}" if "steps" in row else "",
        scientific(row["train_mse"]),
        scientific(row["mse"]),
        percent(row["relative_l2"], 3),
        percent(row["floor"], 3) if "floor" in row else "",
    )


POD_HEADER = (
    "method",
    "modes",
    "activation",
    "functions",
    "updates",
    "training error",
    "test error",
    "relative L2",
    "exact floor of the basis",
)


def bench_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the speed comparison."""
    return (
        row["side"],
        number(row["steps_per_second"], 0),
        f"{row['ours_over_this']:.2f}x",
    )


BENCH_HEADER = ("side", "full-batch steps per second", "longreach over this")


def _spread(axis: Any, x: Any, rows: list[dict[str, Any]], **style: Any) -> None:
    """The geometric mean of every row, and each seed as a dot."""
    samples = np.array([row["mse"]["samples"] for row in rows])
    (line,) = axis.plot(x, np.exp(np.log(samples).mean(1)), marker="o", ms=4, **style)
    for seed in samples.T:
        axis.plot(x, seed, ".", ms=3, color=line.get_color(), alpha=0.5)


def convergence(result: dict[str, Any]) -> Canvas:
    """Test error against the number of training functions, with its fitted order."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        order = number(rows[0]["order"])
        name = MODELS[model].strip("*")
        sizes = np.array([row["size"] for row in rows])
        _spread(axis, sizes, rows, label=f"{name}: order {order}")
        # Every seed's fit has the slope of its order and goes through the mean of its logarithms.
        errors = np.log([row["mse"]["samples"] for row in rows]).mean()
        line = np.exp(errors - rows[0]["order"]["mean"] * (np.log(sizes) - np.log(sizes).mean()))
        axis.plot(sizes, line, "--", color="#5f6368", lw=0.9, label="mean of the seeds' fits")
    axis.set(xscale="log", yscale="log", xlabel="training functions", ylabel="test error")
    axis.set_title(f"antiderivative, {result['config']['steps']} updates", fontsize=9)
    return _finish(figure, axis)


def sensors(result: dict[str, Any]) -> Canvas:
    """Test error against the number of sensors."""
    figure, axis = plt.subplots(figsize=(5.2, 3.6))
    rows = result["rows"]
    _spread(axis, [row["sensors"] for row in rows], rows, label="DeepONet, pendulum")
    axis.set(yscale="log", xlabel="sensors", ylabel="test error")
    axis.set_xticks([row["sensors"] for row in rows])
    return _finish(figure, axis)


def _finish(figure: Canvas, axis: Any) -> Canvas:
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def solution(result: dict[str, Any]) -> Canvas:
    """A test source of diffusion-reaction, its solution, the network's, and the difference."""
    row = next(row for row in result["rows"] if "example" in row)
    example = row["example"]
    exact, predicted = (np.array(example[name]) for name in ("exact", "predicted"))
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6))
    axes[0].plot(np.linspace(0, 1, len(example["source"])), example["source"], lw=1.2)
    axes[0].set(title="source u(x)", xlabel="x")
    low, high = exact.min(), exact.max()
    for axis, values, title in (
        (axes[1], exact, "solution s(x, t)"),
        (axes[2], predicted, f"POD-DeepONet, {row['modes']} modes"),
        (axes[3], predicted - exact, "difference"),
    ):
        style: dict[str, Any] = {"vmin": low, "vmax": high}
        if title == "difference":
            most = np.abs(values).max()
            style = {"vmin": -most, "vmax": most, "cmap": "RdBu_r"}
        shown = axis.imshow(values, origin="lower", extent=(0, 1, 0, 1), aspect="auto", **style)
        axis.set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(shown, ax=axis)
    figure.tight_layout()
    return figure


TABLES: tuple[Rendered, ...] = (
    Table("rivals", PAGE, "deeponet_rivals", RIVAL_HEADER, rival_row),
    Statements("rivals-statements", PAGE, "deeponet_rivals"),
    Statements("order", PAGE, "deeponet_order"),
    Table("systems", PAGE, "deeponet_systems", SYSTEM_HEADER, system_row),
    Statements("systems-statements", PAGE, "deeponet_systems"),
    Table("pod", PAGE, "deeponet_pod", POD_HEADER, pod_row),
    Statements("pod-statements", PAGE, "deeponet_pod"),
    Table("files", PAGE, "deeponet_files", SYSTEM_HEADER, system_row),
    Statements("files-statements", PAGE, "deeponet_files"),
    Table("bench_deeponet", PAGE, "bench_deeponet", BENCH_HEADER, bench_row),
)

FIGURES = (
    Figure("experiments/results/deeponet_order.svg", "deeponet_order", convergence),
    Figure("experiments/results/deeponet_sensors.svg", "deeponet_sensors", sensors),
    Figure("experiments/results/deeponet_pod.svg", "deeponet_pod", solution),
)
