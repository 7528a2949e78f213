"""When a run is judged and saved: as often as the preset says, as far as that costs little time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest
from llmtune.units import format_seconds

# Evaluations take at most this share of the training time, and saves this one. llmtune: chosen.
EVALUATION_SHARE, SAVE_SHARE = 0.10, 0.05
# A crash costs at most about this much work. llmtune: chosen.
SAVE_WITHIN_SECONDS = 20 * 60
# Evaluations without improvement before stopping; one fewer where data is about to be learned by heart.
# llmtune: chosen.
PATIENCE = 3
# How far an interval may move, so that the last update is evaluated: by this share. llmtune: chosen.
PLAY = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class CadenceChoices:
    """Evaluations, checkpoints, and when to stop early."""

    evaluate_every_steps: Choice[int]
    save_every_steps: Choice[int]
    keep_checkpoints: Choice[int]
    patience: Choice[int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Predicted seconds: of one update, one evaluation, one checkpoint."""

    step: float
    evaluation: float
    save: float


def choose_cadence(
    request: PlanRequest, costs: Costs, *, per_epoch: int, updates: int, memorises: bool
) -> CadenceChoices:
    """Intervals in updates.

    Args:
        request: The facts.
        costs: What each part takes.
        per_epoch: Updates of one epoch.
        updates: Updates of the run.
        memorises: Whether data is about to be learned by heart.
    """
    config = request.config
    return CadenceChoices(
        evaluate_every_steps=asked_or(
            config.evaluate.every_steps, "evaluate.every_steps", _evaluate_every(request, costs, per_epoch, updates)
        ),
        save_every_steps=asked_or(
            config.save.every_steps, "save.every_steps", _save_every(request, costs, per_epoch, updates)
        ),
        keep_checkpoints=request.setting("save.keep", "newest ones to fall back on, besides the best"),
        patience=_patience(request, memorises=memorises),
    )


def _evaluate_every(request: PlanRequest, costs: Costs, per_epoch: int, updates: int) -> Choice[int]:
    preset = _of_preset(request, "evals_per_epoch", per_epoch, updates)
    if request.eval_rows == 0:
        return preset
    affordable = math.floor(EVALUATION_SHARE * updates * costs.step / costs.evaluation) if costs.evaluation else updates
    if updates // preset.value > max(1, affordable):
        steps = math.ceil(updates / max(1, affordable))
        share = updates // preset.value * costs.evaluation / (updates * costs.step)
        reason = (
            f"one takes about {format_seconds(costs.evaluation)}; the preset's one in {preset.value:,} would cost "
            f"{100 * share:.0f} % of the time, this keeps it at about {100 * EVALUATION_SHARE:g} %"
        )
        return Choice(steps, reason, "derived", f"{preset.value:,} with fewer held-out rows")
    steps = _reaching(preset.value, updates)
    if steps == preset.value:
        return preset
    reason = (
        f"{preset.value:,} by the preset, moved so that the last one comes after update "
        f"{updates - updates % steps:,} of {updates:,}; {preset.reason}"
    )
    return Choice(steps, reason, "derived", preset.changes)


def _save_every(request: PlanRequest, costs: Costs, per_epoch: int, updates: int) -> Choice[int]:
    preset = _of_preset(request, "saves_per_epoch", per_epoch, updates)
    steps, reason = preset.value, ""
    if steps * costs.step > SAVE_WITHIN_SECONDS:
        steps = max(1, math.floor(SAVE_WITHIN_SECONDS / costs.step))
        reason = (
            f"about every {format_seconds(steps * costs.step)}, which is what a crash costs at most; the preset's "
            f"{preset.value:,} would be {format_seconds(preset.value * costs.step)}"
        )
    if costs.save > SAVE_SHARE * steps * costs.step:
        steps = min(updates, math.ceil(costs.save / (SAVE_SHARE * costs.step)))
        reason = (
            f"one takes about {format_seconds(costs.save)}; more of them than this would cost more than "
            f"{100 * SAVE_SHARE:g} % of the time"
        )
    return Choice(steps, reason, "derived") if steps != preset.value else preset


def _of_preset(request: PlanRequest, name: str, per_epoch: int, updates: int) -> Choice[int]:
    times: Choice[float] = request.of_preset(name)
    steps = max(1, round(per_epoch / times.value))
    if steps > updates:
        return Choice(updates, "once, at the end: the run is shorter than the preset's interval", "preset")
    reason = f"{times.value:g} per epoch of {per_epoch:,} updates; {times.reason}"
    return Choice(steps, reason, "preset")


def _reaching(steps: int, updates: int) -> int:
    """The interval near ``steps`` whose last multiple comes closest to the end of the run."""
    near = range(max(1, math.ceil(steps * (1 - PLAY))), min(updates, math.floor(steps * (1 + PLAY))) + 1)
    return min(near, key=lambda interval: (updates % interval, abs(interval - steps), interval), default=steps)


def _patience(request: PlanRequest, *, memorises: bool) -> Choice[int | None]:
    config = request.config
    if config.evaluate.patience == 0:
        return Choice(None, "you set evaluate.patience=off: the run goes to its end", "user")
    if config.evaluate.patience is not None:
        return Choice(config.evaluate.patience, "you set evaluate.patience", "user")
    if request.eval_rows == 0:
        return Choice(None, "there is nothing to evaluate on", "derived", f"{PATIENCE} with held-out rows")
    if config.train.preset == "highspeed":
        return Choice(
            None, "a highspeed run is short; it always runs to its end", "derived", f"{PATIENCE} with another --preset"
        )
    stops = f"stops when {config.evaluate.metric} has not improved in so many evaluations; the best one is kept"
    if memorises:
        reason = f"{stops}; fewer than usual: so little data is soon learned by heart"
        return Choice(PATIENCE - 1, reason, "derived", f"{PATIENCE} with more rows or fewer epochs")
    return Choice(PATIENCE, stops, "default")
