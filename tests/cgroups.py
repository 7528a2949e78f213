"""A memory limit for a command, by a control group of its own: version 1 or 2, where one can be made."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOP = Path("/sys/fs/cgroup")
# Enters the group first, so that all memory of the command is counted from its first byte.
_ENTER = 'echo $$ > "$0"/cgroup.procs && exec "$@"'


class NoMemoryGroupError(Exception):
    """No control group with a memory limit can be made here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A control group that kills what goes above its limit."""

    path: Path
    version: int

    def run(self, command: Sequence[str], **settings: object) -> subprocess.CompletedProcess[str]:
        """Run ``command`` under the limit; its output is captured."""
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            ["sh", "-c", _ENTER, str(self.path), *command], capture_output=True, text=True, check=False, **settings
        )

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        lines = (self.path / ("memory.events" if self.version == 2 else "memory.oom_control")).read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))

    @property
    def major_faults(self) -> int:
        """How many pages had to be read from disk; many mean that the limit has pushed out what was needed again."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("pgmajfault ")))

    @property
    def peak_bytes(self) -> int:
        """The most that was charged to the group at once, page cache included."""
        return int((self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")).read_text())


@contextmanager
def memory_group(limit_bytes: int, top: Path = TOP) -> Iterator[MemoryGroup]:
    """A group with this limit, swap included; it is removed at the end, and what still runs in it is killed.

    Raises:
        NoMemoryGroupError: None can be made here.
    """
    group = _make(top)
    try:
        try:
            if group.version == 2:
                (group.path / "memory.max").write_text(str(limit_bytes))
                _write_if_there(group.path / "memory.swap.max", "0")
            else:
                (group.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
                _write_if_there(group.path / "memory.memsw.limit_in_bytes", str(limit_bytes))
        except OSError as error:
            raise NoMemoryGroupError(f"no limit can be set in {group.path}: {error}") from error
        yield group
    finally:
        _remove(group.path)


def _make(top: Path) -> MemoryGroup:
    """A new group below the top of the hierarchy that limits memory."""
    if (top / "memory" / "memory.limit_in_bytes").exists():
        parent, version = top / "memory", 1
    elif (top / "cgroup.controllers").exists():
        parent, version = top, 2
    else:
        raise NoMemoryGroupError(f"no memory controller is mounted below {top}")
    path = parent / f"llmtune-test-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoMemoryGroupError(f"no group can be made in {parent}: {error}") from error
    if version == 2 and not (path / "memory.max").exists():
        path.rmdir()
        raise NoMemoryGroupError(f"{parent} does not hand the memory controller down to its groups")
    return MemoryGroup(path=path, version=version)


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)


def _remove(path: Path) -> None:
    """Kill what still runs in the group and remove it; the kernel needs a moment after a process has died."""
    for attempt in range(100):
        for process in (path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            path.rmdir()
            return
        except OSError:
            if attempt == 99:
                raise
            time.sleep(0.1)
