"""MetricGrids against a plain hash grid, on small images and on signed distances.

    python -m experiments.metric_grids --part=table
    python -m experiments.metric_grids --part=variants
    python -m experiments.metric_grids --part=total
    python -m experiments.metric_grids --part=photo --signals=IMAGE.png
    python -m experiments.metric_grids --part=sdf --signals=torus,MESH.obj

`table` compares at equal tables of three sizes, `variants` two other designs at one of them,
`total` at equal total parameters, `photo` on whole images, `sdf` in three dimensions. Every method
takes the best of several learning rates, tried with the first seed on the first signal. All fits of
a signal run in one compiled loop.
"""

import base64
import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image

from experiments import record, statements
from experiments.metric_grids_statements import STATEMENTS
from experiments.settings import from_flags
from models.coordinate_fields import Field, InstantNGP, Samples, Siren
from models.metric_grids import MetricGrids
from models.params import count, init, nbytes
from ops.hash_grid import HashGridConfig
from research.approximation.metric_grids import fit, sdf
from research.approximation.metric_grids.images import load_image, pixel_centres, psnr
from research.approximation.metric_grids.shapes import Shape

PARTS = ("table", "variants", "total", "photo", "sdf")
METHODS = ("ngp", "one-grid", "no-modulators", "full", "separate", "siren")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and on what; see the flags."""

    part: str
    signals: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    crop: int
    steps: int
    rates: tuple[float, ...]
    batches: int
    batch: int
    resolution: int


DEFAULTS: dict[str, dict[str, Any]] = {
    "table": {
        "signals": ("astronaut", "coffee"), "sizes": (8, 9, 10), "crop": 96, "steps": 500,
        "methods": ("ngp", "one-grid", "no-modulators", "full"),
    },
    "variants": {
        "signals": ("astronaut", "coffee"), "sizes": (9,), "crop": 96, "steps": 500,
        "methods": ("full", "separate", "siren"),
    },
    "total": {
        "signals": ("astronaut", "coffee"), "sizes": (9,), "crop": 128, "steps": 1000,
        "methods": ("ngp", "one-grid", "full"),
    },
    "photo": {
        "signals": ("astronaut", "coffee"), "sizes": (12,), "crop": 0, "steps": 1000,
        "methods": ("ngp", "one-grid", "full"), "batch": 16384,
    },
    "sdf": {
        "signals": ("torus", "csg"), "sizes": (12,), "crop": 0, "steps": 1000,
        "methods": ("ngp", "one-grid", "no-modulators", "full"),
    },
}  # fmt: skip
"""Settings of each part where a flag is not given."""

FINEST = {"photo": 256, "sdf": 128}
"""Vertices per axis of the finest level, where they are not 64."""

SHOWN = 128
"""Pixels per side of what is kept of a fit, from the middle of the image."""

COMMON_RATE = 1e-3
"""The rate of the comparison at equal rates: the official one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Signal:
    """What a field is fitted to: training data, and how good a fit is."""

    name: str
    channels: int
    loss: fit.Loss
    floor: float
    batches: int | None  # None: all points in every step
    points: np.ndarray  # (points, d), or (batches, points, d)
    targets: np.ndarray  # (points, channels), or with batches
    quality: Callable[[Field, Any], float]
    show: Callable[[Field, Any], str]  # a fit as a `picture`: the image, or a plane's distances
    original: str  # the same of the signal itself


def make_field(
    method: str, dims: int, channels: int, log2_size: int, budget: int = 0, finest: int = 64
) -> Field:
    """A method's field: 8 levels, the finest of ``finest`` vertices per axis.

    ``siren`` has no table; it is as wide as makes it about as large as ``full``. With a ``budget``
    of parameters ``ngp`` takes the table that brings it nearest to that.

    Raises:
        ValueError: an unknown method.
    """
    grid = HashGridConfig(dims, 8, 2, log2_size, base_res=8 if finest == 64 else 16, max_res=finest)
    full = MetricGrids(grid, channels)
    if method == "ngp":
        sizes = range(log2_size, log2_size + 6 if budget else log2_size + 1)
        grids = (dataclasses.replace(grid, log2_size=size) for size in sizes)
        return _nearest([InstantNGP(g, channels) for g in grids], budget)
    if method == "siren":
        widths = [Siren(dims, channels, hidden=width) for width in range(8, 512)]
        return _nearest(widths, count(full.specs()))
    changes: dict[str, dict[str, Any]] = {
        "full": {},
        "one-grid": {"spaces": 1},
        "no-modulators": {"modulate": False},
        "separate": {"separate_tables": True},
    }
    if method not in changes:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    return dataclasses.replace(full, **changes[method])


def _nearest(fields: Sequence[Field], size: int) -> Field:
    """The field whose number of parameters is nearest to a size."""
    return min(fields, key=lambda field: abs(count(field.specs()) - size))


