"""``events.jsonl``: append-only, one line per event, readable while it is written and after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtune.runs.documents import encode

EVENTS = frozenset(
    {
        "run_started",
        "plan",
        "step",
        "evaluation",
        "sample",
        "checkpoint_saved",
        "checkpoint_rejected",
        "checkpoint_deleted",
        "incident",
        "recovery",
        "early_stop",
        "preempted",
        "run_finished",
        "run_failed",
    }
)


def now() -> str:
    """The present moment as ISO 8601 in UTC: ``2026-01-31T12:00:00.123Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventLog:
    """Appends to and reads one ``events.jsonl``. One process writes at a time; any number read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def append(self, event: str, step: int, fields: dict[str, Any]) -> None:
        """Add one line in a single write.

        Raises:
            OSError: As the system says; a line cut short is removed by the next append.
        """
        assert event in EVENTS, f"{event!r} is no event of the contract"
        line = encode({"time": now(), "event": event, "step": step} | fields) + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not self._whole:
                _end_torn_line(descriptor)
            self._whole = False
            written = os.write(descriptor, line)
            if written < len(line):
                os.write(descriptor, line[written:])
            self._whole = True
        finally:
            os.close(descriptor)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every whole line, in the order written; lines torn by a crash are passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if (event := _parse(line)) is not None:
                    yield event

    def last_by_step(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind of event by rising step, of the course that the run took at last.

        A run that goes on from an earlier step does the later ones again: what they said does not count any more.
        """
        course: dict[int, dict[str, Any]] = {}
        for entry in self:
            if (start := _goes_on_from(entry)) is not None:
                course = {step: earlier for step, earlier in course.items() if step <= start}
            elif entry["event"] == event:
                course[entry["step"]] = entry
        return [course[step] for step in sorted(course)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # torn: half a line, or the zeros that a power failure leaves
        return None
    whole = isinstance(entry, dict) and "event" in entry and isinstance(entry.get("step"), int)
    return entry if whole else None


def _goes_on_from(entry: dict[str, Any]) -> int | None:
    """The step that a run goes on from where this event tells of it."""
    if entry["event"] == "run_started":
        return int(entry["step"])
    if entry["event"] == "recovery" and entry.get("action") == "roll_back":
        return int(str(entry["checkpoint"]).rpartition("-")[2])
    return None


def _end_torn_line(descriptor: int) -> None:
    """Cut away what follows the last newline, unless it is a whole event that only lacks its newline."""
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start > 0 and b"\n" not in tail:
        step = min(65536, start)
        start -= step
        os.lseek(descriptor, start, os.SEEK_SET)
        tail = os.read(descriptor, step) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return
    if _parse(torn) is not None:
        os.write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, size - len(torn))
