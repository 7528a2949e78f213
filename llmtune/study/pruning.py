"""The guard that reports a trial's evaluations and stops it when it falls behind the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.runs import RunDirectory

PRUNED_AT = "pruned_at"


class PruningGuard(TrainerCallback):
    """Reports ``metric`` to the trial at every evaluation and ends the run where the pruner says so.

    The decision is stored with the trial before the run stops, so that a process killed in between does not forget
    it. The run itself ends in order, with its best checkpoint as its result.

    Args:
        trial: Optuna's trial.
        metric: The metric's name in evaluations, with ``eval_``.
        run_dir: The trial's run directory.
    """

    def __init__(self, trial: Any, *, metric: str, run_dir: Path) -> None:
        self._trial, self._metric, self._run_dir = trial, metric, run_dir
        self._reported = set(_stored(trial).intermediate_values)

    @property
    def pruned_at(self) -> int | None:
        """The step at which it was decided to stop this trial."""
        step: int | None = self._trial.user_attrs.get(PRUNED_AT)
        return step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report, and stop unless the run is at its end anyway."""
        step = state.global_step
        if step == 0 or self._metric not in (metrics or {}):
            return
        if step not in self._reported:  # a resumed run may evaluate a step again
            self._trial.report((metrics or {})[self._metric], step)
            self._reported.add(step)
        if self.pruned_at is None and step < state.max_steps and self._trial.should_prune():
            self._trial.set_user_attr(PRUNED_AT, step)
            reason = f"pruned: {self._metric} is worse than the median of the study's trials at this step"
            RunDirectory.open(self._run_dir).event("early_stop", step, reason=reason)
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop a run that was resumed after the decision."""
        if self.pruned_at is not None and state.global_step >= self.pruned_at:
            control.should_training_stop = True


def _stored(trial: Any) -> Any:
    """The trial as the storage has it."""
    return next(frozen for frozen in trial.study.get_trials(deepcopy=False) if frozen.number == trial.number)
