"""Every schedule: the first update moves the weights, the last one ends where the schedule says, resumed runs too."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType, TrainerCallback, get_scheduler
from tuning import ROWS, SignalAt, events, history, settings, tune

from llmtune import FineTuner
from llmtune.errors import Preempted
from llmtune.presets import SCHEDULES
from llmtune.training.schedules import warm_from_the_first_update

Model = Callable[[str], Path]
PEAK = 1e-3
# What schedules of transformers cannot do without, and the rate at which they end, as a share of the peak.
ARGUMENTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "cosine_with_min_lr": lambda n, w: {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": lambda n, w: {"min_lr_rate": 0.1},
    "warmup_stable_decay": lambda n, w: {"num_decay_steps": n - w},
    "cosine_with_restarts": lambda n, w: {"num_cycles": 2},
}
ENDS = {
    "linear": 0.0,
    "cosine": 0.0,
    "cosine_with_restarts": 0.0,
    "polynomial": 1e-7 / PEAK,
    "constant": 1.0,
    "constant_with_warmup": 1.0,
    "cosine_with_min_lr": 0.1,
    "cosine_warmup_with_min_lr": 0.1,
    "warmup_stable_decay": 0.0,
}
BY_WHAT_THEY_SEE = ("reduce_lr_on_plateau", "greedy")  # no formula, no warm-up
FORMULAS = sorted(schedule.value for schedule in SchedulerType if schedule.value not in BY_WHAT_THEY_SEE)
LENGTHS = [(n, w) for n in (1, 2, 3, 4, 20) for w in sorted({0, 1, n // 2, n - 1, n})]


def shares(schedule: str, n: int, w: int, *, ours: bool = True) -> list[float]:
    """The rate of each of ``n`` updates, and the one after them, as shares of the peak."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter]}, {"params": []}], lr=PEAK)
    kwargs = ARGUMENTS.get(schedule, lambda n, w: None)(n, w)
    scheduler = get_scheduler(schedule, optimizer, w, n, kwargs)
    if ours:
        scheduler = warm_from_the_first_update(scheduler, warmup=w, updates=n)
    rates = []
    for update in range(n + 1):
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        rates.append(optimizer.param_groups[1]["lr"] / PEAK)
        if update < n:
            optimizer.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(("n", "w"), LENGTHS)
def test_a_schedule_begins_above_zero_and_ends_where_it_says(schedule: str, n: int, w: int) -> None:
    w = 0 if schedule == "constant" else w
    rates = shares(schedule, n, w)
    assert all(rate > 0 for rate in rates[:n])
    assert max(rates) <= 1 + 1e-12
    assert rates[:w] == pytest.approx([update / w for update in range(1, w + 1)])
    if schedule in ENDS and w < n:
        assert rates[n] == pytest.approx(ENDS[schedule], abs=1e-9) or rates[n - 1] == pytest.approx(ENDS[schedule])
    if w < n:
        assert rates[w] == pytest.approx(1.0) or schedule == "cosine_warmup_with_min_lr"


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(("n", "w"), [(3, 0), (20, 0), (20, 4)])
def test_after_the_warm_up_a_schedule_is_that_of_transformers(schedule: str, n: int, w: int) -> None:
    w = 0 if schedule == "constant" else w
    assert shares(schedule, n, w)[w:] == shares(schedule, n, w, ours=False)[w:]


AFTER_THREE_OF_SIX: dict[str, Callable[[int], float]] = {
    "linear": lambda done: (6 - done) / 3,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * (done - 3) / 3)),
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
}


class Rates(TrainerCallback):
    """Notes the rates with which the optimizer really steps."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.used.append(rate)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rates_of_a_run_are_those_of_its_events_also_when_resumed(
    family_model: Model, tmp_path: Path, schedule: str
) -> None:
    warmup = {} if schedule == "constant" else {"warmup_ratio": 0.5}
    how: dict[str, Any] = {"schedule": schedule, "max_steps": 6, "eval_fraction": 0.0, "probe": False, **warmup}
    rates = Rates()
    whole = tune(family_model("llama"), tmp_path / "whole", callbacks=[rates], **how)
    told = [event["learning_rate"] for event in events(whole.run_dir, "step")]
    assert rates.used == told
    assert all(rate > 0 for rate in told)
    assert told[:3] == ([PEAK] * 3 if schedule == "constant" else [PEAK / 3, PEAK * (2 / 3), PEAK])
    if schedule in AFTER_THREE_OF_SIX:
        assert told[3:] == pytest.approx([PEAK * AFTER_THREE_OF_SIX[schedule](done) for done in (3, 4, 5)])
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(2)], **how)
    FineTuner.resume(tmp_path / "cut", ROWS)
    assert history(tmp_path / "cut") == history(whole.run_dir)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_a_run_of_very_few_updates_changes_the_weights_at_each(
    family_model: Model, tmp_path: Path, updates: int
) -> None:
    how = settings(family_model("llama"), tmp_path / "run", max_steps=updates, warmup_ratio=0.9, schedule="polynomial")
    result = FineTuner(ROWS, **how).train()
    rates = [event["learning_rate"] for event in events(result.run_dir, "step")]
    assert (len(rates), result.steps) == (updates, updates)
    assert all(rate > 0 for rate in rates)
    assert max(rates) == PEAK


def test_a_checkpoint_made_under_the_schedule_of_transformers_goes_on_under_ours() -> None:
    """Checkpoints of earlier versions hold its state: the same fields, and no formula."""

    def made(ours: bool) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
        scheduler = get_scheduler("linear", optimizer, 4, 8)
        return optimizer, warm_from_the_first_update(scheduler, warmup=4, updates=8) if ours else scheduler

    old_optimizer, old = made(ours=False)
    for _ in range(2):
        old_optimizer.step()
        old.step()
    optimizer, scheduler = made(ours=True)
    scheduler.load_state_dict(old.state_dict())
    optimizer.load_state_dict(old_optimizer.state_dict())
    assert scheduler.state_dict().keys() == old.state_dict().keys()
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0] / PEAK)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2 / 4, 4 / 4, 1.0, 3 / 4, 2 / 4, 1 / 4])  # the rate of its next update is kept too
