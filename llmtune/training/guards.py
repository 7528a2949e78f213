"""Callbacks that may stop or delete: signals, early stopping, checkpoint clean-up. They do not catch their errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from llmtune.checkpoints import retain
from llmtune.console import speaker
from llmtune.errors import Preempted
from llmtune.hardware.processes import handling, is_supervised
from llmtune.runs import RunDirectory

# A scheduler signals every process of a job: the parent that restarts this one, which passes it on, and this one too.
ECHO_SECONDS = 1.0


class StopSignal:
    """Remembers SIGTERM and SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._received_at = 0.0

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside this block; only possible in the main thread, elsewhere nothing changes."""
        with handling(self._handle):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if is_supervised() and time.monotonic() - self._received_at < ECHO_SECONDS:
                return
            os._exit(Preempted.exit_code)
        self.received, self._received_at = signal.Signals(number).name, time.monotonic()
        os.write(2, b"\nstopping after this step and saving; once more to stop at once\n")


class PreemptionGuard(TrainerCallback):
    """Saves and stops at the end of the step, the evaluation or the save in which a signal came.

    Args:
        asked: Whether to stop. Among several ranks: whether they have agreed to, which they do once per update.
    """

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the Trainer to save and stop."""
        self._stop(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same: the save comes after the evaluation, so that no further update is needed.

        Raises:
            Preempted: It was the evaluation of the base model, so that there is nothing to save.
        """
        if state.global_step == 0 and self._asked():
            raise Preempted("stopped by a signal before the first update")
        self._stop(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is saved already: only stop."""
        self._stop(state, control, saves=False)

    def _stop(self, state: TrainerState, control: TrainerControl, *, saves: bool = True) -> None:
        if self._asked() and state.global_step < state.max_steps:
            control.should_save = control.should_save or saves
            control.should_training_stop = self.stopped = True


class EarlyStopping(TrainerCallback, ExportableState):
    """Stops when ``metric`` has not improved by more than ``min_delta`` in ``patience`` evaluations.

    Its state is part of every checkpoint and brought back from there, so that a resumed run stops where one that was
    never interrupted does.
    """

    def __init__(
        self,
        *,
        metric: str,
        greater_is_better: bool,
        patience: int,
        min_delta: float,
        on_stop: Callable[[int, str], None],
    ) -> None:
        self._metric, self._greater, self._patience, self._min_delta = metric, greater_is_better, patience, min_delta
        self._on_stop = on_stop
        self.best: float | None = None
        self.bad_evaluations = 0

    @property
    def is_over(self) -> bool:
        """Whether it has waited long enough."""
        return self.bad_evaluations >= self._patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {}, "attributes": {"best": self.best, "bad_evaluations": self.bad_evaluations}}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Count evaluations without improvement; the base model's evaluation sets the mark to beat."""
        value = (metrics or {})[self._metric]
        gain = 0.0 if self.best is None else (value - self.best) * (1 if self._greater else -1)
        if self.best is None or gain > self._min_delta:
            self.best, self.bad_evaluations = value, 0
            return
        self.bad_evaluations += 1
        if self.is_over:
            reason = f"{self._metric} has not improved on {self.best:.4f} in {self._patience} evaluations"
            control.should_training_stop = True
            self._on_stop(state.global_step, reason)


class CheckpointCleanup(TrainerCallback):
    """Deletes old checkpoints after each commit: the newest ones, the best and the newest healthy one stay.

    One that does not verify is put aside, and said so.
    """

    def __init__(self, run: RunDirectory, keep: int) -> None:
        self._run, self._keep = run, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Delete, and note each deletion."""
        if not state.is_world_process_zero:
            return
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        try:
            done = retain(self._run.checkpoints, keep=self._keep, best=best)
        except OSError as error:  # what is not deleted now is deleted later; nothing is lost by going on
            speaker.warn(f"old checkpoints in {self._run.checkpoints} are not deleted: {error}")
            self._run.event("incident", state.global_step, kind="disk", cause=f"clean-up failed: {error}")
            return
        for info in done.rejected:
            self._run.event("checkpoint_rejected", info.step, path=info.path.name, reason=info.reason)
            speaker.warn(f"{info.path.name} is put aside: {info.reason}")
        for step in done.deleted:
            self._run.event("checkpoint_deleted", state.global_step, deleted_step=step)


def early_stop_notice(run: RunDirectory) -> Callable[[int, str], None]:
    """How an early stop is told: an event and a line."""

    def tell(step: int, reason: str) -> None:
        run.event("early_stop", step, reason=reason)
        speaker.say(f"stopping early at step {step}: {reason}")

    return tell
