"""What the documents show of MetricGrids and its baselines."""

import base64
import dataclasses
import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas
from PIL import Image

from experiments import record
from experiments.figures import Figure
from experiments.report import Rendered, Statements, caption, markdown, number

PAGE = "research/approximation/metric_grids/README.md"

NAMES = {
    "ngp": "instant-ngp, ReLU 2 x 64",
    "one-grid": "one grid, same decoder",
    "no-modulators": "no modulators",
    "full": "**MetricGrids**",
    "separate": "separate tables (paper's wording)",
    "siren": "SIREN, no grid",
}
COLOURS = {
    "ngp": "#1a73e8",
    "one-grid": "#188038",
    "no-modulators": "#9aa0a6",
    "full": "#e8710a",
    "separate": "#a142f4",
    "siren": "#5f6368",
}


def metric_grids_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a comparison; digits are those of PSNR in dB, or of an overlap below 1."""
    digits = 2 if row["quality"]["mean"] > 1 else 4
    rows = row["log2_size"]
    return (
        NAMES[row["field"]],
        "" if rows is None else f"2^{rows}",
        f"{row['parameters']:,}",
        f"{row['bytes'] / 1024:.0f}",
        f"{row['rate']:g}",
        *(number(sample, digits) for sample in row["by_signal"].values()),
        number(row["quality"], digits),
        number(row["common_rate"], digits),
    )


def header(result: dict[str, Any], quality: str) -> tuple[str, ...]:
    """The header for the signals of a result."""
    return (
        "method",
        "rows per level",
        "parameters",
        "KiB",
        "best rate",
        *result["rows"][0]["by_signal"],
        f"mean {quality}",
        "at rate 0.001",
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The table of one part of the experiment; a column per signal."""

    name: str
    result: str
    quality: str
    document: str = PAGE

    def render(self) -> str:
        """Its Markdown."""
        result = record.load(self.result)
        rows = [metric_grids_row(row) for row in result["rows"]]
        return f"{markdown(header(result, self.quality), rows)}\n\n{caption(result)}"


def quality_against_bytes(result: dict[str, Any]) -> Canvas:
    """One line per method over its table sizes; bars are the seeds' spread."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for name in dict.fromkeys(row["field"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["field"] == name]
        axis.errorbar(
            [row["bytes"] / 1024 for row in rows],
            [row["quality"]["mean"] for row in rows],
            yerr=[row["quality"]["spread"] for row in rows],
            marker="o",
            ms=4,
            capsize=2,
            color=COLOURS[name],
            label=NAMES[name].strip("*"),
        )
    axis.set_xlabel("KiB as float32, table and decoder")
    axis.set_ylabel("PSNR in dB, own best learning rate")
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    config = result["config"]
    axis.set_title(f"{config['crop']} x {config['crop']} pixels, {config['steps']} steps")
    figure.tight_layout()
    return figure


def read_picture(text: str) -> np.ndarray:
    """Values in [0, 1] of a picture kept in a result; (height, width, channels)."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        values = np.asarray(image, np.float64) / 255
    return values if values.ndim == 3 else values[..., None]


def reconstructions(result: dict[str, Any]) -> Canvas:
    """Originals, each method's fit at the largest size, and its error: the first and last signal.

    Of a shape the plane through its middle: distances in grey, the surface as a line.
    """
    rows = result["rows"]
    originals = rows[0]["originals"]
    names = list(dict.fromkeys((next(iter(originals)), list(originals)[-1])))
    last = [row for row in rows if row["field"] in ("ngp", "one-grid", "full")] or rows
    if result["config"]["part"] == "table":
        largest = max(result["config"]["sizes"])
        last = [row for row in last if row["log2_size"] == largest]
    size = (2.2 * (1 + len(last)) + 0.7, 4.5 * len(names))
    figure, axes = plt.subplots(2 * len(names), 1 + len(last), figsize=size, layout="constrained")
    shape = result["config"]["part"] == "sdf"
    for name, (above, below) in zip(names, axes.reshape(len(names), 2, -1), strict=True):
        original = read_picture(originals[name])
        _draw(above[0], original, shape)
        above[0].set_title(f"{name}, original", fontsize=8)
        below[0].axis("off")
        for fitted, wrong, row in zip(above[1:], below[1:], last, strict=True):
            values = read_picture(row["shown"][name])
            _draw(fitted, values, shape)
            quality = row["by_signal"][name]["mean"]
            shown = f"overlap {quality:.4f}" if shape else f"{quality:.2f} dB"
            fitted.set_title(f"{NAMES[row['field']].strip('*')}\n{shown}", fontsize=8)
            error = np.abs(values - original).mean(axis=-1)
            map_of_errors = wrong.imshow(error, cmap="magma", vmin=0, vmax=0.1)
            wrong.axis("off")
        figure.colorbar(map_of_errors, ax=list(below), fraction=0.02, label="mean absolute error")
    return figure


def _draw(axis: Any, values: np.ndarray, shape: bool) -> None:
    grey = values.shape[2] == 1
    axis.imshow(values[..., 0] if grey else values, cmap="gray", vmin=0, vmax=1)
    if shape:
        axis.contour(values[..., 0], levels=[0.5], colors=COLOURS["full"], linewidths=1)
    axis.axis("off")


PARTS = {"table": "PSNR", "variants": "PSNR", "total": "PSNR", "photo": "PSNR", "sdf": "overlap"}

TABLES: tuple[Rendered, ...] = tuple(
    table
    for part, quality in PARTS.items()
    for table in (
        Comparison(part, f"metric_grids_{part}", quality),
        Statements(f"{part}-statements", PAGE, f"metric_grids_{part}"),
    )
)

FIGURES = (
    Figure("experiments/results/metric_grids.svg", "metric_grids_table", quality_against_bytes),
    Figure("experiments/results/metric_grids_photo.svg", "metric_grids_photo", reconstructions),
    Figure("experiments/results/metric_grids_sdf.svg", "metric_grids_sdf", reconstructions),
)
