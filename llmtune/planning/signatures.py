"""Check the arguments of a schedule or an optimizer against the real function or class; loads torch when it is needed.

Only a run that is given such arguments is checked here, so a plan without them loads nothing.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from llmtune.errors import did_you_mean

# What a class raises for a value that it cannot use.
REFUSALS = (ValueError, TypeError, ArithmeticError, NotImplementedError, AssertionError, RuntimeError, AttributeError)
# Steps of the schedule that are tried, spread over the run.
TRIED_STEPS = 64
ROUNDING = 1e-6


@cache
def load(factory: str) -> Callable[..., Any]:
    """Return the function or class of ``module:name``."""
    module, _, name = factory.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def argument_problems(
    factory: str, asked: Mapping[str, Any], decided: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[str]:
    """Return one sentence for each argument that does not exist, is decided elsewhere or has the wrong type.

    Args:
        factory: ``module:name`` of the function or class.
        asked: The arguments that were given.
        decided: Arguments that another key decides, and what to do instead.
        defaults: The arguments that llmtune sets, with their values.
    """
    parameters = inspect.signature(load(factory)).parameters
    known = [name for name in parameters if name not in decided]
    problems = []
    for name, value in asked.items():
        if name in decided and name in {*parameters, "lr", "weight_decay", "mode"}:
            problems.append(f"{name}: cannot be given here; {decided[name]}")
        elif name not in known:
            hint = did_you_mean(name, known) if known else "; this one takes no arguments"
            problems.append(f"{name}: unknown argument{hint}")
        elif (expected := _mismatch(value, parameters[name], defaults.get(name))) is not None:
            problems.append(f"{name}: got {_shown(value)}, expected {expected}")
    return problems


def optimizer_refusal(factory: str, arguments: Mapping[str, Any]) -> str | None:
    """Build the optimizer for one weight; return its objection to the arguments, or None."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(factory)([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, **arguments)
    except REFUSALS as error:
        return " ".join(str(error).split())
    return None


def schedule_refusal(
    name: str, arguments: Mapping[str, Any], *, learning_rate: float, warmup: int, updates: int
) -> str | None:
    """Build the schedule for one weight and follow it to its end; return the problem, or None."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=warmup,
                num_training_steps=updates,
                scheduler_specific_kwargs=dict(arguments),
            )
            for step in sorted({round(i * (updates - 1) / TRIED_STEPS) for i in range(TRIED_STEPS + 1)}):
                for factor in getattr(scheduler, "lr_lambdas", ()):
                    if (problem := _no_rate(factor(step), step, learning_rate)) is not None:
                        return problem
    except REFUSALS as error:
        return " ".join(str(error).split())
    return None


def _no_rate(factor: Any, step: int, peak: float) -> str | None:
    if isinstance(factor, complex) or not 0 <= factor <= 1 + ROUNDING:
        shown = factor if isinstance(factor, complex) else f"{factor * peak:g}"
        return f"the learning rate of update {step + 1} would be {shown}; expected one from 0 to the peak, {peak:g}"
    return None


def _mismatch(value: Any, parameter: inspect.Parameter, default: Any) -> str | None:
    """Return what was expected instead of ``value``; None where the value has the right type."""
    sample = default if default is not None else parameter.default
    if value is None:
        return None if parameter.default is None else _expected(parameter, sample)[0]
    expected, fits = _expected(parameter, sample)
    return None if fits(value) else expected


def _expected(parameter: inspect.Parameter, sample: Any) -> tuple[str, Callable[[Any], bool]]:
    """Return the type of a parameter in words, and a check of it: by its annotation, else by its default."""
    annotation = "" if parameter.annotation is inspect.Parameter.empty else str(parameter.annotation)
    words = set(re.findall(r"[A-Za-z_]+", annotation))
    if isinstance(sample, tuple | list):
        count = len(sample)
        return f"a list of {count} numbers", lambda value: _is_list(value, count)
    if "bool" in words or isinstance(sample, bool):
        return "true or false", lambda value: isinstance(value, bool)
    if "float" in words or isinstance(sample, float):
        return "a number", _is_number
    if "int" in words or isinstance(sample, int):
        return "an integer", lambda value: _is_number(value) and float(value).is_integer()
    if words & {"str", "Literal"} or isinstance(sample, str):
        return "a text", lambda value: isinstance(value, str)
    return "a number", _is_number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == count and all(map(_is_number, value))


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
