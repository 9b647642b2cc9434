"""Checkpoints: the state, the position of the data iterator, and what they belong to."""

import errno
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.config import first_difference
from train.state import TrainState

SCHEMA = 1


class Checkpoints:
    """The checkpoints of one run, in ``folder/checkpoints``; each appears whole or not at all.

    What a killed process left half-written is removed on opening. On accelerators writing goes on
    in the background; on CPU the host copy would share memory with the donated state, so
    :meth:`save` returns when the files are there.
    """

    def __init__(self, folder: pathlib.Path, keep: int):
        self._folder = folder.absolute() / "checkpoints"
        with clear_disk_errors(self._folder):
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.LatestN(keep),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=jax.default_backend() != "cpu",
                ),
            )

    def latest_step(self) -> int | None:
        """Update number of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, data: grain.DatasetIterator | None, record: Mapping
    ) -> None:
        """Write a checkpoint after ``step`` updates; ``record`` is JSON (config, hashes, metrics).

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        items = {
            "state": ocp.args.StandardSave(state),
            "record": ocp.args.JsonSave({"schema": SCHEMA, **record}),
        }
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)  # type: ignore[call-arg]
        with clear_disk_errors(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def read_record(self, step: int, config: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a checkpoint, after checking that it belongs to ``config``.

        Raises:
            ValueError: it is of another config (naming the first key that differs), of another
                version of this format, or damaged.
        """
        with self._clear_damage(step):
            args = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = dict(self._manager.restore(step, args=args)["record"])
        if record.get("schema") != SCHEMA:
            raise ValueError(
                f"the checkpoint in {self._folder / str(step)} has format {record.get('schema')}, "
                f"this version reads {SCHEMA}: use the version that wrote it, or a new --workdir."
            )
        if difference := first_difference(record["config"], config):
            raise ValueError(
                f"the checkpoint in {self._folder} is of another config: {difference}; "
                "restore that value or choose a new --workdir."
            )
        return record

    def restore(
        self, step: int, abstract: TrainState, data: grain.DatasetIterator | None
    ) -> TrainState:
        """The state of a checkpoint in the shardings of ``abstract``; sets the data iterator.

        Raises:
            ValueError: files of the checkpoint are missing or damaged.
        """
        items = {"state": ocp.args.StandardRestore(abstract)}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)  # type: ignore[call-arg]
        with self._clear_damage(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))["state"]

    def wait(self) -> None:
        """Return when everything that was saved is on disk.

        Raises:
            OSError: the disk became full while writing in the background.
        """
        with clear_disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release the manager's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextmanager
    def _clear_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises many kinds for missing and truncated files
            raise ValueError(
                f"the checkpoint {self._folder / str(step)} cannot be read ({_first_line(error)}): "
                "remove that folder to go on from the one before it."
            ) from error


@contextmanager
def clear_disk_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one sentence that says what to do."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            text = str(cause)
            code = cause.errno if isinstance(cause, OSError) else None
            if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
                raise OSError(
                    errno.ENOSPC,
                    f"the disk of {folder} is full: free some space and run the same command "
                    "again, it goes on from the last complete checkpoint",
                ) from error
            if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
                raise OSError(
                    code, f"cannot write in {folder}: give a writable folder as --workdir"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
