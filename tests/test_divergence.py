"""Evaluations that get worse one after the other, or stand still: the learning rate is lowered, and that is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from machines import request_for
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler
from tuning import evaluations, events, history, tune

from llmtune.planning import make_plan
from llmtune.runs import RunDirectory
from llmtune.training.divergence import DIVERGES, IN_A_ROW, STANDS_STILL, DivergenceGuard
from llmtune.training.ranks import Ranks
from llmtune.training.recoveries import Recoveries
from llmtune.training.recovery import Budgets

RATE = 0.1
Seen = Iterable[tuple[float, float]]


def watched(place: Path, seen: Seen, schedule: str = "linear") -> tuple[list[float], RunDirectory]:
    """The learning rate after each of the ``seen`` pairs of training and evaluation loss, and the run."""
    run = RunDirectory.create(place, identity={})
    plan = make_plan(request_for())
    guard = DivergenceGuard(Recoveries(run, plan, ranks=Ranks(on_cpu=True), budgets=Budgets(), step=0))
    args = TrainingArguments(output_dir=str(place / "none"), lr_scheduler_type=schedule, use_cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = get_scheduler("constant", optimizer)
    state, control = TrainerState(), TrainerControl()
    rates = []
    for step, (training, evaluation) in enumerate(seen):
        state = replace(state, global_step=step)
        if step > 0:
            guard.on_log(args, state, control, logs={"loss": training})
        metrics = {"eval_loss": evaluation}
        guard.on_evaluate(args, state, control, metrics, optimizer=optimizer, lr_scheduler=scheduler)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, run


def causes(run: RunDirectory) -> list[str]:
    return [event["cause"] for event in run.events() if event["event"] == "incident"]


def test_both_losses_rise_twice_in_a_row(tmp_path: Path) -> None:
    rates, run = watched(tmp_path / "run", [(2.0, 2.0), (1.8, 1.9), (2.0, 2.1), (2.4, 2.5), (2.6, 2.7), (2.2, 2.3)])
    assert rates == [RATE, RATE, RATE, RATE / 2, RATE / 2, RATE / 2]
    assert causes(run) == [DIVERGES]
    (recovery,) = (event for event in run.events() if event["event"] == "recovery")
    assert (recovery["action"], recovery["step"], recovery["learning_rate_factor"]) == ("lower_learning_rate", 3, 0.5)


def test_what_rises_in_the_evaluation_alone_is_learned_by_heart(tmp_path: Path) -> None:
    rates, run = watched(tmp_path / "run", [(2.0, 2.0), (1.8, 1.9), (1.6, 2.1), (1.4, 2.5), (1.2, 2.9), (1.0, 3.3)])
    assert set(rates) == {RATE}
    assert causes(run) == []


@pytest.mark.parametrize(
    ("schedule", "lowered"), [("constant", True), ("constant_with_warmup", True), ("linear", False)]
)
def test_standing_still_matters_where_nothing_lowers_the_rate(tmp_path: Path, schedule: str, lowered: bool) -> None:
    still = [(2.0, 2.0)] + [(1.0, 1.0)] * (1 + IN_A_ROW)
    rates, run = watched(tmp_path / "run", still, schedule)
    assert rates[-2:] == [RATE, RATE / 2 if lowered else RATE]
    assert causes(run) == ([STANDS_STILL] if lowered else [])


def test_it_is_not_tried_for_ever(tmp_path: Path) -> None:
    rises = [(2.0 * 1.2**step, 2.0 * 1.2**step) for step in range(30)]
    rates, run = watched(tmp_path / "run", rises)
    assert rates[-1] == RATE / 8
    assert causes(run)[:3] == [DIVERGES] * 3


@hypothesis_settings(max_examples=20)
@given(st.lists(st.floats(0.9, 0.99), min_size=3, max_size=12))
def test_losses_that_fall_change_nothing(tmp_path_factory: pytest.TempPathFactory, falls: list[float]) -> None:
    losses = [3.0]
    for factor in falls:
        losses.append(losses[-1] * factor)
    rates, run = watched(tmp_path_factory.mktemp("falls") / "run", [(loss, loss) for loss in losses], "constant")
    assert set(rates) == {RATE}
    assert causes(run) == []


def test_in_a_real_run_that_stands_still(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    """At a rate that teaches nothing."""
    how: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-7, "schedule": "constant", "evaluate.every_steps": 2}
    tune(family_model("llama"), tmp_path / "run", **how)
    (incident,), (recovery,) = events(tmp_path / "run", "incident"), events(tmp_path / "run", "recovery")
    assert (incident["kind"], incident["cause"]) == ("divergence", STANDS_STILL)
    rates = {step: rate for step, _, _, rate, *_ in history(tmp_path / "run")}
    assert {step: rate for step, rate in rates.items() if step > recovery["step"]} == {5: 5e-8, 6: 5e-8}


def test_a_run_that_learns_is_left_alone(tmp_path: Path) -> None:
    tune("builtin:tiny", tmp_path / "run", max_steps=10, schedule="constant", **{"evaluate.every_steps": 2})
    found = evaluations(tmp_path / "run")
    assert found[10] < found[0]
    assert not events(tmp_path / "run", "incident")
