"""The search space: which keys of the configuration vary, and between what."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig, load_config
from llmtune.config.keys import resolve_key
from llmtune.config.schema import kinds_of
from llmtune.errors import ConfigError, did_you_mean

# Other groups decide what trials are judged on, where they are written or who is told.
SEARCHABLE_GROUPS = ("train", "adapter")
FIELDS = ("low", "high", "log", "step", "choices")
# Trials of one study share them, so that only what is searched differs.
NOT_SEARCHED = ("train.seed", "train.num_workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One key that varies: from ``low`` to ``high`` (both included), or over ``choices``.

    Attributes:
        key: ``group.leaf`` of the configuration.
        integer: Whether its values are whole numbers.
        log: Whether equal ratios count as equal distances.
        step: Distance between neighbouring values; None is continuous, or 1 for whole numbers.
    """

    key: str
    integer: bool
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[float, ...] = ()

    @property
    def _bounds(self) -> tuple[float, float]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def contains(self, value: float) -> bool:
        """Whether a trial could get ``value``."""
        if self.choices:
            return value in self.choices
        low, high = self._bounds
        if not low <= value <= high or (self.integer and value != int(value)):
            return False
        steps = (value - low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-8

    def points(self) -> tuple[float, ...]:
        """The values a grid takes: choices, steps, or low, middle and high of a continuous range."""
        if self.choices:
            return self.choices
        low, high = self._bounds
        if self.step:
            count = int((high - low) / self.step + 1e-8) + 1
            values = [low + number * self.step for number in range(count)]
        else:
            values = [low, math.sqrt(low * high) if self.log else (low + high) / 2, high]
        return tuple(dict.fromkeys(round(value) if self.integer else value for value in values))

    def suggest(self, trial: Any) -> float:
        """The value that Optuna gives this trial."""
        value: float
        if self.choices:
            value = trial.suggest_categorical(self.key, list(self.choices))
        elif self.integer:
            low, high = (int(bound) for bound in self._bounds)
            value = trial.suggest_int(self.key, low, high, step=int(self.step or 1), log=self.log)
        else:
            value = trial.suggest_float(self.key, *self._bounds, step=self.step, log=self.log)
        return value

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``study.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Dimension:
        """The inverse of ``to_json``."""
        return cls(**{**document, "choices": tuple(document["choices"])})


def default_space(defaults: Mapping[str, float | None], *, full: bool, fixed: Sequence[str]) -> tuple[Dimension, ...]:
    """What is searched when nothing is said: the numbers that matter most for an adapter, around the preset's.

    Alpha is left to follow the rank at the preset's ratio: ratio and learning rate scale an update alike, so searching
    both would search one thing twice.

    Args:
        defaults: The preset's own value of each key.
        full: Full fine-tuning, which has no adapter.
        fixed: Keys that the user has set; they stay as they are.

    Raises:
        ConfigError: The user has set every key that would be searched.
    """
    rate, decay = defaults["train.learning_rate"], defaults["train.weight_decay"]
    assert rate is not None
    assert decay is not None
    space = [
        Dimension(key="train.learning_rate", integer=False, low=rate / 5, high=min(rate * 5, 1.0), log=True),
        Dimension(key="train.weight_decay", integer=False, low=0.0, high=max(0.1, decay)),
    ]
    if not full:
        rank, dropout = defaults["adapter.rank"], defaults["adapter.dropout"]
        assert rank is not None
        assert dropout is not None
        ranks = sorted({max(1, int(rank * factor)) for factor in (1 / 4, 1 / 2, 1, 2, 4)})
        space.append(Dimension(key="adapter.rank", integer=True, choices=tuple(ranks)))
        space.append(Dimension(key="adapter.dropout", integer=False, choices=tuple(sorted({0.0, 0.05, 0.1, dropout}))))
    left = tuple(dimension for dimension in space if dimension.key not in fixed)
    if not left:
        raise ConfigError("study", [f"nothing is left to search: {', '.join(fixed)} are set; name others with --space"])
    return left


def read_space(space: str | Path | Mapping[str, Any]) -> tuple[Dimension, ...]:
    """The space of a YAML file or a mapping: ``learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}``.

    Raises:
        ConfigError: The file cannot be read, or keys or ranges cannot be used; every problem at once.
    """
    where = "space" if isinstance(space, Mapping) else str(space)
    document = space if isinstance(space, Mapping) else _read_file(Path(space))
    dimensions: list[Dimension] = []
    problems: list[str] = []
    for given, entry in _opened(document).items():
        try:
            key = resolve_key(given)
        except ValueError as error:
            problems.append(str(error))
            continue
        if any(dimension.key == key for dimension in dimensions):
            problems.append(f"{given}: is given twice")
            continue
        found = _dimension(key, entry)
        if isinstance(found, Dimension):
            dimensions.append(found)
        else:
            problems += [f"{given}: {problem}" for problem in found]
    if not problems and not dimensions:
        problems = ["is empty; expected keys such as `learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}`"]
    if problems:
        raise ConfigError(where, problems)
    return tuple(dimensions)


def grid(space: Sequence[Dimension], seed: int) -> list[dict[str, float]]:
    """Every combination of the dimensions' points, shuffled so that its beginning is spread over the space."""
    keys = [dimension.key for dimension in space]
    combinations = [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(dimension.points() for dimension in space))
    ]
    random.Random(seed).shuffle(combinations)
    return combinations


