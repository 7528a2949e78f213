"""One process trains into a run directory at a time; a lock left by a dead process does not count."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmtune.errors import OutputError
from llmtune.runs.documents import encode, write_atomically
from llmtune.runs.events import now

LOCK_NAME, HOLDER_NAME = ".lock", ".lock.json"

# Those who only look (``is_held``) take the lock for an instant; a run that starts waits for them to let go.
_PATIENCE_SECONDS = 0.5


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    The operating system drops the lock when its holder dies, however it dies.

    Raises:
        OutputError: A living process holds it, or the directory cannot be written; names which.
    """
    lock = FileLock(directory / LOCK_NAME, timeout=_PATIENCE_SECONDS)
    holder = directory / HOLDER_NAME
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{directory} is in use: {_describe(holder)} is training into it. Wait until it ends, stop it, or "
            "choose another --output."
        ) from None
    except OSError as error:
        raise OutputError(f"cannot lock {directory}: {error}. Choose an --output that you may write to.") from error
    try:
        facts = {"pid": os.getpid(), "host": platform.node(), "started": now()}
        write_atomically(holder, encode(facts), durable=False)
        yield
    finally:
        holder.unlink(missing_ok=True)
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


def _describe(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_bytes())
        return f"process {facts['pid']} on {facts['host']}, since {facts['started']},"
    except (OSError, ValueError, KeyError):
        return "another process"
