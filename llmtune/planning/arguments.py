"""Arguments of the optimizer and the schedule: the user's, and for all others a value with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.errors import ConfigError
from llmtune.planning.choice import Choice
from llmtune.planning.request import PlanRequest
from llmtune.planning.signatures import argument_problems, optimizer_refusal, schedule_refusal
from llmtune.registry import OPTIMIZERS, SCHEDULES
from llmtune.registry import optimizers as of_optimizers
from llmtune.registry import schedules as of_schedules

OPTIMIZER_KEY, SCHEDULE_KEY = "train.optimizer_arguments", "train.schedule_arguments"
# Checked where memory decides which AdamW is taken.
OPTIMIZER = "adamw_torch_fused"
# Updates of one fall from the peak, at the least, where restarts are chosen. llmtune: chosen.
LEAST_CYCLE = 10
# GPT-3 (arXiv:2005.14165) ends its cosine at a tenth of the peak.
END_SHARE = 0.1
# Hägele et al. (arXiv:2405.18392): a fall over a fifth of the updates does as well as a longer one.
DECAY_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Facts that the arguments of a schedule depend on.

    Attributes:
        learning_rate: The peak.
        warmup: Updates of the warm-up.
        updates: Updates of the run.
        epochs: Passes over the data.
        patience: Evaluations without improvement after which the run stops; None never stops early.
    """

    learning_rate: float
    warmup: int
    updates: int
    epochs: float
    patience: int | None


# Name -> value and reason.
Defaults = dict[str, tuple[Any, str]]


def choose_optimizer_arguments(request: PlanRequest, optimizer: str) -> Choice[Mapping[str, Any]]:
    """Choose the arguments of the optimizer, without learning rate and weight decay."""
    described, asked = OPTIMIZERS[optimizer], request.config.train.optimizer_arguments
    values = {**described.defaults, **asked}
    if not values:
        return Choice({}, f"{optimizer} has none that matter", "default")
    if not asked:
        return Choice(values, described.why, "default")
    rest = [name for name in described.defaults if name not in asked]
    others = f"; {', '.join(rest)}: {described.why}" if rest else ""
    return Choice(values, f"you set {OPTIMIZER_KEY} ({', '.join(asked)}){others}", "user")


def choose_schedule_arguments(request: PlanRequest, schedule: str, course: Course) -> Choice[Mapping[str, Any]]:
    """Choose the arguments of the schedule, without warm-up and length.

    Raises:
        ConfigError: The schedule cannot be followed with the arguments that were given.
    """
    asked = dict(request.config.train.schedule_arguments)
    made = _DEFAULTS[schedule](course) if schedule in _DEFAULTS else {}
    if "min_lr" in asked and schedule.startswith("cosine"):
        made.pop("min_lr_rate", None)  # the same thing, given in another way
    rest = {name: default for name, default in made.items() if name not in asked}
    values = {**{name: value for name, (value, _) in rest.items()}, **asked}
    reasons = [f"{name}: {reason}" for name, (_, reason) in rest.items()]
    problems = _contradictions(schedule, values, course)
    if asked and not problems and (refusal := _refusal(schedule, values, course)) is not None:
        problems = [refusal]
    if problems:
        raise ConfigError("configuration", [f"{SCHEDULE_KEY}: {problem}" for problem in problems])
    if asked:
        return Choice(values, "; ".join([f"you set {SCHEDULE_KEY} ({', '.join(asked)})", *reasons]), "user")
    if not values:
        return Choice({}, f"{schedule} has none", "default")
    return Choice(values, "; ".join(reasons), "default")


def problems_of_arguments(request: PlanRequest) -> list[str]:
    """Return one sentence for each argument that does not exist, has the wrong type or is refused by its class."""
    return [*_schedule_problems(request), *_optimizer_problems(request)]


def _schedule_problems(request: PlanRequest) -> list[str]:
    asked = request.config.train.schedule_arguments
    name = request.config.train.schedule or str(request.of_preset("schedule").value)
    described = SCHEDULES.get(name)
    if not asked or described is None:
        return []
    found = argument_problems(described.factory, asked, of_schedules.DECIDED_ELSEWHERE, {})
    return [f"{SCHEDULE_KEY}.{problem} ({name})" for problem in found]


def _optimizer_problems(request: PlanRequest) -> list[str]:
    train = request.config.train
    asked, name = train.optimizer_arguments, train.optimizer or OPTIMIZER
    described = OPTIMIZERS.get(name)
    if not asked or described is None or described.problem(request.device.type) is not None:
        return []
    if train.optimizer is None and (special := [key for key in asked if key not in described.defaults]):
        return [
            f"{OPTIMIZER_KEY}.{key}: memory decides which AdamW is taken, and not every one has it; give "
            f"train.optimizer too, such as train.optimizer={OPTIMIZER}"
            for key in special
        ]
    found = argument_problems(described.factory, asked, of_optimizers.DECIDED_ELSEWHERE, described.defaults)
    if not found:
        values = {**described.defaults, **described.fixed, **asked}
        refusal = optimizer_refusal(described.factory, values)
        return [] if refusal is None else [f"{OPTIMIZER_KEY}: {refusal} ({name})"]
    return [f"{OPTIMIZER_KEY}.{problem} ({name})" for problem in found]


