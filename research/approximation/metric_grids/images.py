"""Images as signals: files to values in [0, 1], pixels to coordinates in [-1, 1]^2."""

import pathlib

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image, UnidentifiedImageError

MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "I;16": "I;16", "I;16B": "I;16"}
"""Pillow's modes that are read, and what they are read as."""


def load_image(path: str | pathlib.Path) -> Float32[np.ndarray, "height width channels"]:
    """Values in [0, 1]: three channels for colour, one for grey; pixels as stored.

    8-bit colour, palette, grey, black and white, and 16-bit grey are read. An alpha channel is
    dropped if it is opaque everywhere.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no image, or one that would lose something: transparency, 16-bit colour (which
            Pillow would cut to 8 bits), other colour spaces, several frames.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}: check the path.")
    try:
        with Image.open(path) as image:
            return _values(image, path.name)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path.name} is no image that Pillow can read.") from error


def _values(image: Image.Image, name: str) -> np.ndarray:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"{name} has {getattr(image, 'n_frames', 1)} frames: save one alone.")
    # Pillow says how it will decode a file: a 16-bit colour PNG is RGB;16B, opened as 8-bit RGB.
    coding = "".join(str(tile.args) for tile in getattr(image, "tile", ()))
    if image.mode in ("RGB", "RGBA", "LA") and "16" in coding:
        raise ValueError(
            f"{name} has 16 bits per colour or an alpha channel of 16 bits, which would be cut to "
            "8: convert it to 8 bits, or to 16-bit grey, yourself."
        )
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise ValueError(f"{name} has transparent pixels: flatten it onto a background first.")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode not in MODES:
        raise ValueError(
            f"{name} is of Pillow's mode {image.mode}: convert it to 8-bit RGB or to grey."
        )
    wanted = MODES[image.mode]
    values = np.asarray(
        image if image.mode == wanted or wanted == "I;16" else image.convert(wanted)
    )
    scale = 65535 if wanted == "I;16" else 255
    values = values.astype(np.float32) / np.float32(scale)
    return values if values.ndim == 3 else values[..., None]


def pixel_centres(height: int, width: int) -> Float32[np.ndarray, "pixels 2"]:
    """Coordinates (x, y) of all pixels' centres, row by row: the borders are at -1 and 1.

    Raises:
        ValueError: an image without pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} has no pixels.")
    x = (2 * np.arange(width) + 1) / width - 1
    y = (2 * np.arange(height) + 1) / height - 1
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    return grid.reshape(-1, 2).astype(np.float32)


def psnr(values: Float[np.ndarray, "*shape"], target: Float[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB of values clipped to [0, 1]; infinite if they are equal."""
    error = np.mean((np.clip(values, 0, 1).astype(np.float64) - target) ** 2)
    return float(-10 * np.log10(error)) if error > 0 else float("inf")
