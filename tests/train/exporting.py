"""What the tests of export share."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping

from models import decoder
from train.stablehlo import write_stablehlo


@contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Without jaxtyping's checks, which cannot broadcast the symbolic sizes of an export."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def write_programs(folder: pathlib.Path, params: Any, cfg: decoder.Config, *args: Any, **kw: Any):
    """:func:`train.stablehlo.write_stablehlo` with symbolic sizes under the checks of the tests."""
    with unchecked_shapes():
        write_stablehlo(folder, params, cfg, *args, **kw)
