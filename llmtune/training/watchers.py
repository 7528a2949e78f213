"""Callbacks that watch: events, status and the terminal display. They never steer.

A watcher that fails is reported once and switched off; the run goes on without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.console import ProgressBar, speaker
from llmtune.runs import RunDirectory
from llmtune.training.comparison import BaseComparison
from llmtune.training.trainer import UpdateTrainer
from llmtune.units import format_bytes, format_rows_right, format_seconds

# How often status.json is rewritten at most; events.jsonl has every step.
STATUS_SECONDS = 1.0


class Observer(Protocol):
    """What a watcher is told. ``logs`` are the numbers of one update; ``metrics`` those of one evaluation."""

    def began(self, state: TrainerState) -> None:
        """Training starts or goes on."""

    def stepped(self, state: TrainerState, logs: dict[str, float], seconds: float) -> None:
        """One update is done."""

    def evaluated(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """One evaluation is done."""

    def saved(self, state: TrainerState) -> None:
        """A checkpoint was committed."""

    def ended(self, state: TrainerState) -> None:
        """Training stops, for whatever reason."""


class Watcher(TrainerCallback):
    """Tells observers what happens, and keeps the run safe from their mistakes."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = list(observers)
        self._step_started = 0.0
        self._step_seconds = 0.0

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                call(observer)
            except Exception as error:
                self._observers.remove(observer)
                name = type(observer).__name__
                speaker.warn(f"{name} failed and is switched off for the rest of the run: {error!r}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on."""
        self._tell(lambda observer: observer.began(state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the update."""
        self._step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock of the update."""
        self._step_seconds = time.perf_counter() - self._step_started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass on the log line of an update; evaluations and the summary come by other ways."""
        if logs and "loss" in logs:
            self._tell(lambda observer: observer.stepped(state, logs, self._step_seconds))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pass on."""
        self._tell(lambda observer: observer.evaluated(state, metrics or {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        self._tell(lambda observer: observer.saved(state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on."""
        self._tell(lambda observer: observer.ended(state))


class EventLog:
    """Writes ``events.jsonl`` and ``status.json``.

    Args:
        run: The run directory.
        trainer: Whose latest update, evaluation and save are told.
        memory_bytes: Peak memory so far: of the device, or the resident set on a CPU.
        comparison: Sets every evaluation beside that of the base model.
    """

    def __init__(
        self,
        run: RunDirectory,
        trainer: UpdateTrainer,
        memory_bytes: Callable[[], int],
        comparison: BaseComparison,
    ) -> None:
        self._run, self._trainer, self._memory_bytes, self._comparison = run, trainer, memory_bytes, comparison
        self._began_at, self._began_step, self._status_at = 0.0, 0, 0.0
        self._loss: float | None = None
        self._checkpoint: str | None = None

    def began(self, state: TrainerState) -> None:
        """Note where this process starts."""
        self._began_at, self._began_step = time.monotonic(), state.global_step
        self._status(state, force=True)

    def stepped(self, state: TrainerState, logs: dict[str, float], seconds: float) -> None:
        """One ``step`` line."""
        facts = self._trainer.last_update
        assert facts is not None, "a step was logged before any update ran"
        self._loss = logs["loss"]
        self._run.event(
            "step",
            state.global_step,
            epoch=state.epoch,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            num_tokens=facts.num_tokens,
            num_supervised_tokens=facts.num_supervised_tokens,
            tokens_per_second=facts.num_tokens / seconds if seconds > 0 else 0.0,
            step_seconds=seconds,
            micro_batch_size=facts.micro_batch_size,
            global_batch_size=facts.global_batch_size,
            memory_bytes=self._memory_bytes(),
        )
        self._status(state)

    def evaluated(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """One ``evaluation`` line; the prefix ``eval_`` is kept on the loss and the user's metrics."""
        fields: dict[str, Any] = {
            ("perplexity" if key == "eval_perplexity" else key): value for key, value in metrics.items()
        }
        trainer, step = self._trainer, state.global_step
        fields |= self._comparison.facts(step, trainer.last_scores)
        if right := {name: _rows_right(metrics[f"eval_{name}"], of) for name, of in trainer.counted.items()}:
            fields["rows_right"] = right
        self._run.event("evaluation", step, epoch=state.epoch, seconds=trainer.evaluation_seconds, **fields)

    def saved(self, state: TrainerState) -> None:
        """One ``checkpoint_saved`` line."""
        self._checkpoint = f"checkpoints/checkpoint-{state.global_step}"
        seconds, best = self._trainer.save_seconds, state.best_global_step
        self._run.event("checkpoint_saved", state.global_step, path=self._checkpoint, best=best, seconds=seconds)
        self._status(state, force=True)

    def ended(self, state: TrainerState) -> None:
        """Bring ``status.json`` up to date."""
        self._status(state, force=True)

    def _status(self, state: TrainerState, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._status_at < STATUS_SECONDS:
            return
        self._status_at = now
        self._run.write_status(
            state="running",
            step=state.global_step,
            of=state.max_steps,
            eta_seconds=_eta(state, self._began_step, now - self._began_at),
            loss=self._loss,
            last_checkpoint=self._checkpoint,
        )


class ProgressDisplay:
    """A progress bar with loss, rate and remaining time on a terminal; a few lines where there is none."""

    def __init__(self, trainer: UpdateTrainer, memory_bytes: Callable[[], int]) -> None:
        self._trainer, self._memory_bytes = trainer, memory_bytes
        self._stack = ExitStack()
        self._bar: ProgressBar | None = None
        self._began_at, self._began_step = 0.0, 0

    def began(self, state: TrainerState) -> None:
        """Open the bar."""
        self._began_at, self._began_step = time.monotonic(), state.global_step
        self._bar = self._stack.enter_context(speaker.progress("training", state.max_steps))

    def stepped(self, state: TrainerState, logs: dict[str, float], seconds: float) -> None:
        """Move the bar; without a terminal, say something every tenth of the way."""
        rate = logs["num_tokens"] / seconds if seconds > 0 else 0.0
        note = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {rate:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(state.global_step, f"{note}  {format_bytes(self._memory_bytes())}")
        if not speaker.interactive and (state.global_step % max(1, state.max_steps // 10) == 0):
            eta = _eta(state, self._began_step, time.monotonic() - self._began_at)
            left = f", {format_seconds(eta)} left" if eta else ""
            speaker.say(f"step {state.global_step}/{state.max_steps}  {note}{left}")

    def evaluated(self, state: TrainerState, metrics: dict[str, float]) -> None:
        """One line per evaluation."""
        named = {key.removeprefix("eval_"): value for key, value in metrics.items()}
        own = "".join(
            f"  {name} {format_rows_right(value, of) if (of := self._trainer.counted.get(name)) else f'{value:.4g}'}"
            for name, value in named.items()
            if name not in ("loss", "perplexity", "tokens")
        )
        where = "base model" if state.global_step == 0 else f"step {state.global_step}"
        loss, perplexity = metrics["eval_loss"], metrics["eval_perplexity"]
        speaker.say(f"evaluation at {where}: loss {loss:.4f}  perplexity {perplexity:.2f}{own}")

    def saved(self, state: TrainerState) -> None:
        """Nothing: a save is no news on a terminal."""

    def ended(self, state: TrainerState) -> None:
        """Close the bar."""
        self._stack.close()


def _rows_right(share: float, rows: int) -> dict[str, int | None]:
    """The count behind a share of rows."""
    return {"right": round(share * rows) if math.isfinite(share) else None, "rows": rows}


def _eta(state: TrainerState, began_step: int, elapsed: float) -> float | None:
    done = state.global_step - began_step
    return None if done <= 0 else elapsed / done * (state.max_steps - state.global_step)