def _read_file(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; --space expects a YAML file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"is not valid YAML: {str(error).replace(chr(10), ' ')}"]) from None
    if document is not None and not isinstance(document, dict):
        raise ConfigError(
            str(path), ["expected a mapping such as `learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}`"]
        )
    return document or {}


def _opened(document: Mapping[Any, Any]) -> dict[str, Any]:
    """Groups opened one level: ``{train: {epochs: {…}}}`` -> ``train.epochs``."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if key in RunConfig.model_fields and isinstance(value, Mapping):
            flat |= {f"{key}.{leaf}": entry for leaf, entry in value.items()}
        else:
            flat[str(key)] = value
    return flat


def _dimension(key: str, entry: Any) -> Dimension | list[str]:
    """The dimension an entry describes, or what is wrong with it."""
    kind = _number_type(key)
    if key.split(".")[0] not in SEARCHABLE_GROUPS or key in NOT_SEARCHED:
        return ["all trials share it; keys of train and adapter can be searched"]
    if kind is None:
        return ["is no number; only numbers can be searched"]
    if not isinstance(entry, Mapping):
        return [f"got {entry!r}, expected {{low: …, high: …}} or {{choices: […]}}"]
    unknown = [f"'{name}' is unknown{did_you_mean(str(name), FIELDS)}" for name in entry if name not in FIELDS]
    if unknown:
        return unknown
    dimension, problems = _parsed(key, kind is int, entry)
    if dimension is None or problems:
        return problems
    values = dimension.choices or (dimension.low, dimension.high)
    return dimension if not (outside := [p for value in values for p in _refusals(key, value)]) else outside


def _parsed(key: str, integer: bool, entry: Mapping[str, Any]) -> tuple[Dimension | None, list[str]]:
    numbers = {name: _number(entry[name]) for name in ("low", "high", "step") if name in entry}
    problems = [f"{name}: got {entry[name]!r}, expected a number" for name, value in numbers.items() if value is None]
    log = entry.get("log", False)
    if not isinstance(log, bool):
        problems.append(f"log: got {log!r}, expected true or false")
    if "choices" in entry:
        listed = entry["choices"]
        values = [_number(value) for value in listed] if isinstance(listed, list | tuple) else []
        if not values or None in values:
            problems.append(f"choices: got {listed!r}, expected a list of numbers")
        if len(entry) > 1:
            problems.append("give either choices or a range, not both")
        if problems:
            return None, problems
        choices = tuple(dict.fromkeys(_whole(value) if integer else value for value in values if value is not None))
        return Dimension(key=key, integer=integer, choices=choices), []
    problems += [f"'{name}' is missing" for name in ("low", "high") if name not in entry]
    if problems:
        return None, problems
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    assert low is not None
    assert high is not None
    if low >= high:
        problems.append(f"low: got {low:g}, expected less than high ({high:g})")
    if log and low <= 0:
        problems.append(f"low: got {low:g}, expected more than 0 with log")
    if log and step is not None:
        problems.append("step and log exclude each other")
    if step is not None and step <= 0:
        problems.append(f"step: got {step:g}, expected more than 0")
    if integer and any(value is not None and value != int(value) for value in (low, high, step)):
        problems.append("is a whole number; low, high and step must be too")
    return Dimension(key=key, integer=integer, low=low, high=high, log=log, step=step), problems


def _number(value: Any) -> float | None:
    """A finite number; text too, because YAML 1.1 reads ``1e-4`` as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(value: float) -> float:
    """``8`` for ``8.0``; a value with a fraction stays for the configuration to refuse."""
    return int(value) if value == int(value) else value


def _refusals(key: str, value: float | None) -> list[str]:
    """What the configuration has against ``value``."""
    try:
        load_config({key: value}, environ={})
    except ConfigError as error:
        return [problem.removeprefix(f"{key}: ") for problem in error.problems]
    return []


def _number_type(key: str) -> type | None:
    group, leaf, *below = key.split(".")
    if below:
        return None
    fields: Any = RunConfig.model_fields[group].annotation
    kinds = kinds_of(fields.model_fields[leaf].annotation)
    return next((kind for kind in (float, int) if kind in kinds), None)
