"""Presets made to a user's requirements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmtune.errors import ConfigError
from llmtune.presets.facts import GOALS, METHODS, SIZES, CatalogueEntry, Level
from llmtune.presets.preset import GENERIC, Preset
from llmtune.presets.reading import LEVEL_FIELDS, Field, size_in_bytes, take, text
from llmtune.units import format_bytes

WHERE = "requirements"
SOURCE = "custom"
# Number of a level -> the configuration key that sets it. Evaluations and saves are set in updates, not per pass.
SETTINGS = {
    "epochs": "train.epochs",
    "learning_rate": "train.learning_rate",
    "schedule": "train.schedule",
    "warmup_ratio": "train.warmup_ratio",
    "weight_decay": "train.weight_decay",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "dropout": "adapter.dropout",
}


def customise(requirements: Mapping[str, Any]) -> Preset:
    """See ``Preset.custom``."""
    problems: list[str] = []
    fields = {
        "family": Field(parse=text, default=GENERIC),
        "goal": Field(parse=_one_of(GOALS), default=None),
        "size": Field(parse=_one_of(SIZES), default=None),
        "method": Field(parse=_one_of(METHODS), default=None),
        "max_memory": Field(parse=size_in_bytes, default=None),
        **{name: Field(parse=parse, default=None) for name, parse in LEVEL_FIELDS.items()},
    }
    wanted = take(requirements, "", fields, problems)
    family = wanted.get("family", GENERIC)
    try:
        preset = Preset.load(family)
    except ConfigError as error:
        raise ConfigError(WHERE, [*problems, *error.problems]) from None
    numbers = {name: wanted[name] for name in LEVEL_FIELDS if wanted.get(name) is not None}
    levels = {
        goal: {
            size: _override(level, numbers)
            if wanted.get("goal") in (None, goal) and wanted.get("size") in (None, size)
            else level
            for size, level in sizes.items()
        }
        for goal, sizes in preset.levels.items()
    }
    models = preset.catalogue
    if wanted.get("max_memory") is not None:
        models = _fitting(preset, wanted["max_memory"], wanted.get("method"), problems)
    preset = replace(preset, levels=levels, catalogue=models)
    problems += preset.validate()[1]
    if problems:
        raise ConfigError(WHERE, problems)
    return preset


def _one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in known:
            raise ValueError(f"got {value!r}, expected one of {', '.join(known)}")
        return str(value)

    return parse


def _override(level: Level, numbers: Mapping[str, Any]) -> Level:
    sources = {**level.sources, **dict.fromkeys(numbers, SOURCE)}
    changed = dict(numbers)
    if "rank" in numbers and "alpha" not in numbers:
        changed["alpha"] = max(1, round(level.alpha * numbers["rank"] / level.rank))
        sources["alpha"] = f"{SOURCE}: keeps alpha / rank at {level.alpha / level.rank:g}"
    return replace(level, **changed, sources=sources)


def _fitting(preset: Preset, max_bytes: int, method: str | None, problems: list[str]) -> tuple[CatalogueEntry, ...]:
    """The models whose least memory, with ``method`` or the leanest method, is within ``max_bytes``."""
    pairs = [
        (min(size for name, size in entry.minimum_memory_bytes.items() if method in (None, name)), entry)
        for entry in preset.catalogue
    ]
    fitting = tuple(entry for need, entry in pairs if need <= max_bytes)
    if pairs and not fitting:
        need, entry = min(pairs, key=lambda pair: pair[0])
        problems.append(
            f"max_memory: no model of the family {preset.family} fits in {format_bytes(max_bytes)}; the smallest, "
            f"{entry.id}, needs {format_bytes(need)}"
        )
    return fitting
