"""``llmtune train --restarts N``: the parent of a training, which starts it again when it is killed or hangs.

The child is the very same command; it finds the newest verified checkpoint and goes on by itself. The parent loads
neither torch nor transformers, passes signals on, and writes into the run directory only while no child lives.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llmtune.checkpoints import verify
from llmtune.checkpoints.places import committed
from llmtune.console import speaker
from llmtune.errors import ConfigError, Preempted, TrainingError
from llmtune.hardware.processes import SUPERVISOR, follow_parent, is_launched
from llmtune.runs import RunDirectory, is_run
from llmtune.runs.heartbeat import Heartbeat, last_beat
from llmtune.runs.lock import last_holder

# How shells and containers report a process that was ended by SIGKILL (which the kernel sends when memory runs out) and
# by SIGSEGV, where something stands between it and us.
KILLED_CODES = {137: signal.SIGKILL, 139: signal.SIGSEGV}
# Starts without a new step or checkpoint after which another one would be no different.
MOST_WITHOUT_PROGRESS = 2
# Seconds before it is started again; doubled each time, from the beginning after progress.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# How often the child is looked after. What lies between two looks counts for at most twice as much, so that a machine
# that slept is not taken for a child that hangs.
LOOK_SECONDS = 0.2
# How often its run directory is looked for, until it has one.
SEARCH_SECONDS = 1.0
# The child watches itself and says more about it, so it is given this share of `hang_seconds` more, or so many seconds.
GRACE_SHARE, MOST_GRACE_SECONDS = 0.5, 60.0
# Between two signals that are passed on; the child takes one that follows sooner for the echo of the first.
SIGNAL_PAUSE = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What a parent has to know.

    Attributes:
        command: The command line of the training.
        restarts: Most times that it is started again.
        hang_seconds: Without a sign of life for so long, it hangs.
        output: The run directory; None where it is derived.
        root: Folder of derived run directories.
        resume: ``recover.resume`` of the command.
    """

    command: Sequence[str]
    restarts: int
    hang_seconds: float
    output: Path | None
    root: Path
    resume: str = "auto"

    def places(self) -> list[Path]:
        """Where the run may be."""
        if self.output is not None:
            return [self.output]
        return [path for path in self.root.iterdir() if is_run(path)] if self.root.is_dir() else []

    def run_of(self, pid: int) -> RunDirectory | None:
        """The run that the process ``pid`` trains, or trained last; None before it has come so far."""
        for path in self.places():
            holder = last_holder(path)
            if holder is not None and holder.pid == pid and is_run(path):
                return RunDirectory.open(path)
        return None

    def command_again(self, run: RunDirectory | None) -> list[str]:
        """The command that goes on: the same one, unless it says to begin elsewhere than at the newest checkpoint."""
        saved = run is not None and bool(committed(run.checkpoints))
        if run is None or self.resume == "auto" or not (saved or self.resume == "never"):
            return list(self.command)
        return [*self.command, "--resume", "auto", "--output", str(run.path)]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Progress:
    """How far a run has come: the newest checkpoint that verifies, and the last update that was told."""

    checkpoint: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a child ended.

    Attributes:
        code: What the command returns when it is not started again.
        kind: ``killed``, ``hung``, or what the failure report says; None when there is nothing to start again for.
        cause: One sentence.
        reported: Whether the child has written a failure report about it.
    """

    code: int
    kind: str | None = None
    cause: str = ""
    reported: bool = False


@dataclass(slots=True)
class _Record:
    """What the parent remembers from one start to the next."""

    run: RunDirectory | None = None
    progress: Progress = field(default_factory=Progress)
    fruitless: int = 0
    tried: list[str] = field(default_factory=list)


def supervise(job: Supervision) -> int:
    """Train in a child process, and start it again when it is killed or hangs.

    Returns:
        The exit code of the last child: 0 when it is done; errors of usage, data, plan and checkpoints as they are.

    Raises:
        ConfigError: A launcher has started this process, so that others train with it.
        TrainingError: It was started again as often as allowed, or twice without progress.
        OutputError: Another process has taken the run directory.
    """
    if is_launched():
        problem = "restarts one process, and a launcher has started several; let it: torchrun --max-restarts N"
        raise ConfigError("--restarts", [problem])
    seen = _Record(run=RunDirectory.open(job.output) if job.output is not None and is_run(job.output) else None)
    seen.progress = progress_of(seen.run, Progress())
    command = list(job.command)
    with _forwarding() as signals:
        while True:
            reports = _reports(job.places())
            if seen.run is not None:
                Heartbeat(seen.run.path).stop()  # what a dead child promised
            with _started(command) as child:
                frozen = _watch(child, job, signals)
            seen.run = job.run_of(child.pid) or seen.run
            end = _end_of(child.returncode, frozen, job, signals, _new_report(seen.run, reports))
            if end.kind is None:
                return end.code
            _count(seen, end)
            _stop_if_over(seen, end, job)
            pause = min(FIRST_PAUSE * 2.0 ** max(seen.fruitless - 1, 0), LONGEST_PAUSE)
            speaker.warn(f"{end.cause}; it is started again in {pause:g} seconds ({len(seen.tried)} of {job.restarts})")
            _note_restart(seen, end, pause)
            if signals.wait(pause):
                return Preempted.exit_code
            command = job.command_again(seen.run)


def progress_of(run: RunDirectory | None, before: Progress) -> Progress:
    """How far ``run`` has come. Checkpoints that ``before`` has counted are not read again."""
    if run is None:
        return before
    newer = (step for step, path in committed(run.checkpoints) if step > before.checkpoint and verify(path).ok)
    steps = run.steps()
    return Progress(checkpoint=next(newer, before.checkpoint), step=max(before.step, steps[-1]["step"] if steps else 0))


# ---------------------------------------------------------------------- one child


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The child. It has a process group of its own, so that a terminal's Ctrl-C reaches it once, through its parent."""
    child = subprocess.Popen(
        command,
        env=os.environ | {SUPERVISOR: str(os.getpid())},
        process_group=0,
        preexec_fn=functools.partial(_tie, os.getpid()),
    )
    try:
        yield child
    finally:
        if child.poll() is None:  # something is wrong with this process; the child may still save
            child.terminate()
            child.wait()
        if child.returncode < 0:  # its workers may not know yet that it is gone
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def _tie(parent: int) -> None:
    follow_parent()
    if os.getppid() != parent:  # it died before the kernel could be asked
        os._exit(Preempted.exit_code)


