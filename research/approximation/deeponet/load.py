"""Users' own operator data: arrays from ``.npz``, ``.npy``, ``.mat`` and torch files."""

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from jaxtyping import Float

from research.approximation.deeponet.data import Batched, Cartesian, split, take
from research.approximation.deeponet.problems import grid_points

Arrays = dict[str, np.ndarray]
Source = str | Path | Mapping[str, np.ndarray]


def read_arrays(path: str | Path) -> Arrays:
    """All arrays of a file by name; in nested containers names are joined by dots (``a.0.b``).

    Files: ``.npz``, ``.npy`` (its array is called ``data``), ``.mat`` up to version 7, ``.pt`` and
    ``.pth`` (read without torch). Nothing in them is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a damaged file, or a mat file of version 7.3.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):
        from models.torch_archive import read_torch

        found = read_torch(path)
        return _flatten(found) if isinstance(found, dict | list | tuple) else {"data": found}
    try:
        if suffix == ".npy":
            return {"data": np.load(path, allow_pickle=False)}
        if suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if suffix == ".mat":
            found = scipy.io.loadmat(path)
            return {k: v for k, v in found.items() if isinstance(v, np.ndarray)}
    except NotImplementedError as error:  # scipy's word for version 7.3
        raise ValueError(
            f"{path.name} is a mat file of version 7.3: save it with -v7, or as npz."
        ) from error
    except (ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} cannot be read as {suffix}: {error}") from error
    raise ValueError(f"{path.name}: arrays are read from .npz, .npy, .mat, .pt and .pth files.")


def _flatten(tree: Any, prefix: str = "") -> Arrays:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: Arrays = {}
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list | tuple):
            flat |= _flatten(value, f"{name}.")
        elif isinstance(value, np.ndarray):
            flat[name] = value
    return flat


def pick(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array by name.

    Raises:
        ValueError: there is none of that name; says which there are.
    """
    if name not in arrays:
        raise ValueError(f"there is no array {name!r}: there are {', '.join(sorted(arrays))}.")
    return arrays[name]


def load_cartesian(
    source: Source,
    u: Sequence[str],
    s: Sequence[str],
    axes: Sequence[Float[np.ndarray, " _"]] | None = None,
) -> Cartesian:
    """Functions on one grid, from a file or from arrays by name.

    Args:
        source: a file for :func:`read_arrays`, or arrays by name.
        u: names of the input functions (n, ...): each is flattened, several are concatenated.
        s: names of the outputs (n, k1, k2, ...) on one tensor grid: several become the last axis.
        axes: the grid's coordinates, an array per axis after the first of ``s``; by default
            equispaced in [0, 1].

    Raises:
        ValueError: a missing name, axes that do not fit the solutions, sizes that differ.
    """
    arrays = source if isinstance(source, Mapping) else read_arrays(source)
    inputs = [pick(arrays, name) for name in u]
    outputs = [pick(arrays, name) for name in s]
    shape = outputs[0].shape[1:]
    if axes is None:
        axes = [np.linspace(0.0, 1.0, k) for k in shape]
    if tuple(len(axis) for axis in axes) != shape or any(o.shape[1:] != shape for o in outputs):
        raise ValueError(
            f"outputs of shapes {[o.shape for o in outputs]} do not fit axes of lengths "
            f"{[len(axis) for axis in axes]}: give one axis per dimension after the first."
        )
    n = {len(x) for x in (*inputs, *outputs)}
    if len(n) != 1:
        raise ValueError(f"the arrays hold {sorted(n)} functions: give equally many.")
    rows = [x.reshape(len(x), -1).astype(np.float32) for x in inputs]
    values = [x.reshape(len(x), -1).astype(np.float32) for x in outputs]
    joined = values[0] if len(values) == 1 else np.stack(values, axis=-1)
    return Cartesian(np.concatenate(rows, axis=1), grid_points(*axes), joined)


@dataclasses.dataclass(frozen=True)
class FileData:
    """Training and test data on one grid: two files, or one that is split by function."""

    train: str
    u: tuple[str, ...]
    s: tuple[str, ...]
    test: str | None = None

    def load(self, functions: int, test_functions: int, seed: int) -> tuple[Cartesian, Cartesian]:
        """(training, test) functions; 0 stands for all that there are.

        Raises:
            ValueError: fewer functions than asked for; see also :func:`load_cartesian`.
        """
        whole = load_cartesian(self.train, self.u, self.s)
        if self.test is None:
            held_out = test_functions or len(whole.u) // 5
            whole, test = split(whole, held_out, np.random.default_rng(seed))
        else:
            test = load_cartesian(self.test, self.u, self.s)
        return _first(whole, functions), _first(test, test_functions)


def _first(found: Cartesian, count: int) -> Cartesian:
    if count > len(found.u):
        raise ValueError(f"the file has {len(found.u)} functions, asked for {count}: ask for less.")
    return take(found, slice(0, count or None))


def load_batched(source: Source, u: Sequence[str], y: str, s: str) -> Batched:
    """Functions with queries of their own: y (n, q, d) or (n, d), and s (n, q), (n,) or (n, 1).

    Rows of NaN in both y and s are padding.

    Raises:
        ValueError: a missing name, or sizes that differ.
    """
    arrays = source if isinstance(source, Mapping) else read_arrays(source)
    rows = [pick(arrays, name) for name in u]
    inputs = np.concatenate([x.reshape(len(x), -1) for x in rows], axis=1)
    queries, values = pick(arrays, y), pick(arrays, s)
    if queries.ndim == 2:
        queries, values = queries[:, None], values.reshape(len(values), 1)
    if queries.ndim != 3 or values.shape[:2] != queries.shape[:2]:
        raise ValueError(
            f"queries {queries.shape} and values {values.shape} do not fit: give (n, q, d) and "
            "(n, q), or (n, d) and (n,)."
        )
    flat = values.reshape(*values.shape[:2], -1)
    padding = np.isnan(queries).all(axis=-1) & np.isnan(flat).all(axis=-1)
    mask = np.logical_not(np.asarray(padding))
    clean = lambda x: np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, 0.0)
    return Batched(inputs, clean(queries), clean(values), mask)
