"""Vision transformers by how they tell positions: accuracy at the trained grid and at larger ones.

    python -m experiments.seqpe_vit --images=FOLDER/t10k-images-idx3-ubyte.gz --classes=10

Trains the variants of `configs/seqpe_vit.py`, one run each for every seed, at one size of images.
Held-out images are then read scaled up to larger sizes, and as they are at a random place of a
larger canvas. Learned tables are resized to the grid, sinusoids and SeqPE go on.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jaxtyping import Float

from configs.defaults import Config
from experiments import record, statements
from experiments.seqpe import finished
from experiments.settings import from_flags
from experiments.statements import Statement, at_least, value
from models.params import count

METHODS = ("seqpe", "no_contrastive", "no_transfer", "no_both", "learned", "sinusoidal")
COMPARED = ("seqpe", "no_both", "learned", "sinusoidal")


def ahead(rival: str, name: str) -> Statement:
    """SeqPE reads a kind of images at least as well as a rival."""
    return Statement(
        f"{name.replace('_', ' at ')} pixels: SeqPE is at least as accurate as {rival}",
        ("seqpe", rival),
        at_least("seqpe", rival, name),
    )


def make_statements(sizes: Sequence[int]) -> tuple[Statement, ...]:
    """What must hold for these sizes, of which the first is the trained one."""
    trained, larger = sizes[0], sizes[1:]
    in_range = [
        Statement(
            f"at the trained grid SeqPE is within 2 points of {rival}",
            ("seqpe", rival),
            lambda rows, seed, rival=rival: (
                value(rows["seqpe"], f"scaled_{trained}", seed)
                >= value(rows[rival], f"scaled_{trained}", seed) - 0.02
            ),
        )
        for rival in ("learned", "sinusoidal")
    ]
    beyond = [
        ahead(rival, f"{kind}_{size}")
        for size in larger
        for kind in ("scaled", "placed")
        for rival in ("learned", "sinusoidal", "no_both")
    ]
    return (*in_range, *beyond)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained and how it is read; see the flags."""

    folder: str
    images: str
    classes: int
    held_out: int
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int


def config_of(settings: Settings, variant: str, seed: int) -> Config:
    """The config of one run."""
    config = importlib.import_module("configs.seqpe_vit").get_config(variant)
    config.task.images, config.task.held_out = settings.images, settings.held_out
    config.task.model.classes = settings.classes
    config.task.model.image_size = (settings.sizes[0], settings.sizes[0])
    config.seed, config.steps = seed, settings.steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, settings.steps // 10)
    config.log_every = max(1, settings.steps // 10)
    config.checkpoint_every = settings.steps
    return config


def scaled(images: Float[np.ndarray, "n h w c"], size: int) -> Float[np.ndarray, "n s s c"]:
    """Images made larger, linearly."""
    shape = (len(images), size, size, images.shape[3])
    return np.asarray(jax.image.resize(images, shape, "linear"))


def placed(
    images: Float[np.ndarray, "n h w c"], size: int, seed: int
) -> Float[np.ndarray, "n s s c"]:
    """Images as they are, each at a random place of a canvas of zeros."""
    canvas = np.zeros((len(images), size, size, images.shape[3]), np.float32)
    h, w = images.shape[1:3]
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, size - h + 1, len(images))
    columns = rng.integers(0, size - w + 1, len(images))
    for image, row, column, target in zip(images, rows, columns, canvas, strict=True):
        target[row : row + h, column : column + w] = image
    return canvas


def measure(settings: Settings, task: Any, params: Any, seed: int) -> dict[str, Any]:
    """Accuracy of one run by kind and size of images."""
    rest = task.splits[1]
    row: dict[str, Any] = {"parameters": count(params)}
    for size in settings.sizes:
        kinds = {"scaled": scaled(rest.values, size)}
        if size > settings.sizes[0]:
            kinds["placed"] = placed(rest.values, size, seed)
        for kind, images in kinds.items():
            row[f"{kind}_{size}"] = task.accuracy(params, images, rest.labels)
    return row


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods and seeds.

    Raises:
        ValueError: an unknown method, sizes that do not grow or that patches do not fill, or a
            folder with runs of other settings.
    """
    if unknown := sorted(set(settings.methods) - set(METHODS)):
        raise ValueError(f"unknown method {unknown[0]!r}: choose of {', '.join(METHODS)}.")
    if list(settings.sizes) != sorted(set(settings.sizes)):
        raise ValueError(f"sizes {settings.sizes} must grow, from the trained one on.")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.methods}
    for seed in settings.seeds:
        for name in settings.methods:
            print(f"{name}, seed {seed}", flush=True)
            folder = pathlib.Path(settings.folder) / f"{name}-{seed}"
            task, params = finished(config_of(settings, name, seed), folder)
            for size in settings.sizes:
                task.model.grid_of((size, size))
            runs[name].append(measure(settings, task, params, seed))
    return [
        {"method": name, "parameters": found[0]["parameters"]}
        | {
            key: record.sample([one[key] for one in found])
            for key in found[0]
            if key != "parameters"
        }
        for name, found in runs.items()
    ]


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as a plain table."""
    columns = [key for key in rows[0] if key.startswith(("scaled_", "placed_"))]
    lines = [f"{'method':16}" + "".join(f"{key:>12}" for key in columns)]
    for row in rows:
        cells = "".join(f"{100 * row[key]['mean']:11.1f}%" for key in columns)
        lines.append(f"{row['method']:16}{cells}")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    logging.set_verbosity(logging.WARNING)
    settings = from_flags(Settings)
    settings = dataclasses.replace(settings, sizes=tuple(int(n) for n in settings.sizes))
    try:
        rows = run(settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(show(rows))
    # Where the images lie is nobody's business.
    kept = dataclasses.replace(settings, images=pathlib.Path(settings.images).name)
    name = record.name_of("seqpe_vit", None, flags.FLAGS.label)
    statements.conclude(name, rows, make_statements(settings.sizes), kept)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("folder", "runs/seqpe_vit", "Where the runs are, or will be.")
    flags.DEFINE_string("images", "textures:6000:28", "See train.data.images.load_images.")
    flags.DEFINE_integer("classes", 9, "Their classes.", lower_bound=2)
    flags.DEFINE_integer("held_out", 2048, "Images to measure on, a multiple of 128.")
    flags.DEFINE_list("sizes", ["28", "44", "56"], "Sides in pixels; the first is trained.")
    flags.DEFINE_list("methods", list(COMPARED), f"Of {', '.join(METHODS)}.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training and of places.")
    flags.DEFINE_integer("steps", 600, "Updates of every run.", lower_bound=10)
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
