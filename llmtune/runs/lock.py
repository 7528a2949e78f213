"""One process trains into a run directory at a time; a lock left by a dead process does not count."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from llmtune.errors import OutputError
from llmtune.runs.documents import encode, write_atomically
from llmtune.runs.events import now

LOCK_NAME, HOLDER_NAME = ".lock", ".lock.json"

# Those who only look (``is_held``) take the lock for an instant; a run that starts waits for them to let go.
_PATIENCE_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds the lock of a run directory, or held it last.

    Attributes:
        started: When it took the lock, ISO 8601 in UTC.
    """

    pid: int
    host: str
    started: str


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    The operating system drops the lock when its holder dies, however it dies. Who held it last stays written down.

    Raises:
        OutputError: A living process holds it, or the directory cannot be written; names which.
    """
    lock = FileLock(directory / LOCK_NAME, timeout=_PATIENCE_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{directory} is in use: {_describe(directory)} is training into it. Wait until it ends, stop it, or "
            "choose another --output."
        ) from None
    except OSError as error:
        raise OutputError(f"cannot lock {directory}: {error}. Choose an --output that you may write to.") from error
    try:
        facts = {"pid": os.getpid(), "host": platform.node(), "started": now()}
        write_atomically(directory / HOLDER_NAME, encode(facts), durable=False)
        yield
    finally:
        lock.release()


def is_held(directory: Path) -> bool:
    """Whether a living process holds the lock of a run directory."""
    if not (directory / LOCK_NAME).exists():
        return False
    lock = FileLock(directory / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def last_holder(directory: Path) -> Holder | None:
    """Who took the lock of a run directory last, dead or alive; None where nobody has."""
    try:
        facts = json.loads((directory / HOLDER_NAME).read_bytes())
        return Holder(pid=int(facts["pid"]), host=str(facts["host"]), started=str(facts["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(directory: Path) -> str:
    holder = last_holder(directory)
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.started},"