def _watch(child: subprocess.Popen[bytes], job: Supervision, signals: _Signals) -> bool:
    """Wait for the end of the child, and pass signals on; True when it gave no sign of life and was killed."""
    patience = job.hang_seconds + min(job.hang_seconds * GRACE_SHARE, MOST_GRACE_SECONDS)
    run: RunDirectory | None = None
    beat: int | None = None
    silence, looked_at, searched_at = 0.0, time.monotonic(), -SEARCH_SECONDS
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_SECONDS)
            return False
        signals.pass_on(child)
        now = time.monotonic()
        silence += min(now - looked_at, 2 * LOOK_SECONDS)
        looked_at = now
        if run is None and now - searched_at >= SEARCH_SECONDS:
            run, searched_at = job.run_of(child.pid), now
        latest = last_beat(run.path) if run is not None else None
        if latest is None or latest != beat:
            beat, silence = latest, 0.0
        elif silence >= patience:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return True


def _end_of(code: int, frozen: bool, job: Supervision, signals: _Signals, report: dict[str, Any]) -> End:
    number = -code if code < 0 else KILLED_CODES.get(code)
    if frozen:
        cause = f"the training gave no sign of life for {job.hang_seconds:g} seconds, and did not end itself"
        return End(code=TrainingError.exit_code, kind="hung", cause=cause)
    if number is not None and signals.received:
        # Before the first handler is in place, a signal that asks to stop simply ends the process.
        return End(code=Preempted.exit_code if number in signals.received else 128 + number)
    if number is not None:
        cause = f"the training was killed by {_signal_name(number)}"
        return End(code=TrainingError.exit_code, kind="killed", cause=cause)
    if report.get("action") == "restart" and code in (1, TrainingError.exit_code) and not signals.received:
        cause = f"the training stopped: {report.get('cause')}"
        return End(code=code, kind=str(report.get("kind")), cause=cause, reported=True)
    return End(code=code)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reports(places: Iterable[Path]) -> set[Path]:
    return {report for place in places for report in (place / "failures").glob("*.json")}


