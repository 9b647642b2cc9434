"""Fitting images and signed distances: files, coordinates, tasks, the compiled fit, bad input."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import metric_grids_image, metric_grids_sdf
from models.coordinate_fields import InstantNGP
from models.metric_grids import MetricGrids
from models.params import init
from models.sharding import make_mesh
from ops.hash_grid import HashGridConfig
from research.approximation.metric_grids import fit, images, sdf, task
from research.approximation.metric_grids.shapes import Torus
from train import loop
from train.config import TrainConfig, build
from train.metrics import read_metrics
from train.task import Context

pytestmark = pytest.mark.slow  # a minute in all: networks are trained

GRID = HashGridConfig(2, 4, 2, 8, 4, 16)
CFG = MetricGrids(GRID, out_dim=3, hidden=16)


def picture(height: int = 16, width: int = 12, channels: int = 3) -> np.ndarray:
    """Smooth colours with an edge, 8 bits."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [0.5 + 0.4 * np.sin(7 * x + 3 * k * y + k) for k in range(channels)]
    image = np.stack(waves, -1) + 0.1 * (x > y)[..., None]
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


def save(path: pathlib.Path, values: np.ndarray, mode: str | None = None) -> str:
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return str(path)


# --- files


def test_eight_bit_images_are_read(tmp_path):
    values = picture()
    read = images.load_image(save(tmp_path / "a.png", values))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32) / 255)
    grey = images.load_image(save(tmp_path / "g.png", values[..., 0]))
    np.testing.assert_array_equal(grey, values[..., :1].astype(np.float32) / 255)
    bits = images.load_image(save(tmp_path / "b.png", values, "1"))
    assert bits.shape == (16, 12, 1) and set(np.unique(bits)) == {0.0, 1.0}
    palette = images.load_image(save(tmp_path / "p.png", values, "P"))
    assert palette.shape == (16, 12, 3) and np.abs(palette - read).mean() < 0.1


def test_sixteen_bit_grey_keeps_its_bits(tmp_path):
    values = np.arange(0, 65536, 997, np.uint16).reshape(6, 11)
    read = images.load_image(save(tmp_path / "g.png", values))
    np.testing.assert_allclose(read[..., 0], values / 65535, rtol=1e-6)


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
    values = np.dstack([picture(), np.full((16, 12), 255, np.uint8)])
    read = images.load_image(save(tmp_path / "a.png", values))
    np.testing.assert_array_equal(read, picture().astype(np.float32) / 255)
    grey = images.load_image(save(tmp_path / "ga.png", values, "LA"))
    assert grey.shape == (16, 12, 1)
    values[3, 4, 3] = 254
    with pytest.raises(ValueError, match=r"a.png has transparent pixels: flatten it"):
        images.load_image(save(tmp_path / "a.png", values))


