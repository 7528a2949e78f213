"""How long training goes on, at which learning rate, and when it is judged and saved."""

from __future__ import annotations

import math
from typing import Any

from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest

# A run should have at least this many updates where the data allow it; below, the schedule has no room to act.
WANTED_UPDATES = 100
GLOBAL_BATCH_SIZES = (64, 32, 16, 8)
# Best learning rate of LoRA over that of full fine-tuning (Schulman et al., LoRA Without Regret, 2025).
FULL_LEARNING_RATE_DIVISOR = 10
# Evaluations without improvement before stopping.
PATIENCE = 3


def schedule_length(request: PlanRequest) -> tuple[Choice[int], Choice[float], Choice[int]]:
    """Global batch size, epochs and number of updates; they depend on each other."""
    train, rows = request.config.train, request.rows
    epochs: Choice[float] = asked_or(train.epochs, "train.epochs", request.of_preset("epochs"))
    batch = asked_or(train.global_batch_size, "train.global_batch_size", _global_batch_size(request, epochs.value))
    per_epoch = math.ceil(rows / batch.value)
    if train.max_steps is not None:
        reason = f"your train.max_steps at {per_epoch:,} updates per epoch"
        reason += f"; it wins over your train.epochs={train.epochs:g}" if train.epochs is not None else ""
        return batch, Choice(train.max_steps / per_epoch, reason, "derived"), _set("train.max_steps", train.max_steps)
    count = f"{rows:,} rows / {batch.value} per update × {epochs.value:g} epochs"
    return batch, epochs, Choice(max(1, math.ceil(per_epoch * epochs.value)), count, "derived")


def _global_batch_size(request: PlanRequest, epochs: float) -> Choice[int]:
    rows, sizes = request.rows, ", ".join(map(str, reversed(GLOBAL_BATCH_SIZES)))
    for size in GLOBAL_BATCH_SIZES:
        if math.ceil(rows / size) * epochs >= WANTED_UPDATES:
            reason = f"the largest of {sizes} that leaves {WANTED_UPDATES} updates or more"
            break
    else:
        reason = f"the smallest of {sizes}: {rows:,} rows leave fewer than {WANTED_UPDATES} updates anyway"
    if size < request.processes:
        size, reason = request.processes, "one row for each process"
    if size > rows:
        size, reason = rows, "all rows in one update; there are no more"
    return Choice(size, reason, "derived")


def learning_rate(request: PlanRequest, method: str) -> Choice[float]:
    """The peak: the user's, the preset's, or a tenth of it where the whole model is trained."""
    chosen: Choice[float] = request.of_preset("learning_rate")
    if method == "full":
        reason = (
            "a tenth of the preset's, which is for adapters: full fine-tuning does best there (LoRA Without Regret)"
        )
        chosen = Choice(chosen.value / FULL_LEARNING_RATE_DIVISOR, reason, "derived")
    return asked_or(request.config.train.learning_rate, "train.learning_rate", chosen)


def warmup(request: PlanRequest, schedule: str, updates: int) -> Choice[int]:
    """Updates over which the learning rate rises to its peak."""
    if schedule == "constant":
        return Choice(0, "the schedule 'constant' has no warm-up; 'constant_with_warmup' has", "derived")
    ratio = asked_or(request.config.train.warmup_ratio, "train.warmup_ratio", request.of_preset("warmup_ratio"))
    reason = f"{100 * ratio.value:g} % of {updates:,} updates; {ratio.reason}"
    return Choice(round(ratio.value * updates), reason, ratio.source)


def every(request: PlanRequest, key: str, name: str, per_epoch: int, updates: int) -> Choice[int]:
    """Updates between evaluations or saves: what the user set for ``key``, else the preset's ``name`` per epoch."""
    group, leaf = key.split(".")
    times: Choice[float] = request.of_preset(name)
    steps = max(1, round(per_epoch / times.value))
    reason = f"{times.value:g} per epoch of {per_epoch:,} updates; {times.reason}"
    if steps > updates:
        steps, reason = updates, "once, at the end: the run is shorter than the preset's interval"
    return asked_or(getattr(getattr(request.config, group), leaf), key, Choice(steps, reason, "preset"))


def patience(request: PlanRequest) -> Choice[int | None]:
    """Evaluations without improvement before the run stops early."""
    config = request.config
    if config.evaluate.patience is not None:
        return Choice(config.evaluate.patience, "you set evaluate.patience", "user")
    if request.eval_rows == 0:
        return Choice(None, "there is nothing to evaluate on", "derived")
    if config.train.preset == "highspeed":
        return Choice(None, "a highspeed run is short; it always runs to its end", "derived")
    reason = f"stops when {config.evaluate.metric} has not improved in {PATIENCE} evaluations; the best one is kept"
    return Choice(PATIENCE, reason, "default")


def _set(key: str, value: Any) -> Choice[Any]:
    return Choice(value, f"you set {key}", "user")