def _refusal(schedule: str, values: Mapping[str, Any], course: Course) -> str | None:
    refusal = schedule_refusal(
        schedule, values, learning_rate=course.learning_rate, warmup=course.warmup, updates=course.updates
    )
    return None if refusal is None else f"{refusal} ({schedule})"


def _contradictions(schedule: str, values: Mapping[str, Any], course: Course) -> list[str]:
    """Return one sentence for each value that the schedule takes but cannot follow in this run."""
    peak, problems = course.learning_rate, []
    if schedule == "warmup_stable_decay" and (course.warmup + values["num_decay_steps"] > course.updates):
        problems.append(
            f"num_decay_steps: got {values['num_decay_steps']}, but {course.updates:,} updates with a warm-up of "
            f"{course.warmup:,} leave {max(0, course.updates - course.warmup):,}"
        )
    if (least := values.get("min_lr")) is not None and least > peak:
        problems.append(f"min_lr: got {least:g}, but the peak, train.learning_rate, is {peak:g}")
    if (most := values.get("max_lr")) is not None and most < peak:
        problems.append(f"max_lr: got {most:g}, but the peak, train.learning_rate, is {peak:g}")
    waits = values.get("patience", 0)
    if SCHEDULES[schedule].needs_evaluation and course.patience is not None and waits + 1 >= course.patience:
        problems.append(
            f"patience: {waits} means that the learning rate changes after {waits + 1} evaluations without "
            f"improvement, and the run stops after {course.patience}; give a larger evaluate.patience, or "
            "evaluate.patience=off"
        )
    return problems


def _waits(course: Course) -> tuple[int, str]:
    """Return the number of evaluations that a schedule waits for (fewer than early stopping), and the reason."""
    if course.patience is None:
        return 1, "the learning rate changes at the second evaluation in a row"
    waits = max(0, min(1, course.patience - 2))
    return waits, f"the learning rate changes before the run stops, after {course.patience} such evaluations"


def _restarts(course: Course) -> Defaults:
    most = max(2, course.updates // LEAST_CYCLE)
    cycles = min(max(2, round(course.epochs)), most)
    return {"num_cycles": (cycles, "one fall for each pass over the data, and at least 2, so that it restarts")}


def _polynomial(course: Course) -> Defaults:
    end = 1e-7 if course.learning_rate > 1e-7 else 0.0
    return {
        "power": (1.0, "transformers' own, a straight line; above 1 the rate falls faster at first"),
        "lr_end": (end, "transformers' own"),
    }


def _inverse_sqrt(course: Course) -> Defaults:
    if course.warmup > 0:
        return {"timescale": (course.warmup, "as long as the warm-up, as in transformers")}
    reason = "a tenth of the updates; the 10,000 of transformers would hardly change the rate of a short run"
    return {"timescale": (max(1, course.updates // 10), reason)}


def _min_lr(course: Course) -> Defaults:
    return {"min_lr_rate": (END_SHARE, "a tenth of the peak at the end, as GPT-3 had (arXiv:2005.14165)")}


def _stable(course: Course) -> Defaults:
    steps = min(max(1, round(DECAY_SHARE * course.updates)), max(0, course.updates - course.warmup))
    share = f"{100 * DECAY_SHARE:g} % of the updates (arXiv:2405.18392)"
    return {
        "num_decay_steps": (steps, share),
        "decay_type": ("cosine", "transformers' own"),
        "min_lr_ratio": (0.0, "transformers' own: the rate ends at 0"),
    }


def _plateau(course: Course) -> Defaults:
    return {"factor": (0.1, "PyTorch's own"), "patience": _waits(course)}


def _greedy(course: Course) -> Defaults:
    peak = course.learning_rate
    return {
        "factor": (0.95, "transformers' own"),
        "patience": _waits(course),
        "min_lr": (peak / 100, "a hundredth of train.learning_rate; transformers' 0.001 may lie above it"),
        "max_lr": (peak, "train.learning_rate is the peak"),
    }


_DEFAULTS: Mapping[str, Callable[[Course], Defaults]] = {
    "cosine": lambda course: {"num_cycles": (0.5, "one fall from the peak to 0")},
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "reduce_lr_on_plateau": _plateau,
    "cosine_with_min_lr": _min_lr,
    "cosine_warmup_with_min_lr": _min_lr,
    "warmup_stable_decay": _stable,
    "greedy": _greedy,
}
