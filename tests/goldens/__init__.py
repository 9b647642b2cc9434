"""Golden vectors: arrays that other implementations computed, one folder per method.

The folder is ``tests/goldens/data`` or the one that ``LONGREACH_GOLDENS`` names. Files elsewhere
may have other sizes under the same keys, so tests read every size from the arrays.
"""

import os
import pathlib

import numpy as np
import pytest


def golden(method: str, file: str) -> dict[str, np.ndarray]:
    """The arrays of ``<folder>/<method>/<file>.npz`` by name.

    Skips the calling test if the method's folder is absent from the goldens.

    Raises:
        FileNotFoundError: the goldens folder or the file inside the method's folder is missing.
    """
    default = pathlib.Path(__file__).parent / "data"
    root = pathlib.Path(os.environ.get("LONGREACH_GOLDENS") or default)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no goldens folder {root}: set LONGREACH_GOLDENS to an existing one."
        )
    folder = root / method
    if not folder.is_dir():
        pytest.skip(f"no golden vectors for {method} in {root}")
    path = folder / f"{file}.npz"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.npz")))
        raise FileNotFoundError(f"no golden file {path}: {method} has {names}.")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
