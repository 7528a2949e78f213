"""Every schedule of transformers' ``SchedulerType``: its function, its arguments and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A name of ``SchedulerType``.

    Attributes:
        factory: ``module:name`` of the function or class that takes the arguments.
        arguments: Arguments that llmtune always sets, and what each of them does.
        needs_evaluation: Whether it goes by the results of evaluations.
        has_warmup: Whether the learning rate rises at the beginning.
    """

    name: str
    factory: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    needs_evaluation: bool = False
    has_warmup: bool = True

    def problem(self, eval_rows: int) -> str | None:
        """Return why a run with so many held-out rows cannot use the schedule; None where it can."""
        if self.needs_evaluation and eval_rows == 0:
            return (
                "which goes by the results of evaluations, and no rows are held out; give --eval-data or a "
                "data.eval_fraction above 0, or use another schedule"
            )
        return None


# Arguments that another key decides, and what to do instead.
DECIDED_ELSEWHERE = {
    "optimizer": "give train.optimizer",
    "num_warmup_steps": "give train.warmup_ratio",
    "num_training_steps": "give train.epochs or train.max_steps",
    "num_stable_steps": "leave it out: the steps between warm-up and decay",
    "last_epoch": "leave it out",
    "mode": "give evaluate.greater_is_better",
    "verbose": "leave it out: the learning rate of each update is in events.jsonl",
}

_OPTIMIZATION = "transformers.optimization"
_MIN_LR = {"min_lr_rate": "the learning rate at the end, as a share of the peak; min_lr gives it as a number"}

SCHEDULES: Mapping[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule(name="linear", factory=f"{_OPTIMIZATION}:get_linear_schedule_with_warmup"),
        Schedule(
            name="cosine",
            factory=f"{_OPTIMIZATION}:get_cosine_schedule_with_warmup",
            arguments={"num_cycles": "waves of the cosine; 0.5 falls from the peak to 0 once"},
        ),
        Schedule(
            name="cosine_with_restarts",
            factory=f"{_OPTIMIZATION}:get_cosine_with_hard_restarts_schedule_with_warmup",
            arguments={"num_cycles": "times that the learning rate falls from the peak to 0"},
        ),
        Schedule(
            name="polynomial",
            factory=f"{_OPTIMIZATION}:get_polynomial_decay_schedule_with_warmup",
            arguments={
                "power": "exponent of the fall; 1 is a straight line",
                "lr_end": "the learning rate at the end",
            },
        ),
        Schedule(name="constant", factory=f"{_OPTIMIZATION}:get_constant_schedule", has_warmup=False),
        Schedule(name="constant_with_warmup", factory=f"{_OPTIMIZATION}:get_constant_schedule_with_warmup"),
        Schedule(
            name="inverse_sqrt",
            factory=f"{_OPTIMIZATION}:get_inverse_sqrt_schedule",
            arguments={"timescale": "updates after which the fall is noticeable"},
        ),
        Schedule(
            name="reduce_lr_on_plateau",
            factory="torch.optim.lr_scheduler:ReduceLROnPlateau",
            arguments={
                "factor": "the learning rate is multiplied by it",
                "patience": "evaluations without improvement that are waited for before it is",
            },
            needs_evaluation=True,
            has_warmup=False,
        ),
        Schedule(
            name="cosine_with_min_lr",
            factory=f"{_OPTIMIZATION}:get_cosine_with_min_lr_schedule_with_warmup",
            arguments=_MIN_LR,
        ),
        Schedule(
            name="cosine_warmup_with_min_lr",
            factory=f"{_OPTIMIZATION}:get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
            arguments=_MIN_LR,
        ),
        Schedule(
            name="warmup_stable_decay",
            factory=f"{_OPTIMIZATION}:get_wsd_schedule",
            arguments={
                "num_decay_steps": "updates of the fall at the end",
                "decay_type": "linear, cosine or 1-sqrt",
                "min_lr_ratio": "the learning rate at the end, as a share of the peak",
            },
        ),
        Schedule(
            name="greedy",
            factory=f"{_OPTIMIZATION}:GreedyLR",
            arguments={
                "factor": "the learning rate is multiplied by it, or divided when evaluations improve",
                "patience": "evaluations in a row, all better or all not, that are waited for before it is",
                "min_lr": "the learning rate does not fall below it",
                "max_lr": "the learning rate does not rise above it",
            },
            needs_evaluation=True,
            has_warmup=False,
        ),
    )
}