def sixteen_bit_colour(path: pathlib.Path) -> str:
    """A PNG of 2 x 2 pixels with 16 bits per channel, which Pillow reads but cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = np.arange(12, dtype=">u2").reshape(2, 6) * 999
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return str(path)


def test_images_that_would_lose_something_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"deep.png has 16 bits per colour"):
        images.load_image(sixteen_bit_colour(tmp_path / "deep.png"))
    with pytest.raises(ValueError, match="Pillow's mode CMYK: convert"):
        images.load_image(save(tmp_path / "c.tif", picture(), "CMYK"))
    with pytest.raises(ValueError, match="Pillow's mode F: convert"):
        images.load_image(save(tmp_path / "f.tif", picture()[..., 0].astype(np.float32)))
    frames = [Image.fromarray(picture()), Image.fromarray(picture()[::-1].copy())]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"two.tif has 2 frames: save one alone"):
        images.load_image(tmp_path / "two.tif")
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match=r"no.png is no image that Pillow can read"):
        images.load_image(tmp_path / "no.png")
    with pytest.raises(FileNotFoundError, match="there is no image"):
        images.load_image(tmp_path / "none.png")


def test_pixel_centres_are_not_corners():
    x = images.pixel_centres(2, 4)
    assert x.shape == (8, 2) and x.dtype == np.float32
    np.testing.assert_allclose(x[:4, 0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(x[:, 1], [-0.5] * 4 + [0.5] * 4)
    with pytest.raises(ValueError, match="has no pixels"):
        images.pixel_centres(0, 4)


def test_psnr():
    a = np.full((4, 4, 3), 0.5)
    assert images.psnr(a + 0.1, a) == pytest.approx(20.0)
    assert images.psnr(np.full_like(a, 7.0), np.ones_like(a)) == float("inf")


# --- losses and schedule


def test_losses_and_rate():
    values, target = jnp.asarray([[0.2], [-0.5]]), jnp.asarray([[0.0], [-0.4]])
    assert fit.mean_squared(values, target) == pytest.approx((0.04 + 0.01) / 2)
    wanted = (0.2 / 0.01 + 0.1 / 0.41) / 2
    assert fit.relative_error(values, target) == pytest.approx(wanted, rel=1e-5)
    share = [float(fit.cosine_rate(i, 11, 0.1)) for i in range(11)]
    assert share[0] == 1.0 and share[-1] == pytest.approx(0.1) and share[5] == pytest.approx(0.55)
    assert (np.diff(share) < 0).all()


# --- the compiled fit


def test_fits_of_several_rates_are_those_of_each_alone():
    samples = CFG.samples(jnp.asarray(images.pixel_centres(16, 12)))
    targets = jnp.asarray(picture().reshape(-1, 3) / 255, jnp.float32)
    run = fit.make_fit(CFG, fit.mean_squared, 30, 0.01)
    keys = jax.random.split(jax.random.key(0), 2)
    rates = jnp.asarray([1e-3, 4e-3])
    params = [init(CFG.specs(), key) for key in keys]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    over = jax.jit(jax.vmap(run, in_axes=(0, 0, None, None, 0)))
    _, losses = over(stacked, rates, samples, targets, keys)
    assert losses.shape == (2, 30)
    assert (losses[:, -1] < 0.7 * losses[:, 0]).all()
    for i in range(2):
        _, alone = jax.jit(run)(params[i], rates[i], samples, targets, keys[i])
        np.testing.assert_allclose(losses[i, :10], alone[:10], rtol=1e-3)


def test_an_image_is_fitted():
    values = picture() / np.float32(255)
    params, quality = fit.fit_image(values, CFG, 150, jax.random.key(0), learning_rate=4e-3)
    assert quality > 30
    again = fit.evaluate(CFG, params, images.pixel_centres(16, 12), chunk=50)
    assert images.psnr(again.reshape(values.shape), values) == pytest.approx(quality, abs=1e-3)
    with pytest.raises(
        ValueError, match="2 coordinates to 3 channels, but the signal needs 2 and 1"
    ):
        fit.fit_image(values[..., :1], CFG, 1, jax.random.key(0))


def test_values_are_asked_for_inside_the_domain_only():
    params = init(CFG.specs(), jax.random.key(0))
    with pytest.raises(ValueError, match="coordinates must lie in"):
        fit.evaluate(CFG, params, np.asarray([[0.0, 1.5]], np.float32))


# --- stratified batches


@pytest.mark.parametrize(("height", "width", "block"), [(12, 9, 3), (13, 10, 4), (5, 7, 8)])
def test_a_batch_has_one_pixel_of_every_block(height: int, width: int, block: int):
    for seed in range(5):
        chosen = np.asarray(task.stratified_pixels(jax.random.key(seed), height, width, block))
        row, column = chosen // width, chosen % width
        assert (chosen >= 0).all() and (row < height).all()
        blocks = set(zip((row // block).tolist(), (column // block).tolist(), strict=True))
        assert len(blocks) == len(chosen) == -(-height // block) * -(-width // block)
    seen = {
        p for seed in range(200)
        for p in task.stratified_pixels(jax.random.key(seed), 4, 4, 2).tolist()
    }  # fmt: skip
    assert seen == set(range(16))


def test_the_official_batch_is_the_whole_kodak_image():
    assert task.block_side(512, 768, 2**18) == 1
    assert task.block_side(4096, 4096, 2**18) == 8


# --- tasks


def train(config: Any, folder: pathlib.Path) -> loop.Result:
    mesh = make_mesh("", jax.devices()[:1])
    return loop.train(build(TrainConfig, config.to_dict()), folder, mesh)


def small_image_config(tmp_path: pathlib.Path) -> Any:
    config = metric_grids_image.get_config("small")
    config.task.image = save(tmp_path / "image.png", picture())
    config.task.field.grid.update({"n_levels": 4, "log2_size": 8, "base_res": 4, "max_res": 16})
    config.task.field.hidden = 16
    config.steps, config.log_every, config.steps_per_call = 150, 50, 50
    return config


@pytest.mark.parametrize("batch", [192, 48])
def test_an_image_is_trained_by_the_loop(tmp_path, batch: int):
    """The whole image in every step, with known rows, and a stratified part, without."""
    config = small_image_config(tmp_path)
    config.batch_size, config.task.known_rows = batch, batch == 192
    result = train(config, tmp_path / "run")
    assert result.evaluation["psnr"] > 20
    assert result.evaluation["bytes"] == 4 * result.evaluation["parameters"]
    shown = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [line["loss"] for line in shown if "loss" in line]
    assert losses[-1] < losses[0]


def test_known_rows_change_nothing_but_speed(tmp_path):
    config = small_image_config(tmp_path)
    config.steps = config.steps_per_call = config.log_every = 5
    found = []
    for known in (True, False):
        config.task.known_rows = known
        found.append(train(config, tmp_path / f"run{known}").state.trained)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tables_and_decoders_are_optimiser_groups(tmp_path):
    config = small_image_config(tmp_path)
    config.steps = config.steps_per_call = config.log_every = 5
    config.groups = {"table": {"learning_rate": 0.0}}
    result = train(config, tmp_path / "run")
    first = init(build_field(config).specs(), jax.random.key(config.seed))
    np.testing.assert_array_equal(result.state.trained.table, first.table)
    assert not np.array_equal(result.state.trained.out.w, first.out.w)


def build_field(config: Any) -> MetricGrids:
    return build(MetricGrids, config.task.field.to_dict())


def test_signed_distances_are_trained_by_the_loop(tmp_path):
    config = metric_grids_sdf.get_config("small")
    config.task.field.grid.update({"n_levels": 4, "log2_size": 9, "base_res": 4, "max_res": 16})
    config.task.field.hidden, config.task.resolution = 16, 16
    config.task.batches, config.batch_size = 2, 512
    config.steps, config.log_every, config.steps_per_call = 100, 50, 50
    config.optimizer.learning_rate = 2e-3
    result = train(config, tmp_path / "run")
    assert result.evaluation["iou"] > 0.5
    assert result.evaluation["relative_error"] < 5
    assert {"absolute_error", "parameters", "bytes"} < result.evaluation.keys()


def context(config: Any) -> Context:
    return Context(build(TrainConfig, config.to_dict()), make_mesh("", jax.devices()[:1]))


def test_bad_tasks_are_refused(tmp_path):
    config = small_image_config(tmp_path)
    grey = save(tmp_path / "grey.png", picture()[..., 0])
    field = dataclasses.replace(CFG)
    with pytest.raises(ValueError, match=r"config.task.image is empty"):
        task.MetricGridsImage(field).resident(context(config))
    with pytest.raises(ValueError, match=r"the signal needs 2 and 1: change grid.n_dims"):
        task.MetricGridsImage(field, image=grey).resident(context(config))
    with pytest.raises(ValueError, match=r"the signal needs 3 and 1"):
        task.MetricGridsSdf(field).resident(context(config))
    with pytest.raises(ValueError, match="batches is 0"):
        task.MetricGridsSdf(field, batches=0)
    config.compute_dtype = "bfloat16"
    with pytest.raises(ValueError, match="sines of arguments times 30 need float32"):
        task.MetricGridsImage(field, image=config.task.image).resident(context(config))


def test_drawn_batches_differ_from_step_to_step():
    field = InstantNGP(HashGridConfig(3, 2, 2, 8, 4, 8), 1, hidden=8)
    points, values = sdf.training_points(Torus(), 4, 64, np.random.default_rng(0))
    at = task.Samples(jnp.asarray(points), None)
    chosen = task.InstantNgpSdf(field, batches=4)
    resident = task.Examples(at, jnp.asarray(values))
    drawn = [chosen.generate(jax.random.key(i), 64, resident).targets for i in range(12)]
    assert {int(np.argmax([np.array_equal(d, v) for v in values])) for d in drawn} == {0, 1, 2, 3}
