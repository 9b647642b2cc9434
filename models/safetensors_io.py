"""Safetensors files read with suspicion and written whole or not at all.

A checkpoint is one file, or shards under an index. Tensors are read one at a time, so that memory
holds the parameter being built and not the file.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.params import path_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 2 << 30

DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors of a checkpoint, whatever file holds them."""

    @property
    def label(self) -> str:
        """What error messages call it, usually its path."""
        ...

    def names(self) -> list[str]:
        """All tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32, float16 or bfloat16."""
        ...


class Safetensors:
    """The safetensors checkpoint of a directory as a :class:`TensorSource`.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a truncated or corrupt file, an index that points outside the directory, or
            disagreement between the index and the shards.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        self._file_of: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.is_file() and index.is_file():
            raise ValueError(f"{self.directory} has both {SINGLE} and {INDEX}: remove one of them.")
        if index.is_file():
            self._add_shards(index)
        elif single.is_file():
            self._add(single)
        else:
            pickled = sorted(p.name for p in self.directory.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{hint}.")

    @property
    def label(self) -> str:
        """The directory."""
        return str(self.directory)

    def names(self) -> list[str]:
        """All tensor names, in the order of the files."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype.

        Raises:
            ValueError: a dtype other than float32, float16 or bfloat16.
        """
        if self._dtypes[name] not in DTYPES:
            raise ValueError(
                f"tensor {name} in {self._file_of[name]} is {self._dtypes[name]}: only "
                f"{', '.join(DTYPES)} are supported, so convert the checkpoint first."
            )
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name)

    def _add(self, path: pathlib.Path) -> list[str]:
        with _opened(path) as file:
            names = list(file.keys())
            for name in names:
                if name in self._file_of:
                    raise ValueError(
                        f"tensor {name} is in both {self._file_of[name].name} and {path.name} of "
                        f"{self.directory}: remove one of them."
                    )
                part = file.get_slice(name)
                self._file_of[name] = path
                self._shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = part.get_dtype()
        return names

    def _add_shards(self, index: pathlib.Path) -> None:
        weight_map = _read_index(index)
        for shard in dict.fromkeys(weight_map.values()):
            held = set(self._add(_shard_path(index, shard)))
            listed = {name for name, file in weight_map.items() if file == shard}
            if absent := sorted(listed - held):
                raise ValueError(
                    f"{index} lists tensor {absent[0]} in {shard}, which does not hold it "
                    f"({len(absent)} such): fetch the index and the shards again."
                )
            if extra := sorted(held - listed):
                raise ValueError(
                    f"{shard} holds tensor {extra[0]}, which {index} does not list for it "
                    f"({len(extra)} such): fetch the index and the shards again."
                )


@contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}): fetch or export it again."
        ) from error


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """The map from tensor name to file name.

    Raises:
        ValueError: not an index, or a tensor listed twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1} if keys else ()):
            raise ValueError(f"{twice[0]} is listed twice")
        return dict(pairs)

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
        weight_map = weight_map["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must map tensor names to file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a usable index ({error}): fetch it again.") from error
    return weight_map


def _shard_path(index: pathlib.Path, shard: str) -> pathlib.Path:
    """Where a shard lies; it may not leave the directory by name or by link.

    The one link followed outward is that of the Hugging Face cache, whose snapshots/<commit>/
    folders hold links into the blobs/ folder of the same model.
    """
    folder = index.parent
    path = folder / shard
    target, root = path.resolve(), folder.resolve()
    inside = target.is_relative_to(root)
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    plain = shard and pathlib.PurePath(shard).name == shard and "\\" not in shard
    if not plain or not (inside or cached):
        raise ValueError(
            f"{index} names shard {shard!r}, which lies outside its folder: put the shards beside "
            "the index and name them without a path."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{index} names shard {shard}, which is missing: fetch it too.")
    return path


def check_new(directory: str | pathlib.Path) -> None:
    """Raise FileExistsError if the directory exists and is not empty."""
    target = pathlib.Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty: choose a new folder or remove it first.")


@contextmanager
def new_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill that appears under its name only when the block ends without an error.

    Raises:
        FileExistsError: the directory exists and is not empty.
        OSError: it cannot be written, as on a full disk or a read-only folder.
    """
    target = pathlib.Path(directory).absolute()
    check_new(target)
    scratch = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield scratch
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError | FileExistsError):
            raise
        raise OSError(
            f"{target} could not be written ({error}): free some space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch, ignore_errors=True)


def write_checkpoint(
    folder: pathlib.Path,
    tensors: Iterable[tuple[str, int, Callable[[], np.ndarray]]],
    max_shard_bytes: int,
) -> None:
    """Write tensors given as (name, bytes, function that makes it): one file, or shards.

    Shards are cut in the order given, each up to ``max_shard_bytes`` (a larger tensor has a shard
    of its own), and only one shard is in memory at a time.

    Raises:
        ValueError: ``max_shard_bytes`` is not positive.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}.")
    shards: list[list[tuple[str, int, Callable[[], np.ndarray]]]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor[1] > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor[1]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in shard}
        arrays = {tensor: np.ascontiguousarray(make()) for tensor, _, make in shard}
        save_arrays(arrays, folder / name)
    if len(shards) > 1:
        total = sum(size for shard in shards for _, size, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_tree(folder: pathlib.Path, tree: Any, dtype: Any = jnp.float32) -> None:
    """Write a tree of parameters under the names of its leaves, in ``dtype``.

    Raises:
        OSError: the folder cannot be written.
    """
    size = np.dtype(dtype).itemsize
    tensors = [
        (_leaf(path), math.prod(leaf.shape) * size, lambda leaf=leaf: np.asarray(leaf, dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    write_checkpoint(folder, tensors, MAX_SHARD_BYTES)


def read_tree(directory: str | pathlib.Path, specs: Any) -> Any:
    """Float32 parameters in the structure of ``specs``, as :func:`write_tree` wrote them.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: a missing or superfluous tensor, one of another shape, or a damaged file.
    """
    source = Safetensors(directory)
    wanted = {_leaf(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(specs)}
    if odd := sorted(wanted.keys() ^ set(source.names())):
        state = "missing from" if odd[0] in wanted else "not expected in"
        raise ValueError(
            f"tensor {odd[0]} is {state} {directory}, whose settings describe another model: save "
            "it again."
        )
    for name, spec in wanted.items():
        if source.shape(name) != tuple(spec.shape):
            raise ValueError(
                f"tensor {name} in {directory} has shape {source.shape(name)}, its settings ask "
                f"for {tuple(spec.shape)}: save it again."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: jnp.asarray(source.read(_leaf(path)), jnp.float32), specs
    )


def _leaf(path: tuple) -> str:
    return path_name(path).lstrip(".")


def save_arrays(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Write one file with the permissions that any new file gets (the library makes it private)."""
    save_file(arrays, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
