"""Whether a trial really ran with its parameters: read back from its plan, its adapter and its events."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.runs import RunDirectory, number

# Key of the configuration -> its name in peft's adapter_config.json.
ADAPTER_NAMES = {"adapter.rank": "r", "adapter.alpha": "lora_alpha", "adapter.dropout": "lora_dropout"}


def read_back(run: RunDirectory, params: Mapping[str, float]) -> None:
    """Compare what a trial asked for with what its run left behind.

    Args:
        run: The finished run.
        params: Key of the configuration -> value, as the trial asked.

    Raises:
        LlmtuneError: They differ, so the study's numbers could not be trusted; names every difference.
    """
    plan = run.latest_plan()
    choices = {name: choice["value"] for name, choice in plan["choices"].items()} if plan else {}
    differences = _of_plan(choices, params) + _of_events(run, choices, params)
    if choices.get("method") != "full":
        differences += _of_adapter(run, choices, params)
    if differences:
        raise LlmtuneError(
            f"{run.path}: the trial did not run with its parameters: {' · '.join(differences)}. The study stops, since "
            "its values would be credited to the wrong parameters. This is a defect of llmtune, or the directory was "
            "changed by hand."
        )


def _of_plan(choices: Mapping[str, Any], params: Mapping[str, float]) -> list[str]:
    names = {key: key.split(".")[1] for key in params}
    return [
        f"{key}: asked {asked:.6g}, plan has {choices[names[key]]:.6g}"
        for key, asked in params.items()
        if names[key] in choices and not _same(choices[names[key]], asked)
    ]


def _of_adapter(run: RunDirectory, choices: Mapping[str, Any], params: Mapping[str, float]) -> list[str]:
    path = run.adapter / "adapter_config.json"
    try:
        adapter = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return [f"{path} cannot be read: {error}"]
    wanted = {key: params.get(key, choices.get(key.split(".")[1])) for key in ADAPTER_NAMES}
    return [
        f"{key}: asked {asked}, adapter has {adapter.get(ADAPTER_NAMES[key])}"
        for key, asked in wanted.items()
        if not _same(adapter.get(ADAPTER_NAMES[key]), asked)
    ]


def _of_events(run: RunDirectory, choices: Mapping[str, Any], params: Mapping[str, float]) -> list[str]:
    """The learning rate of every update against the schedule; only the first difference is told."""
    peak = params.get("train.learning_rate", choices.get("learning_rate"))
    steps = run.steps()
    if peak is None or not steps:
        return ["no update was logged"]
    # Under fp16 the schedule waits where the loss scaler skips an update, so only the peak can be compared.
    lags = choices["precision"] == "fp16"
    factor = None if lags else _schedule(choices, peak)
    for event in steps:
        seen, wanted = number(event["learning_rate"]), peak * factor(event["step"] - 1) if factor else None
        if seen is None or (not _same(seen, wanted) if wanted is not None else seen > peak * (1 + 1e-6)):
            expected = f"{wanted:.6g}" if wanted is not None else f"at most {peak:.6g}"
            return [f"train.learning_rate: events have {seen} at step {event['step']}, expected {expected}"]
    return []


def _schedule(choices: Mapping[str, Any], peak: float) -> Callable[[int], float] | None:
    """Updates done -> share of the peak learning rate, where the schedule is a function of them alone."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        choices["schedule"],
        optimizer,
        num_warmup_steps=choices["warmup_updates"],
        num_training_steps=choices["updates"],
        scheduler_specific_kwargs=dict(choices.get("schedule_arguments") or {}),
    )
    factors: list[Callable[[int], float]] = getattr(scheduler, "lr_lambdas", [])
    return factors[0] if factors else None


def _same(left: Any, right: Any) -> bool:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-12) if numbers else left == right
