"""The journal and the ledger: append-only JSON lines, one object an event.

A run killed in mid-write leaves at most one torn last line. Readers drop it; a resumed run cuts the file back to the
byte offset in its checkpoint, so that it goes on as an unbroken run would.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pekoe.core.errors import UserError

Event = dict[str, Any]
Listener = Callable[[Event], None]


class JsonLines:
    """An append-only file of JSON objects, flushed at each line and on disk after `sync`. `path` None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (path or Path(os.devnull)).open("ab")

    def append(self, event: Event) -> None:
        self._file.write(json.dumps(event, allow_nan=True, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Write everything through to disk and return the file's length in bytes."""
        self._file.flush()
        if self.path is not None:
            os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, offset: int, discarded: Path) -> int:
        """Move all bytes after `offset` to the file `discarded` (appending), and return how many there were."""
        if self.path is None:
            return 0
        self._file.close()
        with self.path.open("rb+") as file:
            file.seek(offset)
            tail = file.read()
            if tail:
                discarded.parent.mkdir(parents=True, exist_ok=True)
                with discarded.open("ab") as kept:
                    kept.write(tail)
                file.truncate(offset)
                file.flush()
                os.fsync(file.fileno())
        self._file = self.path.open("ab")
        return len(tail)

    def close(self) -> None:
        self._file.close()


class Journal(JsonLines):
    """The run's log of events. Listeners (the live view, trackers) get each event as it is written."""

    def __init__(self, path: Path | None, listeners: tuple[Listener, ...] = ()) -> None:
        super().__init__(path)
        self._listeners = listeners

    def write(self, event: str, **fields: Any) -> None:
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self.append(record)
        for listener in self._listeners:
            listener(record)

    def has(self, event: str, which: Callable[[Event], bool] = lambda _: True) -> bool:
        """Whether such an event is in the file."""
        return self.path is not None and any(one.get("event") == event and which(one) for one in read_lines(self.path))


def ends_at(path: Path, offset: int) -> bool:
    """Whether a line of a file, which may be missing, ends at `offset`; 0: it begins there."""
    if offset == 0:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> Iterator[Event]:
    """Yield the objects of a JSON-lines file; a torn last line (without a newline) is dropped.

    UserError, with the line's number, for any other that is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(line, f"{path}: line {number}")


def _object(line: bytes, where: str) -> Event:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {line[:60]!r}; the file is damaged")
    return cast(Event, value)
