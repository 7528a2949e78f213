"""The nearest plans that fit, where the one asked for does not: what each changes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmtune.config import RunConfig
from llmtune.models import spec_from_entry
from llmtune.planning.choice import Choice
from llmtune.planning.model_choice import contenders
from llmtune.planning.notices import devices_like, launch_command
from llmtune.planning.plan import Alternative, Plan
from llmtune.planning.request import PlanRequest
from llmtune.presets import CatalogueEntry, Preset, find_entry

MOST_SHOWN = 5
# A model with so many times fewer parameters is no replacement. llmtune: chosen.
MUCH_SMALLER = 20
# What a change costs beside time, the smallest first: settings given back to the planner; optimizer states or weights
# in fewer bits; a few rows; another model; many rows. llmtune: chosen.
NOTHING, FEWER_BITS, FEW_ROWS, OTHER_MODEL, MANY_ROWS = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One way out: the request it makes, the flags for it, and what it loses."""

    request: PlanRequest
    flags: str
    rank: int
    loses: str


def nearest_plans(request: PlanRequest, plan_of: Callable[[PlanRequest], Plan]) -> list[tuple[Alternative, Plan]]:
    """Plans that fit, ranked by what they lose and then by their time; at most five.

    Single changes first; where none is enough but a much smaller model, what the user fixed is given back to the
    planner together with each.
    """
    found = _fitting(request, plan_of)
    free = [*_given_back(request), *(["train.method"] if request.config.train.method else [])]
    if free and all(_is_far(request, change) for change, _ in found):
        flags = " ".join(_flag(key, None) for key in free)
        given_back = _fitting(replace(request, config=_changed(request.config, dict.fromkeys(free))), plan_of)
        found = [(replace(change, flags=f"{flags} {change.flags}"), plan) for change, plan in given_back] or found
    found.sort(key=lambda one: (one[0].rank, one[1].time.total_seconds))
    return [(_alternative(change, plan), plan) for change, plan in found[:MOST_SHOWN]]


def _is_far(request: PlanRequest, change: Change) -> bool:
    """Return whether a change only offers a model that is no replacement for the one asked for."""
    return change.rank == OTHER_MODEL and change.request.spec.parameters * MUCH_SMALLER < request.spec.parameters


def _alternative(change: Change, plan: Plan) -> Alternative:
    return Alternative(
        flags=change.flags,
        peak_bytes=plan.memory.peak_bytes,
        total_seconds=plan.time.total_seconds,
        loses=change.loses,
    )


def _fitting(request: PlanRequest, plan_of: Callable[[PlanRequest], Plan]) -> list[tuple[Change, Plan]]:
    found: list[tuple[Change, Plan]] = []
    for change in _changes(request):
        if change.rank == OTHER_MODEL and any(other.rank == OTHER_MODEL for other, _ in found):
            continue  # the best of the smaller models is enough
        plan = plan_of(change.request)
        if plan.fits:
            found.append((change, plan))
    return found


def _changes(request: PlanRequest) -> Iterator[Change]:
    yield from _settings(request)
    if (count := devices_like(request)) > 1 and request.processes == 1 and request.device.type == "cuda":
        spread = replace(request, processes=count, sharding="fsdp2")
        if request.config.train.method != "qlora":
            yield Change(
                request=spread, flags=launch_command(request, "fsdp2", count), rank=NOTHING, loses=f"on {count} GPUs"
            )
    yield from _shorter_rows(request)
    yield from _smaller_models(request)


def _settings(request: PlanRequest) -> Iterator[Change]:
    """What the user fixed, given back to the planner or set to what takes less."""
    train, config = request.config.train, request.config

    def changed(key: str, value: Any, rank: int, loses: str) -> Change:
        settings = {key: value}
        return Change(
            request=replace(request, config=_changed(config, settings)), flags=_flag(key, value), rank=rank, loses=loses
        )

    for key in _given_back(request):
        yield changed(key, None, NOTHING, "")
    if train.activation_checkpointing is False:
        yield changed("train.activation_checkpointing", True, NOTHING, "slower")
    if train.packing:
        yield changed("train.packing", False, NOTHING, "rows are padded")
    if train.precision in ("fp32", "tf32") or (request.kind == "cpu" and train.precision is None):
        yield changed("train.precision", "bf16", FEWER_BITS, "bf16 arithmetic")
    if train.method == "full":
        yield changed("train.method", "lora", NOTHING, "an adapter instead of all weights")
    if train.method in ("lora", "full") and request.device.type != "mps":
        yield changed("train.method", "qlora", FEWER_BITS, "4-bit base weights")


def _given_back(request: PlanRequest) -> list[str]:
    """Settings that only decide how memory is used, where the user has fixed them."""
    leaves = ("token_budget", "micro_batch_size", "checkpoint_every", "optimizer")
    return [f"train.{leaf}" for leaf in leaves if getattr(request.config.train, leaf) is not None]


def _shorter_rows(request: PlanRequest) -> Iterator[Change]:
    stats, asked = request.stats, request.config.data.max_length
    longest = min(stats.length_max, asked or stats.length_max)
    seen: set[int] = set()
    for length, percent, rank in (
        (stats.length_p99, 1, FEW_ROWS),
        (stats.length_p95, 5, FEW_ROWS),
        (stats.length_p50, 50, MANY_ROWS),
    ):
        if not 16 <= length < longest or length in seen:
            continue
        seen.add(length)
        settings = {"data.max_length": length, "data.too_long": "drop"}
        yield Change(
            request=replace(request, config=_changed(request.config, settings)),
            flags=" ".join(_flag(key, value) for key, value in settings.items()),
            rank=rank,
            loses=f"drops about {max(1, round(stats.rows * percent / 100)):,} rows",
        )


def _smaller_models(request: PlanRequest) -> Iterator[Change]:
    """Catalogued models below this one, the best first; their rows are as long in bytes, not in tokens."""
    here = find_entry(request.spec.id)
    for entry in contenders(gated=False):
        if entry.parameters >= request.spec.parameters or not _may_fit(request, entry):
            continue
        scale = here.bytes_per_token / entry.bytes_per_token if here else 1.0
        counts = ("tokens", "supervised_tokens", "length_p50", "length_p95", "length_p99", "length_max")
        stats = replace(request.stats, **{name: round(getattr(request.stats, name) * scale) for name in counts})
        if stats.length_max > entry.context:
            continue
        smaller = replace(
            request,
            spec=spec_from_entry(entry),
            preset=Preset.load(entry.family),
            stats=stats,
            model_choice=Choice(entry.id, "a smaller model", "derived"),
        )
        yield Change(request=smaller, flags=f"--model {entry.id}", rank=OTHER_MODEL, loses="a smaller model")


def _may_fit(request: PlanRequest, entry: CatalogueEntry) -> bool:
    """By the least memory that the catalogue knows of it, which spares making most of the plans that do not fit."""
    least = entry.minimum_memory_bytes
    asked = request.config.train.method
    return (least[asked] if asked else min(least.values())) <= request.device.free_bytes


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for key, value in changes.items():
        group, leaf = key.split(".")
        part = getattr(config, group).model_copy(update={leaf: value})
        config = config.model_copy(update={group: part})
    return config


def _flag(key: str, value: Any) -> str:
    if key == "train.method":
        return f"--method {value or 'auto'}"
    written = {None: "auto", True: "true", False: "false"}
    return f"--set {key}={written.get(value, value)}"
