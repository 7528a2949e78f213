"""Whether the numbers of a preset make sense: ranges, and facts that have to agree with each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmtune.presets.facts import GOALS, METHODS, SCHEDULES, SIZES, CatalogueEntry, Level

if TYPE_CHECKING:
    from llmtune.presets.preset import Preset

# Norms and biases, which the shape does not count, are below this share of every catalogued model.
PARAMETER_TOLERANCE = 0.005
_NOT_NUMBERS = ("sources",)


def problems_of(preset: Preset) -> list[str]:
    """One sentence per thing that is wrong with a preset; empty when it can be used."""
    return [*_of_family(preset), *_of_levels(preset), *_of_catalogue(preset)]


def _of_family(preset: Preset) -> Iterator[str]:
    if not preset.lora_targets:
        yield "lora_targets: is empty, expected names of linear modules, or all-linear"
    if "all-linear" in preset.lora_targets and len(preset.lora_targets) > 1:
        yield "lora_targets: all-linear stands beside other names, expected it alone"
    for pattern in preset.recognition.names:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"recognise.names: {pattern!r} is no regular expression: {error}"
    if preset.recognition.name_required and not preset.recognition.names:
        yield "recognise.name_required: is true, but recognise.names is empty"
    if preset.rate is not None and not (preset.rate.hidden >= 1 and 0 <= preset.rate.exponent <= 2):
        yield f"rate: got {preset.rate.hidden} and {preset.rate.exponent}, expected a width and an exponent in [0, 2]"
    if preset.chat_template is not None and "eos_token" not in preset.chat_template:
        yield "chat_template: does not mention eos_token, so the model would never learn to stop"


def _of_levels(preset: Preset) -> Iterator[str]:
    for goal in GOALS:
        for size in SIZES:
            level = preset.levels.get(goal, {}).get(size)
            if level is None:
                yield f"levels.{goal}.{size}: is missing"
            else:
                yield from (f"levels.{goal}.{size}.{problem}" for problem in _of_level(level))


def _of_level(level: Level) -> Iterator[str]:
    rules = (
        ("epochs", level.epochs > 0, "above 0"),
        ("learning_rate", 0 < level.learning_rate <= 1, "in (0, 1]"),
        ("rank", level.rank >= 1, "of 1 or more"),
        ("alpha", level.alpha > 0, "above 0"),
        ("dropout", 0 <= level.dropout < 1, "in [0, 1)"),
        ("warmup_ratio", 0 <= level.warmup_ratio < 1, "in [0, 1)"),
        ("weight_decay", 0 <= level.weight_decay <= 1, "in [0, 1]"),
        ("evals_per_epoch", level.evals_per_epoch > 0, "above 0"),
        ("saves_per_epoch", level.saves_per_epoch > 0, "above 0"),
    )
    for name, holds, expected in rules:
        if not holds:
            yield f"{name}: got {getattr(level, name)}, expected a number {expected}"
    if level.schedule not in SCHEDULES:
        yield f"schedule: got {level.schedule!r}, expected one of {', '.join(SCHEDULES)}"
    for name in level.__dataclass_fields__:
        if name not in _NOT_NUMBERS and not level.sources.get(name, "").strip():
            yield f"{name}: has no source"


def _of_catalogue(preset: Preset) -> Iterator[str]:
    for model_id, count in Counter(entry.id for entry in preset.catalogue).items():
        if count > 1:
            yield f"catalogue.{model_id}: is listed {count} times"
    for entry in preset.catalogue:
        yield from (f"catalogue.{entry.id}.{problem}" for problem in _of_entry(preset, entry))


def _of_entry(preset: Preset, entry: CatalogueEntry) -> Iterator[str]:
    shape, memory = entry.shape, entry.minimum_memory_bytes
    counted = shape.matrix_parameters
    if abs(entry.parameters - counted) > PARAMETER_TOLERANCE * entry.parameters:
        yield f"parameters: got {entry.parameters:,}, but the shape has {counted:,}"
    if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        yield f"shape: {shape.heads} heads cannot share {shape.kv_heads} key and value heads"
    if entry.context < 1:
        yield f"context: got {entry.context}, expected a number of tokens"
    if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", entry.released):
        yield f"released: got {entry.released!r}, expected year and month such as 2025-04"
    if not 1 <= entry.bytes_per_token <= 10:
        yield f"bytes_per_token: got {entry.bytes_per_token}, expected a number in [1, 10]"
    if not all(memory.get(method, 0) > 0 for method in METHODS):
        yield f"minimum_memory: expected a size for each of {', '.join(METHODS)}"
    elif max(memory["qlora"], memory["lora"]) > memory["full"]:  # qlora holds a large embedding in fp32, lora in bf16
        yield "minimum_memory: expected qlora <= full and lora <= full"
    if not preset.recognition.allows(entry.model_type, entry.architecture):
        yield f"architecture: {entry.architecture} is not one that the family is recognised by"
    if not entry.source.strip():
        yield "source: is missing"
