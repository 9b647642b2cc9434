"""Where prepared corpora and tokens are kept, and how several processes share that folder."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator


def cache_root() -> pathlib.Path:
    """The cache folder: ``LONGREACH_DATA`` if set, else ``~/.cache/longreach``."""
    return pathlib.Path(os.environ.get("LONGREACH_DATA") or "~/.cache/longreach").expanduser()


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a cache folder, so that of several processes one builds and others wait.

    Raises ``OSError`` naming the fix when the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = open(folder.with_name(folder.name + ".lock"), "w")
    except OSError as error:
        raise OSError(
            f"cannot write the data cache {folder.parent} ({error.strerror}): set LONGREACH_DATA "
            "to a writable folder."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_folder(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Fill ``folder`` by ``write(temporary folder)`` and one rename: it is there whole or not.

    The caller holds the lock of ``folder``.
    """
    temporary = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    temporary.mkdir()
    try:
        write(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
