"""Two sides of a speed comparison: worker processes that train by turns, on the same rows, watched for disturbance."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_cases import OWN, Row

OTHERS_LIMIT = 5.0  # percent of all processors that other programs may take during a sample
LOSS_TOLERANCE = 0.005  # relative, of each of the first updates: bf16 rounds a number by up to 0.4 %
CHECKED_UPDATES = 3
TRIES_PER_PAIR = 2


class SideFailedError(Exception):
    """A side cannot be measured; the message says why."""


class OutOfMemoryError(SideFailedError):
    """It was killed, which the system does when memory runs out."""


# ── one side ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Side:
    """A worker process. It runs only inside `running`; otherwise the system has stopped it.

    Args:
        command: The program; it speaks JSON lines.
        log: File for all it writes to stderr.
        patience: Seconds that one answer may take.
    """

    def __init__(self, command: Sequence[str], *, log: Path, env: dict[str, str], patience: float) -> None:
        self._log, self._patience = log, patience
        self._lines: queue.Queue[str | None] = queue.Queue()
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                text=True,
                start_new_session=True,
            )
        with suppress(OSError):  # it ended already
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("800", encoding="ascii")
        threading.Thread(target=self._read, daemon=True).start()
        began = time.perf_counter()
        try:
            self.ready = self._answer()
        except BaseException:
            self.end()
            raise
        self.ready["seconds"] = time.perf_counter() - began
        self._signal(signal.SIGSTOP)

    @property
    def session(self) -> int:
        return self._process.pid

    def steps(self, number: int) -> dict[str, Any]:
        """Do so many updates; what they took.

        Raises:
            SideFailedError: The process ended, or said nothing for too long.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": "steps", "n": number}) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            raise self._death() from None
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """Kill the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                assert stream is not None
                stream.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed by `end`
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._patience)
        except queue.Empty:
            raise SideFailedError(f"no answer within {self._patience:.0f} s") from None
        if line is None:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> SideFailedError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return OutOfMemoryError("killed by the system, which does so when memory runs out")
        said = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = said[-1].strip()[:300] if said else "without a word"
        return (OutOfMemoryError if "out of memory" in last else SideFailedError)(f"ended with code {code}: {last}")


@contextmanager
def started(command: Sequence[str], **how: Any) -> Iterator[Side]:
    """A side that is ended in any case."""
    side = Side(command, **how)
    try:
        yield side
    finally:
        side.end()


# ── how busy the machine is with other things ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ticks:
    """Processor time so far: of the whole machine, and of these sessions and this process; and the clock."""

    busy: int
    own: int
    seconds: float

    @classmethod
    def now(cls, sessions: Sequence[int]) -> Ticks:
        user, nice, system, _idle, _iowait, *interrupts = _numbers("/proc/stat")[:8]
        own = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with suppress(OSError):  # it ended meanwhile
                    fields = Path(entry.path, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                    if int(fields[3]) in sessions or int(entry.name) == os.getpid():
                        own += sum(map(int, fields[11:15]))  # its own, and of children it has waited for
        return cls(user + nice + system + sum(interrupts), own, time.monotonic())

    def others_since(self, before: Ticks) -> float:
        """Percent of all processors that went to others."""
        elapsed = (self.seconds - before.seconds) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return 100 * max(0, (self.busy - before.busy) - (self.own - before.own)) / max(elapsed, 1)


def _numbers(path: str) -> list[int]:
    with open(path, encoding="ascii") as file:
        return [int(word) for word in file.readline().split()[1:]]


def sample(side: Side, steps: int) -> dict[str, Any]:
    """Updates of one side, and the percent of the processors that others took meanwhile."""
    before = Ticks.now([side.session])
    taken = side.steps(steps)
    return taken | {"others_percent": Ticks.now([side.session]).others_since(before)}


# ── two sides ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How a comparison is made: so many pairs of samples of ``steps`` updates, after ``warm`` updates untimed."""

    pairs: int
    steps: int
    warm: int
    others_limit: float = OTHERS_LIMIT
    checked: int = CHECKED_UPDATES

    @property
    def most_updates(self) -> int:
        """Updates that a worker may be asked for in all."""
        return self.checked + self.warm + TRIES_PER_PAIR * self.pairs * self.steps


class Expected:
    """What the next updates of a side must have seen, so that truncated or missing rows do not look fast."""

    def __init__(self, rows: Sequence[Row], batch: int) -> None:
        self._rows, self._batch, self._done = rows, batch, 0

    def take(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """The answer with the lengths of its rows.

        Raises:
            SideFailedError: Tokens or supervised tokens are others.
        """
        count = len(found["losses"])
        rows = self._rows[self._done * self._batch : (self._done + count) * self._batch]
        self._done += count
        lengths, supervised = [len(row.input_ids) for row in rows], sum(row.supervised for row in rows)
        if found["tokens"] != sum(lengths):
            raise SideFailedError(f"{name} saw {found['tokens']:,} tokens in rows that have {sum(lengths):,}")
        if found["supervised"] not in (supervised, 0):  # 0: the driver does not see labels
            raise SideFailedError(f"{name} learned {found['supervised']:,} tokens instead of {supervised:,}")
        return found | {"lengths": lengths, "supervised": supervised}


def deviation(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference of the losses of the first updates."""
    assert losses, "no update was done"
    return max(abs(own - other) / abs(other) for own, other in zip(losses, reference, strict=True))


def compare(
    own: Side, peer: Side, name: str, rows: Sequence[Row], batch: int, reference: Sequence[float], how: Protocol
) -> dict[str, Any]:
    """Check the losses of both, then time both by turns.

    Returns:
        ``start`` and ``pairs``, the undisturbed ones; ``rejected``: how many were measured again.

    Raises:
        SideFailedError: A side fails, learns something else, or every pair was disturbed.
    """
    sides = {OWN: own, name: peer}
    expected = {side: Expected(rows, batch) for side in sides}
    start: dict[str, Any] = {}
    for each, side in sides.items():
        first = expected[each].take(each, side.steps(how.checked))
        off = deviation(first["losses"], reference)
        start[each] = {"ready": side.ready, "first": first, "loss_deviation": off}
        if off > LOSS_TOLERANCE:
            raise SideFailedError(f"the loss of {each} leaves that of the fp32 Trainer by {100 * off:.2f} %")
    for each, side in sides.items():
        if how.warm:
            expected[each].take(each, side.steps(how.warm))
    pairs: list[dict[str, Any]] = []
    rejected = []
    for _ in range(TRIES_PER_PAIR * how.pairs):
        pair = {each: expected[each].take(each, sample(side, how.steps)) for each, side in sides.items()}
        others = max(taken["others_percent"] for taken in pair.values())
        if others > how.others_limit:
            rejected.append(others)
            continue
        pairs.append({"own": pair[OWN], "peer": pair[name], "ratio": rate(pair[OWN]) / rate(pair[name])})
        if len(pairs) == how.pairs:
            break
    if not pairs:
        raise SideFailedError(f"other programs took {min(rejected):.0f} % or more during every one of the samples")
    return {"start": start, "pairs": pairs, "rejected_others_percent": rejected}


def rate(taken: dict[str, Any]) -> float:
    """Real tokens per second."""
    return float(taken["tokens"] / taken["seconds"])