def load_crop(name: str, crop: int) -> np.ndarray:
    """The middle of a picture by scikit-image's name for it, or of a file; 0: all of it.

    Raises:
        ValueError: scikit-image is needed and not installed, or the picture is too small.
    """
    if pathlib.Path(name).suffix:
        values = load_image(name)
    else:
        try:
            from skimage import data
        except ImportError as error:
            raise ValueError(
                f"the picture {name} is scikit-image's: pip install -e '.[pictures]', or give "
                "image files with --signals."
            ) from error
        values = getattr(data, name)().astype(np.float32) / 255
    height, width = values.shape[:2]
    if crop > min(height, width):
        raise ValueError(f"{name} has {height} x {width} pixels: choose a smaller --crop.")
    if crop:
        top, left = (height - crop) // 2, (width - crop) // 2
        values = values[top : top + crop, left : left + crop]
    return values


def image_signal(name: str, crop: int, batch: int = 0) -> Signal:
    """An image or its crop as a signal; quality is PSNR in dB.

    Every step sees all pixels, or ``batch`` of them: a random partition is made once, and its last
    part is filled up with pixels of the first.
    """
    values = load_crop(name, crop)
    centres = pixel_centres(*values.shape[:2])
    points, targets = centres, values.reshape(-1, values.shape[2])
    batches = None
    if batch:
        batches = -(-len(points) // batch)
        order = np.resize(np.random.default_rng(0).permutation(len(points)), (batches, batch))
        points, targets = points[order], targets[order]
    top, left = (max(0, (side - SHOWN) // 2) for side in values.shape[:2])
    middle = np.s_[top : top + SHOWN, left : left + SHOWN]

    def fitted(field: Field, params: Any) -> np.ndarray:
        return fit.evaluate(field, params, centres).reshape(values.shape)

    return Signal(
        name=pathlib.Path(name).stem,
        channels=values.shape[2],
        loss=fit.mean_squared,
        floor=0.01,
        batches=batches,
        points=points,
        targets=targets,
        quality=lambda field, params: psnr(fitted(field, params), values),
        show=lambda field, params: picture(fitted(field, params)[middle]),
        original=picture(values[middle]),
    )


def shape_signal(name: str, settings: Settings) -> Signal:
    """A shape as a signal; quality is intersection over union on a grid."""
    shape: Shape = sdf.load_shape(name)
    rng = np.random.default_rng(0)
    points, values = sdf.training_points(shape, settings.batches, settings.batch, rng)
    cube = sdf.cube(settings.resolution)
    inside = shape.distance(cube.astype(np.float64)) < 0

    line = np.linspace(-1, 1, 96, dtype=np.float32)
    x, z = np.meshgrid(line, line[::-1])
    plane = np.stack([x.ravel(), np.zeros(x.size, np.float32), z.ravel()], axis=-1)

    def cut(distances: np.ndarray) -> str:
        return picture(0.5 + distances.reshape(96, 96, 1))

    return Signal(
        name=pathlib.Path(name).stem,
        channels=1,
        loss=fit.relative_error,
        floor=0.1,
        batches=settings.batches,
        points=points,
        targets=values,
        quality=lambda field, params: sdf.overlap(
            fit.evaluate(field, params, cube)[:, 0] < 0, inside
        ),
        show=lambda field, params: cut(fit.evaluate(field, params, plane)),
        original=cut(shape.distance(plane.astype(np.float64))),
    )


def picture(values: np.ndarray) -> str:
    """Values in [0, 1] as an 8-bit PNG in base 64, to be kept in a result."""
    pixels = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@functools.cache
def _program(
    field: Field, loss: fit.Loss, steps: int, floor: float, batches: int | None
) -> Callable[..., Any]:
    """Fits one after the other over stacked parameters, rates and keys, in one compiled loop."""
    run = fit.make_fit(field, loss, steps, floor, batches)

    def all_of(params: Any, rates: Any, samples: Samples, targets: Any, keys: Any) -> Any:
        return jax.lax.map(lambda x: run(x[0], x[1], samples, targets, x[2]), (params, rates, keys))

    return jax.jit(all_of)


def fit_all(
    field: Field, signal: Signal, steps: int, runs: Sequence[tuple[float, int]]
) -> list[Any]:
    """Parameters fitted for every (learning rate, seed)."""
    keys = jnp.stack([jax.random.key(seed) for _, seed in runs])
    specs = field.specs()
    starts = [init(specs, key) for key in keys]
    params = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    at = Samples(jnp.asarray(signal.points), None)
    if signal.batches is None:
        at = jax.jit(field.samples)(at.x)
    rates = jnp.asarray([rate for rate, _ in runs], jnp.float32)
    program = _program(field, signal.loss, steps, signal.floor, signal.batches)
    fitted, _ = program(params, rates, at, jnp.asarray(signal.targets), keys)
    return [jax.tree.map(lambda x, i=i: x[i], fitted) for i in range(len(runs))]


def quality(signal: Signal, field: Field, params: Any) -> float:
    """A fit's quality; 0 if it has diverged to values that are not finite."""
    value = signal.quality(field, params)
    return value if np.isfinite(value) else 0.0


def measure(
    settings: Settings, signals: Sequence[Signal], method: str, size: int
) -> dict[str, Any]:
    """One method at one table size: its own best rate, and the common one, on all seeds."""
    first = signals[0]
    shape = (first.points.shape[-1], first.channels, size)
    finest = FINEST.get(settings.part, 64)
    budget = 0
    if settings.part == "total":
        budget = count(make_field("full", *shape, finest=finest).specs())
    field = make_field(method, *shape, budget, finest)
    fit_one = functools.partial(fit_all, field, steps=settings.steps)
    tried = fit_one(first, runs=[(rate, settings.seeds[0]) for rate in settings.rates])
    sweep = [quality(first, field, params) for params in tried]
    best = settings.rates[int(np.argmax(sweep))]
    by_signal: dict[str, list[float]] = {}
    common: dict[str, list[float]] = {}
    shown = {}
    for signal in signals:
        for rate, into in ((best, by_signal), (COMMON_RATE, common)):
            if rate == best and into is common:
                common[signal.name] = by_signal[signal.name]
                continue
            fitted = fit_one(signal, runs=[(rate, seed) for seed in settings.seeds])
            into[signal.name] = [quality(signal, field, params) for params in fitted]
            if into is by_signal:
                shown[signal.name] = signal.show(field, fitted[0])
    return {
        "method": f"{method}-{size}" if settings.part == "table" else method,
        "field": method,
        "log2_size": getattr(getattr(field, "grid", None), "log2_size", None),
        "parameters": count(field.specs()),
        "bytes": nbytes(field.specs()),
        "rate": best,
        "sweep": [{"rate": r, "quality": q} for r, q in zip(settings.rates, sweep, strict=True)],
        "quality": record.sample(np.mean(list(by_signal.values()), axis=0).tolist()),
        "common_rate": record.sample(np.mean(list(common.values()), axis=0).tolist()),
        "by_signal": {name: record.sample(values) for name, values in by_signal.items()},
        "shown": shown,
    }


def load_signals(settings: Settings) -> list[Signal]:
    """The signals of a part.

    Raises:
        ValueError: signals of different numbers of channels.
    """
    if settings.part == "sdf":
        return [shape_signal(name, settings) for name in settings.signals]
    batch = settings.batch if settings.part == "photo" else 0
    signals = [image_signal(name, settings.crop, batch) for name in settings.signals]
    if len({signal.channels for signal in signals}) > 1:
        raise ValueError("the images differ in channels: give colour or grey ones alone.")
    return signals


def run(settings: Settings) -> list[dict[str, Any]]:
    """All methods at all sizes, each over all signals and seeds."""
    signals = load_signals(settings)
    rows = []
    for size in settings.sizes:
        for method in settings.methods:
            rows.append(measure(settings, signals, method, size))
            print(show(rows[-1:]), flush=True)
    rows[0]["originals"] = {signal.name: signal.original for signal in signals}
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The result as plain lines."""
    return "\n".join(
        f"{r['method']:18} {r['quality']['mean']:8.3f} ± {r['quality']['spread']:6.3f} at rate "
        f"{r['rate']:g}, {r['common_rate']['mean']:8.3f} at {COMMON_RATE:g}, "
        f"{r['parameters']:7d} parameters"
        for r in rows
    )


def read_settings() -> Settings:
    """The flags, with the part's defaults for those that were not given."""
    part = flags.FLAGS.part
    for name, value in DEFAULTS[part].items():
        if flags.FLAGS[name].using_default_value:
            flags.FLAGS[name].value = list(value) if isinstance(value, tuple) else value
    settings = from_flags(Settings)
    return dataclasses.replace(
        settings,
        sizes=tuple(int(size) for size in settings.sizes),
        rates=tuple(float(rate) for rate in settings.rates),
    )


def main(_: Sequence[str]) -> None:
    """Run with the flags' settings, print and save."""
    settings = read_settings()
    rows = run(settings)
    name = record.name_of(f"metric_grids_{settings.part}", None, flags.FLAGS.label)
    statements.conclude(name, rows, STATEMENTS[settings.part], settings)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_enum("part", "table", PARTS, "What to compare.")
    flags.DEFINE_list("signals", [], "scikit-image's pictures or image files; or shapes.")
    flags.DEFINE_list("methods", [], f"Of {', '.join(METHODS)}.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the initial values and batches.")
    flags.DEFINE_list("sizes", [], "log2 of the rows per level.")
    flags.DEFINE_list("rates", ["1e-3", "2e-3", "4e-3", "1e-2", "2e-2"], "Learning rates.")
    flags.DEFINE_integer("crop", 0, "Pixels per side of the middle crop; 0: the whole image.")
    flags.DEFINE_integer("steps", 0, "Updates of every fit.")
    flags.DEFINE_integer("batches", 32, "Batches of points of a shape.")
    flags.DEFINE_integer("batch", 4096, "Points of a batch: of a shape, or of a whole image.")
    flags.DEFINE_integer("resolution", 64, "Points per axis of the grid for overlaps.")
    flags.DEFINE_string("label", "", "Ending of the result's name.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
