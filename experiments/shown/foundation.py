"""What the documents show of the base models and of the speed of training and decoding."""

from typing import Any

from experiments.report import Rendered, Table, number


def base_model_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the base models' bits per byte."""
    size = row["parameters"]
    return (
        row["predictor"],
        "" if size is None else f"{size / 1e6:.2f}M",
        number(row["validation"], 3),
        number(row["test"], 3),
    )


BASE_MODEL_HEADER = ("predictor", "parameters", "validation, bits per byte", "test")


def decode_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the decoding benchmark."""
    share = row["bandwidth_share"]
    return (
        row["model"],
        row["side"],
        number(row["tokens_per_second"], 1),
        f"{row['ours_over_this']:.2f}x",
        "" if share is None else f"{100 * share:.0f}%",
    )


DECODE_HEADER = (
    "model",
    "side",
    "tokens per second",
    "longreach over this",
    "share of memory bandwidth",
)


def train_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the training benchmark."""
    return (
        f"`{row['config']}`, {row['parameters'] / 1e6:.2f}M parameters",
        number(row["tokens_per_second"], 0),
        number(row["step_gflops"], 0),
        number(row["matmul_gflops"], 0),
        f"{100 * row['ratio_of_best']:.0f}%",
    )


TRAIN_HEADER = (
    "config",
    "tokens per second",
    "GFLOP/s of the step",
    "GFLOP/s of a plain product",
    "ratio of the best",
)

BASE_MODEL_PAGES = ("README.md", "assets/python-5m/README.md", "assets/python-1m/README.md")

TABLES: tuple[Rendered, ...] = (
    *(
        Table("base_model", page, "base_model", BASE_MODEL_HEADER, base_model_row)
        for page in BASE_MODEL_PAGES
    ),
    Table("bench_decode", "README.md", "bench_decode", DECODE_HEADER, decode_row),
    Table("bench_train", "README.md", "bench_train", TRAIN_HEADER, train_row),
)