def _new_report(run: RunDirectory | None, before: set[Path]) -> dict[str, Any]:
    """The last failure report of a run that was not there before; empty when there is none."""
    new = sorted(_reports([run.path]) - before) if run is not None else []
    if run is None or not new:
        return {}
    document = run.read_json(f"failures/{new[-1].name}")
    return document if isinstance(document, dict) else {}


# ---------------------------------------------------------------------- from one start to the next


def _count(seen: _Record, end: End) -> None:
    now = progress_of(seen.run, seen.progress)
    advanced = now.checkpoint > seen.progress.checkpoint or now.step > seen.progress.step
    seen.fruitless = 0 if advanced else seen.fruitless + 1
    seen.progress = now
    seen.tried.append(f"{end.cause} (update {now.step}, newest checkpoint {now.checkpoint})")


def _stop_if_over(seen: _Record, end: End, job: Supervision) -> None:
    if seen.fruitless >= MOST_WITHOUT_PROGRESS:
        why = f"{seen.fruitless} starts in a row made no progress"
    elif len(seen.tried) > job.restarts:
        why = f"it was started again {job.restarts} times, which is all that --restarts allows"
    else:
        return
    history = "; ".join(f"{number}. {what}" for number, what in enumerate(seen.tried, start=1))
    message = f"training is given up: {why}. Tried: {history}"
    if seen.run is None:
        raise TrainingError(f"{message}. Nothing was trained yet; try the command without --restarts to see more")
    error = TrainingError(f"{message}. The checkpoints stand; continue with: llmtune resume {seen.run.path}")
    with seen.run.lock():
        report = seen.run.write_failure(
            error,
            kind=end.kind or "killed",
            cause=why,
            evidence={"tried": seen.tried},
            remedy="Look into `dmesg` for the kernel's out-of-memory killer, and into failures/ for stacks and causes.",
        )
        step = seen.progress.step
        seen.run.event("incident", step, kind=end.kind, cause=end.cause)
        seen.run.event("run_failed", step, kind=end.kind, cause=why, failure=str(report.relative_to(seen.run.path)))
        seen.run.end("failed", exit_code=TrainingError.exit_code)
    raise TrainingError(f"{error} Failure report: {report}")


def _note_restart(seen: _Record, end: End, pause: float) -> None:
    if seen.run is None:
        return
    with seen.run.lock():
        step = seen.progress.step
        if not end.reported:
            seen.run.event("incident", step, kind=end.kind, cause=end.cause)
        facts = {"restart": len(seen.tried), "pause_seconds": pause, "checkpoint": seen.progress.checkpoint or None}
        seen.run.event("recovery", step, action="restart", reason=end.cause, **facts)


# ---------------------------------------------------------------------- signals


class _Signals:
    """The signals that ask to stop, kept until they are passed on to the child."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed = 0
        self._passed_at = -SIGNAL_PAUSE

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.received.append(number)

    def pass_on(self, child: subprocess.Popen[bytes]) -> None:
        """Send the child the next signal that it has not been sent, not too soon after the one before."""
        if self._passed < len(self.received) and time.monotonic() - self._passed_at >= SIGNAL_PAUSE:
            child.send_signal(self.received[self._passed])
            self._passed, self._passed_at = self._passed + 1, time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Sleep, and say whether a signal came."""
        until = time.monotonic() + seconds
        while not self.received and (left := until - time.monotonic()) > 0:
            time.sleep(min(LOOK_SECONDS, left))
        return bool(self.received)


@contextmanager
def _forwarding() -> Iterator[_Signals]:
    signals = _Signals()
    before: dict[int, Any] = {number: signal.signal(number, signals.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_command() -> list[str]:
    """The command line of this process, to be started again as it is."""
    return [sys.executable, *sys.orig_argv[1:]]
