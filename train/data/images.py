"""Labelled images: from files, or textures made on the spot."""

import dataclasses
import gzip
import pathlib

import numpy as np
from jaxtyping import Float32, Int32

from train.data.packing import permutation

TEXTURES = "textures"
DIRECTIONS = 3
"""Directions of stripes; a texture has one on its left and one on its right half."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Values in [0, 1] and labels from 0."""

    values: Float32[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, held_out: int) -> tuple["Images", "Images"]:
        """Those to train on and ``held_out`` others, always the same.

        Raises:
            ValueError: nothing would be left to train on, or nothing held out.
        """
        if not 0 < held_out < len(self):
            raise ValueError(
                f"held_out is {held_out} of {len(self)} images: leave some on both sides."
            )
        order = permutation(0, 0, len(self))
        parts = order[held_out:], order[:held_out]
        train, rest = (Images(self.values[part], self.labels[part]) for part in parts)
        return train, rest


def load_images(name: str) -> Images:
    """Images by name.

    ``textures:COUNT:SIZE`` are made on the spot; ``FILE.npz`` holds ``images`` (n, h, w) or
    (n, h, w, c) as bytes and ``labels``; ``...images-idx3-ubyte[.gz]`` is in MNIST's format, with
    its labels in the file of the same name with ``labels-idx1``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or a name of another form.
    """
    if name.startswith(f"{TEXTURES}:"):
        sizes = name.split(":")[1:]
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(f"{name!r} must be textures:COUNT:SIZE, as textures:2000:16.")
        return make_textures(int(sizes[0]), int(sizes[1]))
    path = pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there are no images {name}: give textures:COUNT:SIZE or a file.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                values, labels = arrays["images"], arrays["labels"]
        else:
            values = _read_idx(path)
            labels = _read_idx(path.with_name(path.name.replace("images-idx3", "labels-idx1")))
    except (KeyError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} holds no images and labels ({error}).") from error
    if values.ndim not in (3, 4) or values.dtype != np.uint8 or labels.shape != (len(values),):
        raise ValueError(
            f"{path.name} holds images of {values.shape}, {values.dtype}, and labels of "
            f"{labels.shape}: give (n, h, w) or (n, h, w, c) bytes and n labels."
        )
    values = values if values.ndim == 4 else values[..., None]
    return Images(values.astype(np.float32) / np.float32(255), labels.astype(np.int32))


def _read_idx(path: pathlib.Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: a magic number, sizes, bytes."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise ValueError(f"{path.name} is not in MNIST's format of bytes: fetch it again.")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4).tolist())
    body = data[4 + 4 * len(shape) :]
    if len(body) != np.prod(shape):
        raise ValueError(f"{path.name} is cut off: it tells {shape} and has {len(body)} bytes.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def make_textures(count: int, size: int, seed: int = 0) -> Images:
    """Noisy stripes, whose directions on the left and on the right half make the label.

    The same stripes on exchanged halves are another class, so that places matter.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, DIRECTIONS**2, count)
    sides = np.stack(np.divmod(labels, DIRECTIONS), 1)  # left, right
    at = (np.arange(size) + 0.5) / size
    right = (at >= 0.5).astype(int)
    angle = np.pi / DIRECTIONS * sides[:, right]  # (n, columns)
    wave = rng.uniform(4, 6, (count, 1, 1)) * 2 * np.pi
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    along = at[None, None, :] * np.cos(angle)[:, None] + at[None, :, None] * np.sin(angle)[:, None]
    values = 0.5 + 0.4 * np.sin(wave * along + phase) + 0.1 * rng.normal(size=along.shape)
    values = np.clip(values, 0, 1)[..., None].astype(np.float32)
    return Images(values, labels.astype(np.int32))
