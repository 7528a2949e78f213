"""The way that was taken, as choices: why each part of it, and what more or less memory would make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmtune.planning.batching import why_budget
from llmtune.planning.choice import Choice
from llmtune.planning.memory import USABLE_SHARE
from llmtune.planning.request import PlanRequest
from llmtune.planning.ways import FASTEST_WITHIN, OPTIMIZER, OPTIMIZER_8BIT, Search, Way
from llmtune.units import format_bytes

EVERY = {0: "none recomputed", 1: "every layer recomputed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WayChoices:
    """What the search decided."""

    method: Choice[str]
    activation_checkpointing: Choice[bool]
    checkpoint_every: Choice[int]
    activation_offload: Choice[bool]
    optimizer: Choice[str]
    token_budget: Choice[int]


def explain(request: PlanRequest, search: Search, *, uncorrected: Search | None, alternatives: bool) -> WayChoices:
    """The parts of the best way with their reasons.

    Args:
        request: The facts.
        search: What was found.
        uncorrected: What the formulas alone would have found; where it differs, measurements decided.
        alternatives: Whether to say what other amounts of memory would lead to.
    """

    def decided(part: Callable[[Way], Any], choice: Choice[Any], shown: Callable[[Any], str] = str) -> Choice[Any]:
        if choice.source == "user":
            return choice
        if alternatives:
            choice = replace(choice, changes=", ".join(filter(None, [search.changes(part, shown), choice.changes])))
        if uncorrected is None or part(uncorrected.best.way) == part(search.best.way):
            return choice
        found = f"{shown(part(uncorrected.best.way))} by the formulas alone, but {request.correction.reason}"
        return replace(choice, source="measured", reason=f"{choice.reason}; {found}")

    fits = search.memory(search.best).fits
    return WayChoices(
        method=decided(lambda way: way.method, _method(request, search)),
        activation_checkpointing=decided(
            lambda way: way.checkpoint_every > 0, _checkpointing(request, search), lambda on: "yes" if on else "no"
        ),
        checkpoint_every=decided(lambda way: way.checkpoint_every, _checkpoint_every(request, search), _every),
        activation_offload=decided(
            lambda way: way.offload, _offload(request, search), lambda on: "yes" if on else "no"
        ),
        optimizer=decided(lambda way: way.optimizer, _optimizer(request, search)),
        token_budget=decided(
            lambda way: way.token_budget,
            why_budget(request, search.best.way.token_budget, fits=fits, short_of_memory=_short_of_memory(search)),
            lambda budget: f"{budget:,}",
        ),
    )


def _short_of_memory(search: Search) -> bool:
    """Whether the way that was taken would be faster with a larger budget that does not fit."""
    best = search.best
    alike = [one for one in search.candidates if replace(one.way, token_budget=best.way.token_budget) == best.way]
    larger = [one for one in alike if one.load.budget > best.load.budget and not search.memory(one).fits]
    return any(FASTEST_WITHIN * one.seconds < best.seconds for one in larger)


def _method(request: PlanRequest, search: Search) -> Choice[str]:
    method = search.best.way.method
    if request.config.train.method is not None:
        return Choice(method, "you set train.method", "user")
    if not search.memory(search.best).fits:
        return Choice(method, "takes the least memory, and still does not fit", "derived")
    if method == "lora":
        reason = (
            "fits in memory with the base weights as they are, the fastest way; adapters learn as much as full "
            "fine-tuning from data they have room for (LoRA Without Regret)"
        )
        return Choice(method, reason, "derived", "--method full")
    unquantised = [search.memory(one).peak_bytes for one in search.candidates if one.way.method == "lora"]
    free = format_bytes(search.memory(search.best).free_bytes * USABLE_SHARE)
    return Choice(
        method, f"4-bit base weights: lora needs {format_bytes(min(unquantised))}, {free} may be used", "derived"
    )


def _checkpointing(request: PlanRequest, search: Search) -> Choice[bool]:
    way, train = search.best.way, request.config.train
    on = way.checkpoint_every > 0
    if train.activation_checkpointing is not None:
        return Choice(on, "you set train.activation_checkpointing", "user")
    if train.checkpoint_every is not None or train.activation_offload:
        return Choice(on, "follows from your train.checkpoint_every or train.activation_offload", "derived")
    if not search.memory(search.best).fits:
        reason = "recomputing activations takes less memory" if on else "activations are not what is too large"
    elif on:
        reason = "the fastest way that fits in memory, though every recomputed layer takes up to a third longer"
    else:
        reason = "activations fit in memory, and every recomputed layer would take up to a third longer"
    return Choice(on, reason, "derived")


def _checkpoint_every(request: PlanRequest, search: Search) -> Choice[int]:
    every = search.best.way.checkpoint_every
    if request.config.train.checkpoint_every is not None:
        return Choice(every, "you set train.checkpoint_every", "user")
    reasons = {
        0: "no layer is recomputed",
        1: "every layer: keeping the activations of every second one would not fit, or gain nothing",
        2: "every second layer is enough to fit, at half the cost",
    }
    return Choice(every, reasons[every], "derived")


def _offload(request: PlanRequest, search: Search) -> Choice[bool]:
    offload = search.best.way.offload
    if request.config.train.activation_offload is not None:
        return Choice(offload, "you set train.activation_offload", "user")
    if request.device.type not in ("cuda", "xpu"):
        return Choice(False, f"there is no memory beside that of the {request.device.type} to move to", "derived")
    if offload:
        reason = "what recomputed layers start from does not fit beside the rest; copying it costs time"
        return Choice(True, reason, "derived")
    return Choice(False, "nothing has to leave the device to fit", "derived")


def _optimizer(request: PlanRequest, search: Search) -> Choice[str]:
    optimizer = search.best.way.optimizer
    if request.config.train.optimizer is not None:
        return Choice(optimizer, "you set train.optimizer", "user")
    if optimizer == OPTIMIZER:
        return Choice(optimizer, "AdamW in one kernel per step; its state fits", "default")
    moments = "AdamW with both moments in 8 bits (arXiv:2110.02861)"
    if optimizer == OPTIMIZER_8BIT:
        return Choice(
            optimizer, f"{moments}: 2 instead of 8 bytes per trained weight, without which it would not fit", "derived"
        )
    return Choice(optimizer, f"{moments}, which the driver moves to host memory when it has to", "derived")


def _every(every: int) -> str:
    return EVERY.get(every, f"every {every}. layer recomputed")
