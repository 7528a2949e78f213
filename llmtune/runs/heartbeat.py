"""A file that is touched while a training is alive, so that another process can tell work from silence."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT_NAME = ".heartbeat"

# The file is touched at most this often: a touch costs some microseconds, and nobody looks closer than that.
_EVERY_SECONDS = 1.0


class Heartbeat:
    """Touches the file of one run directory. The file is there only while somebody promises to touch it.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / HEARTBEAT_NAME
        self._touched_at = -_EVERY_SECONDS

    def beat(self) -> None:
        """Say that there is life. A disk that is full or gone says nothing, and is told by those who write results."""
        now = time.monotonic()
        if now - self._touched_at < _EVERY_SECONDS:
            return
        self._touched_at = now
        with suppress(OSError):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                self._path.touch()

    def stop(self) -> None:
        """Promise no more."""
        self._touched_at = -_EVERY_SECONDS
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def last_beat(directory: Path) -> int | None:
    """A number that changes with every beat; None where nobody promises to be alive.

    It is a time of the system's clock, which may be set: compare it with an earlier one, never with the present.
    """
    try:
        return os.stat(directory / HEARTBEAT_NAME).st_mtime_ns
    except OSError:
        return None
