"""Images from files and made on the spot."""

import gzip
import pathlib

import numpy as np
import pytest

from train.data.images import DIRECTIONS, load_images, make_textures


def idx(array: np.ndarray) -> bytes:
    """An array in MNIST's format."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def test_mnist_format(tmp_path: pathlib.Path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "few-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(values)))
    (tmp_path / "few-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([7, 0]))))
    found = load_images(str(path))
    np.testing.assert_allclose(found.values[..., 0], values / 255, rtol=1e-6)
    assert found.labels.tolist() == [7, 0]
    path.write_bytes(gzip.compress(idx(values)[:-1]))
    with pytest.raises(ValueError, match=r"is cut off: it tells \(2, 3, 4\) and has 23 bytes"):
        load_images(str(path))
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="holds no images and labels"):
        load_images(str(path))


def test_arrays(tmp_path: pathlib.Path):
    values = np.full((3, 2, 2, 3), 255, np.uint8)
    np.savez(tmp_path / "a.npz", images=values, labels=np.array([1, 2, 3]))
    found = load_images(str(tmp_path / "a.npz"))
    assert found.values.shape == (3, 2, 2, 3) and found.values.max() == 1
    np.savez(tmp_path / "b.npz", images=values.astype(np.float32), labels=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="float32, and labels of"):
        load_images(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", images=values)
    with pytest.raises(ValueError, match="holds no images and labels"):
        load_images(str(tmp_path / "c.npz"))


@pytest.mark.parametrize("name", ["textures:5", "textures:0:8", "textures:a:8"])
def test_names_are_checked(name: str):
    with pytest.raises(ValueError, match="must be textures:COUNT:SIZE"):
        load_images(name)
    with pytest.raises(FileNotFoundError, match="there are no images nowhere"):
        load_images("nowhere")


def test_textures_tell_their_halves():
    found = load_images("textures:300:12")
    assert found.values.shape == (300, 12, 12, 1) and found.values.dtype == np.float32
    assert set(found.labels.tolist()) == set(range(DIRECTIONS**2))
    np.testing.assert_array_equal(found.values, make_textures(300, 12).values)
    # Stripes of direction 0 vary along a row, not down a column: per half.
    change = np.abs(np.diff(found.values[..., 0], axis=1)).mean(1)
    for label, columns in zip(found.labels, change, strict=True):
        left, right = divmod(int(label), DIRECTIONS)
        assert (columns[:6].mean() < 0.15) == (left == 0)
        assert (columns[6:].mean() < 0.15) == (right == 0)


def test_splits_are_always_the_same_and_apart():
    images = load_images("textures:20:8")
    train, rest = images.split(5)
    assert len(train) == 15 and len(rest) == 5
    keys = [image.tobytes() for part in (train, rest) for image in part.values]
    assert set(keys) == {image.tobytes() for image in images.values} and len(set(keys)) == 20
    np.testing.assert_array_equal(images.split(5)[1].labels, rest.labels)
    for count in (0, 20):
        with pytest.raises(ValueError, match="leave some on both sides"):
            images.split(count)
