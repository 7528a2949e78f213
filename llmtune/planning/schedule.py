"""How long training goes on and at which learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.planning.adapter import MANY_EPOCHS, AdapterChoices
from llmtune.planning.arguments import Course, choose_schedule_arguments
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.rate import rate_factors, rounded
from llmtune.planning.request import PlanRequest
from llmtune.registry import SCHEDULES

# A run should have at least this many updates where the data allow it; below, the schedule has no room to act.
WANTED_UPDATES = 100
GLOBAL_BATCH_SIZES = (64, 32, 16, 8)
# Best learning rate of LoRA over that of full fine-tuning (Schulman et al., LoRA Without Regret, 2025).
FULL_LEARNING_RATE_DIVISOR = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthChoices:
    """How often the weights move; the three depend on each other."""

    epochs: Choice[float]
    updates: Choice[int]
    global_batch_size: Choice[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChoices:
    """How far the weights move in one update."""

    learning_rate: Choice[float]
    schedule: Choice[str]
    schedule_arguments: Choice[Mapping[str, Any]]
    warmup_updates: Choice[int]
    weight_decay: Choice[float]
    max_grad_norm: Choice[float]


def choose_length(request: PlanRequest) -> LengthChoices:
    """Global batch size, epochs and number of updates."""
    train, rows = request.config.train, request.rows
    epochs: Choice[float] = asked_or(train.epochs, "train.epochs", _epochs(request))
    batch = asked_or(train.global_batch_size, "train.global_batch_size", _global_batch_size(request, epochs.value))
    per_epoch = math.ceil(rows / batch.value)
    if train.max_steps is not None:
        reason = f"your train.max_steps at {per_epoch:,} updates per epoch"
        reason += f"; it wins over your train.epochs={train.epochs:g}" if train.epochs is not None else ""
        epochs = Choice(train.max_steps / per_epoch, reason, "derived")
        return LengthChoices(epochs=epochs, updates=_set("train.max_steps", train.max_steps), global_batch_size=batch)
    count = f"{rows:,} rows / {batch.value} per update × {epochs.value:g} epochs"
    updates = Choice(max(1, math.ceil(per_epoch * epochs.value)), count, "derived")
    return LengthChoices(epochs=epochs, updates=updates, global_batch_size=batch)


def choose_steps(
    request: PlanRequest, method: str, length: LengthChoices, patience: int | None, adapter: AdapterChoices
) -> StepChoices:
    """Learning rate and what shapes it over the run.

    Args:
        request: The facts.
        method: How the model is trained.
        length: Epochs and updates.
        patience: Evaluations without improvement after which the run stops; None never stops early.
        adapter: Rank and alpha.
    """
    train, updates = request.config.train, length.updates.value
    schedule: Choice[str] = asked_or(train.schedule, "train.schedule", request.of_preset("schedule"))
    learning_rate = asked_or(train.learning_rate, "train.learning_rate", usual_rate(request, method, length, adapter))
    warmup = _warmup(request, schedule.value, updates)
    course = Course(
        learning_rate=learning_rate.value,
        warmup=warmup.value,
        updates=updates,
        epochs=length.epochs.value,
        patience=patience if request.eval_rows else None,
    )
    return StepChoices(
        learning_rate=learning_rate,
        schedule=schedule,
        schedule_arguments=choose_schedule_arguments(request, schedule.value, course),
        warmup_updates=warmup,
        weight_decay=asked_or(train.weight_decay, "train.weight_decay", request.of_preset("weight_decay")),
        max_grad_norm=request.setting("train.max_grad_norm", "the Trainer's own default"),
    )


def _epochs(request: PlanRequest) -> Choice[float]:
    preset: Choice[float] = request.of_preset("epochs")
    if request.eval_rows == 0 and preset.value > MANY_EPOCHS:
        reason = (
            f"{preset.value:g} in the preset, which counts on held-out rows to keep the best of them; without any, "
            "overfitting would not be seen"
        )
        return Choice(MANY_EPOCHS, reason, "derived", f"{preset.value:g} with held-out rows")
    return preset


def _global_batch_size(request: PlanRequest, epochs: float) -> Choice[int]:
    rows, sizes = request.rows, ", ".join(map(str, reversed(GLOBAL_BATCH_SIZES)))
    changes = ""
    for size in GLOBAL_BATCH_SIZES:
        if math.ceil(rows / size) * epochs >= WANTED_UPDATES:
            reason = f"the largest of {sizes} that leaves {WANTED_UPDATES} updates or more"
            if size < GLOBAL_BATCH_SIZES[0]:
                enough = (math.ceil(WANTED_UPDATES / epochs) - 1) * 2 * size + 1
                changes = f"{2 * size} from {enough:,} rows"
            break
    else:
        reason = f"the smallest of {sizes}: {rows:,} rows leave fewer than {WANTED_UPDATES} updates anyway"
    if size < request.processes:
        size, reason, changes = request.processes, "one row for each process", ""
    if size > rows:
        size, reason, changes = rows, "all rows in one update; there are no more", ""
    return Choice(size, reason, "derived", changes)


def usual_rate(request: PlanRequest, method: str, length: LengthChoices, adapter: AdapterChoices) -> Choice[float]:
    """Return the peak learning rate for this model and run: the preset's, carried over by its rule where it has one."""
    preset: Choice[float] = request.of_preset("learning_rate")
    rule = request.preset.rate
    if rule is None and method != "full":
        return preset
    if rule is None:
        reason = (
            "a tenth of the preset's, which is for adapters: full fine-tuning does best there (LoRA Without Regret)"
        )
        rate = preset.value / FULL_LEARNING_RATE_DIVISOR
        return Choice(rate, reason, "derived", f"{preset.value:g} with --method lora")
    hidden, batch, updates = request.spec.shape.hidden, length.global_batch_size.value, length.updates.value
    factors = rate_factors(
        rule,
        hidden=hidden,
        method=method,
        rank=adapter.rank.value,
        alpha=adapter.alpha.value,
        batch=batch,
        updates=updates,
    )
    rate = rounded(preset.value * math.prod(factors.values()))
    told = ", ".join(f"× {factor:.2g} for {why}" for why, factor in factors.items())
    reason = f"{preset.value:g} in the preset for models of width {rule.hidden:,} ({preset.reason})"
    return Choice(rate, f"{reason}{f'; {told}' if told else ''}", "derived")


def _warmup(request: PlanRequest, schedule: str, updates: int) -> Choice[int]:
    """Updates over which the learning rate rises to its peak."""
    if not SCHEDULES[schedule].has_warmup:
        other = "; 'constant_with_warmup' has" if schedule == "constant" else ""
        return Choice(0, f"the schedule '{schedule}' has no warm-up{other}", "derived")
    ratio = asked_or(request.config.train.warmup_ratio, "train.warmup_ratio", request.of_preset("warmup_ratio"))
    count = round(ratio.value * updates)
    reason = f"{100 * ratio.value:g} % of {updates:,} updates; {ratio.reason}"
    if count > 1:
        reason += f"; equal steps, from 1/{count:,} of the peak at update 1 to the peak at update {count:,}"
    return Choice(count, reason, ratio.source)


def _set(key: str, value: Any) -> Choice[Any]:
    return Choice(value, f"you set {key}", "user")
