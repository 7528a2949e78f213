"""Notices that a training gives no sign of life any more, says where it hangs, and ends it so that it can go on.

A sign of life is a forward pass, the begin or end of an update, an evaluation, a save. They are counted here for the
thread that watches from within, and touch a file for the process that watches from outside (`llmtune.restarts`), which
sees what no thread can: a process that was frozen, or one that holds the interpreter.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, TypeGuard, TypeVar

import torch
from torch.utils.data._utils import signal_handling
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.errors import TrainingError
from llmtune.hardware.processes import is_supervised
from llmtune.runs import RunDirectory
from llmtune.runs.heartbeat import Heartbeat
from llmtune.training.recovery import classify, write_failure
from llmtune.training.recovery.origin import LOADER

T = TypeVar("T")

# Silence is looked for so often. What lies between two looks counts for at most twice as much, so that a process that
# was stopped and continued, or a machine that slept, is not taken for one that hung.
LOOK_SECONDS = 1.0
# Reports are written to a disk that may hang too; after so long the process ends without them.
REPORT_SECONDS = 20.0


class Watchdog(TrainerCallback):
    """Ends a training that hangs. A callback, and a context that has to be open while training runs.

    A data loader whose workers hang is started again in place, once; see `surviving`.

    Args:
        run: Where stack dump, failure report and incident are written.
        seconds: Without a sign of life for so long, it hangs.
        rank: Number of this process among those that train together; only 0 promises to touch the file.
    """

    def __init__(self, run: RunDirectory, *, seconds: float, rank: int = 0) -> None:
        self._run, self._seconds, self._rank = run, seconds, rank
        self._heartbeat = Heartbeat(run.path) if rank == 0 else None
        self._beats = self._step = 0
        self._loader_killed = False
        self._trained_by = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._hook: Any = None

    # ------------------------------------------------------------------ being open

    def __enter__(self) -> Watchdog:
        self._trained_by = threading.get_ident()
        self._over.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._heartbeat is not None:
            self._heartbeat.stop()
        elif isinstance(error, Exception):
            self._report_lost_rank(error)

    def _report_lost_rank(self, error: Exception) -> None:
        """What ended this rank, if it was the end of another: the main one writes the account, and may be that one."""
        failure = classify(error, step=self._step, phase="step")
        if failure.kind in ("killed", "hung", "hardware"):
            write_failure(self._run, error, failure, action="restart")

    # ------------------------------------------------------------------ signs of life

    def beat(self, *args: Any) -> None:
        """Say that there is life; takes and ignores what a hook of a module is given."""
        self._beats += 1
        if self._heartbeat is not None:
            self._heartbeat.beat()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin to watch; each forward pass of the model is a sign of life from here on."""
        self._step = state.global_step
        if hasattr(train_dataloader, "on_lost_worker"):
            train_dataloader.on_lost_worker = self.loader_restarted
        if self._hook is None and model is not None:
            base: Any = getattr(model, "get_base_model", lambda: model)()
            self._hook = base.register_forward_pre_hook(self.beat)
        self.beat()
        if self._thread is None and not self._over.is_set():
            self._thread = threading.Thread(target=self._watch, name="llmtune-watchdog", daemon=True)
            self._thread.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A sign of life."""
        self.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A sign of life."""
        self._step = state.global_step
        self.beat()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A sign of life."""
        self.beat()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A sign of life."""
        self.beat()

    def loader_restarted(self, cause: str) -> None:
        """Write down that the data loader lost its workers and was started again."""
        self._run.event("incident", self._step, kind="worker", cause=cause)
        self._run.event("recovery", self._step, action="restart_loader", reason=cause)

    # ------------------------------------------------------------------ watching

    def _watch(self) -> None:
        look = min(LOOK_SECONDS, self._seconds / 4)
        seen, silence, looked_at = self._beats, 0.0, time.monotonic()
        while not self._over.wait(look):
            now = time.monotonic()
            silence += min(now - looked_at, 2 * look)
            looked_at = now
            if self._beats != seen:
                seen, silence = self._beats, 0.0
            elif silence >= self._seconds:
                if self._loader_killed or not self._kill_loader():
                    self._end()
                silence = 0.0

    def _kill_loader(self) -> bool:
        """Kill the loader's workers if training waits for them; `surviving` starts the loader again."""
        workers = _workers()
        if not workers or not _is_in(self._trained_by, LOADER):
            return False
        self._loader_killed = True
        cause = f"no data came from {len(workers)} loader workers for {self._seconds:g} seconds; they are killed"
        self._run.write_failure(TrainingError(cause), kind="worker", cause=cause, trace=stack_dump())
        for worker in workers:
            worker.kill()
        return True

    def _end(self) -> None:
        """Write down where it hangs and end the process; nothing that could hang as well is waited for."""
        message = f"no sign of life for {self._seconds:g} seconds after step {self._step}"
        report = threading.Thread(target=self._report, args=(message,), daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        for worker in _workers():
            worker.kill()
        cure = "it is started again" if is_supervised() else f"continue with: llmtune resume {self._run.path}"
        os.write(2, f"\nTrainingError: {message}; the stacks are in {self._run.path}/failures; {cure}\n".encode())
        os._exit(TrainingError.exit_code)

    def _report(self, message: str) -> None:
        run = self._run
        where = "loader" if _is_in(self._trained_by, LOADER) else "step"
        facts = {"seconds": self._seconds, "step": self._step, "rank": self._rank, "where": where}
        remedy = f"llmtune resume {run.path} goes on from the newest checkpoint; --restarts N does so by itself"
        error = TrainingError(message)
        path = run.write_failure(
            error, kind="hung", cause="hung", evidence=facts, remedy=remedy, action="restart", trace=stack_dump()
        )
        report = str(path.relative_to(run.path))
        evidence = {name: value for name, value in facts.items() if name != "step"}
        run.event("incident", self._step, kind="hung", cause="hung", failure=report, **evidence)
        run.event("run_failed", self._step, kind="hung", cause=message, failure=report)
        run.end("failed", exit_code=TrainingError.exit_code)


def _workers() -> list[BaseProcess]:
    """Processes that work for this one and end with it: those of data loaders."""
    return [child for child in multiprocessing.active_children() if child.daemon]


def _is_in(thread: int, module: str) -> bool:
    """Whether a thread is executing something in, or called from, ``module``."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def stack_dump() -> str:
    """Where every thread of this process is now."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "backslashreplace")


def surviving(
    start: Callable[[], Iterator[T]], start_anew: Callable[[], Iterator[T]], lost: Callable[[str], None]
) -> Iterator[T]:
    """The items of a data loader, even if one of its worker processes dies or is killed; once.

    What an epoch holds is decided by its sampler, so that a loader started anew gives the same items: those already
    given are passed over.

    Args:
        start: Starts the loader.
        start_anew: Starts it with new workers.
        lost: Told what happened, before the loader is started anew.

    Raises:
        RuntimeError, OSError, EOFError: A worker died again, or there is none that could have.
    """
    given = 0
    try:
        for item in _quiet_about_children(start):
            yield item
            given += 1
        return
    except (RuntimeError, OSError, EOFError) as error:
        failure = classify(error, step=0, phase="data")
        if failure.kind != "worker":
            raise
        cause = " ".join(f"{failure.cause} ({type(error).__name__}: {error})".split())
    lost(cause)
    for number, item in enumerate(_quiet_about_children(start_anew)):
        if number >= given:
            yield item


def _quiet_about_children(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Start a loader so that the death of a worker is told where the next item is fetched.

    torch's own handler of SIGCHLD, set with the first loader of the process that has workers, raises in the main thread
    wherever that is, be it in the middle of an update.
    """
    items = start()
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and _is_of_torch(handler):

        def quiet(number: int, frame: FrameType | None) -> None:
            with suppress(RuntimeError):
                handler(number, frame)

        signal.signal(signal.SIGCHLD, quiet)
    return items


def _is_of_torch(handler: Any) -> TypeGuard[Callable[[int, FrameType | None], Any]]:
    return getattr(handler, "__module__", None) == signal_handling.__name__
