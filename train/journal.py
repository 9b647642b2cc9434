"""Finished pieces of a long computation on disk, so that a run that was interrupted goes on."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

SCHEMA = 1


class Journal:
    """A file of JSON lines: what is computed, and then every finished piece by its name.

    A last line that was cut off is dropped. Without a path nothing is kept.

    Args:
        path: the file, begun if it is not there.
        about: what the pieces depend on, as JSON; a file about anything else is refused.

    Raises:
        ValueError: the file is about something else, or damaged before its last line.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | pathlib.Path | None, about: Mapping[str, Any]):
        self.path = None if path is None else pathlib.Path(path)
        self.pieces: dict[str, Any] = {}
        if self.path is None:
            return
        head = json.loads(json.dumps({"schema": SCHEMA, "about": about}))
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(head)
            return
        whole = self.path.read_bytes()
        ended = whole[: whole.rfind(b"\n") + 1]
        if not ended and json.dumps(head).encode().startswith(whole):  # cut off in its first line
            self.path.write_bytes(b"")
            self._append(head)
            return
        try:
            found, *pieces = [json.loads(line) for line in ended.splitlines()]
            self.pieces = {piece["name"]: piece["value"] for piece in pieces}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} is damaged: delete it and begin anew, or name another."
            ) from error
        if found != head:
            raise ValueError(
                f"{self.path} holds pieces of another computation: give the settings that it was "
                "begun with, or another file."
            )
        if ended != whole:
            os.truncate(self.path, len(ended))

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The piece of this name, computed and kept if it is not there; always as JSON gives it."""
        if name not in self.pieces:
            value = json.loads(json.dumps(compute(), allow_nan=False))
            self.pieces[name] = value
            if self.path is not None:
                self._append({"name": name, "value": value})
        return self.pieces[name]

    def _append(self, line: Any) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
