"""From a YAML file to the facts of a preset, with every problem of the file reported at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, LlmtuneError, did_you_mean
from llmtune.presets.facts import GOALS, METHODS, SIZES, CatalogueEntry, Level, ModelShape, RateRule, Recognition
from llmtune.units import parse_bytes

Parser = Callable[[Any], Any]
_MISSING: Any = object()
EVERY = "every"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One key of a YAML mapping: how its value is read, and what it is when the key is absent."""

    parse: Parser
    default: Any = _MISSING


def whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"got {value!r}, expected a whole number")
    return value


def number(value: Any) -> float:
    """A finite number; ``1e-4``, which YAML 1.1 reads as text, is accepted."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"got {value!r}, expected a number")
    return result


def text(value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"got {value!r}, expected a text")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list):
        raise ValueError(f"got {value!r}, expected a list of texts")
    return tuple(text(item) for item in value)


def switch(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected true or false")
    return value


def size_in_bytes(value: Any) -> int:
    """A size such as ``24GiB``."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"got {value!r}, expected a size such as 24GiB")
    return parse_bytes(value)


LEVEL_FIELDS: dict[str, Parser] = {
    "epochs": number,
    "learning_rate": number,
    "rank": whole,
    "alpha": whole,
    "dropout": number,
    "schedule": text,
    "warmup_ratio": number,
    "weight_decay": number,
    "evals_per_epoch": number,
    "saves_per_epoch": number,
}
_RECOGNISE_FIELDS = {
    "names": Field(parse=texts, default=()),
    "architectures": Field(parse=texts, default=()),
    "model_types": Field(parse=texts, default=()),
    "name_required": Field(parse=switch, default=False),
}
_SHAPE_FIELDS = {
    **{
        name: Field(parse=whole)
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp_width", "vocabulary")
    },
    "gated_mlp": Field(parse=switch),
    "tied_head": Field(parse=switch),
}


def preset_files() -> dict[str, Path]:
    """Family -> the YAML file that describes it.

    In a wheel the files lie inside the package; in an editable install they are the checkout's ``presets/``.

    Raises:
        LlmtuneError: The installation holds no preset files.
    """
    packaged = Path(str(resources.files("llmtune.presets"))) / "data"
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "presets"
    files = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not files:
        raise LlmtuneError(f"no preset files in {packaged} or {folder}: the installation is damaged; install it again")
    return files


def read_preset(path: Path) -> dict[str, Any]:
    """The constructor arguments of ``Preset`` that a file describes.

    Raises:
        ConfigError: The file cannot be read, or has unknown, missing or ill-typed entries; all are listed.
    """
    problems: list[str] = []
    facts = _read_document(_parse(path), problems)
    if problems:
        raise ConfigError(str(path), problems)
    return facts


def _parse(path: Path) -> Any:
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; expected a preset in YAML"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"is not valid YAML: {' '.join(str(error).split())}"]) from None


def take(node: Any, where: str, fields: Mapping[str, Field], problems: list[str]) -> dict[str, Any]:
    """The values of one mapping; what is wrong with it is added to ``problems`` and left out of the result."""
    prefix = f"{where}." if where else ""
    if not isinstance(node, Mapping):
        problems.append(f"{where or 'file'}: got {_shown(node)}, expected a mapping with the keys {', '.join(fields)}")
        return {}
    problems += [f"{prefix}{key}: unknown key{did_you_mean(str(key), fields)}" for key in node if key not in fields]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in node:
            if field.default is _MISSING:
                problems.append(f"{prefix}{name}: is missing")
            else:
                values[name] = field.default
            continue
        try:
            values[name] = field.parse(node[name])
        except ValueError as error:
            problems.append(f"{prefix}{name}: {error}")
    return values


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _anything(value: Any) -> Any:
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else text(value)


def _read_document(document: Any, problems: list[str]) -> dict[str, Any]:
    fields = {
        "family": Field(parse=text),
        "title": Field(parse=text),
        "notice": Field(parse=_optional_text, default=None),
        "recognise": Field(parse=_anything),
        "sources": Field(parse=_anything),
        "lora_targets": Field(parse=texts),
        "rate": Field(parse=_anything, default=None),
        "chat_template": Field(parse=_optional_text, default=None),
        "levels": Field(parse=_anything),
        "catalogue": Field(parse=_anything, default=[]),
    }
    top = take(document, "", fields, problems)
    sources = _read_sources(top.get("sources", {}), problems)
    rate = _read_rate(top.pop("rate", None), sources, problems)
    recognition = take(top.pop("recognise", {}), "recognise", _RECOGNISE_FIELDS, problems)
    levels = _read_levels(top.pop("levels", {}), sources, problems)
    catalogue = _read_catalogue(top.pop("catalogue", []), str(top.get("family")), sources, problems)
    if problems:
        return {}
    del top["sources"]
    return {**top, "recognition": Recognition(**recognition), "levels": levels, "rate": rate, "catalogue": catalogue}


def _read_rate(node: Any, sources: Mapping[str, str], problems: list[str]) -> RateRule | None:
    """Read ``{hidden: WIDTH, exponent: [value, source]}``."""
    if node is None:
        return None
    before = len(problems)
    fields = {"hidden": Field(parse=whole), "exponent": Field(parse=_sourced(number, sources))}
    values = take(node, "rate", fields, problems)
    if len(problems) > before:
        return None
    exponent, source = values["exponent"]
    return RateRule(hidden=values["hidden"], exponent=exponent, source=source)


def _read_sources(node: Any, problems: list[str]) -> dict[str, str]:
    if not isinstance(node, Mapping):
        problems.append(f"sources: got {_shown(node)}, expected a mapping of short names to texts")
        return {}
    return take(node, "sources", {str(key): Field(parse=text) for key in node}, problems)


def _source_of(key: Any, sources: Mapping[str, str]) -> str:
    if not isinstance(key, str) or key not in sources:
        raise ValueError(f"source {_shown(key)} is not one of 'sources'{did_you_mean(str(key), sources)}")
    return sources[key]


def _sourced(parse: Parser, sources: Mapping[str, str]) -> Parser:
    """Reads ``[value, source]`` as ``(value, text of the source)``."""

    def read(node: Any) -> tuple[Any, str]:
        if not isinstance(node, list) or len(node) != 2:
            raise ValueError(f"got {_shown(node)}, expected [value, source]: every number carries its source")
        return parse(node[0]), _source_of(node[1], sources)

    return read


def _read_levels(node: Any, sources: Mapping[str, str], problems: list[str]) -> dict[str, dict[str, Level]]:
    """Numbers under ``every`` hold for all goals, those under ``<goal>.every`` for all sizes of that goal."""
    before = len(problems)
    numbers = {name: Field(parse=_sourced(parse, sources), default=None) for name, parse in LEVEL_FIELDS.items()}
    goals = take(node, "levels", _branches(GOALS), problems)
    shared = _given(take(goals.get(EVERY, {}), "levels.every", numbers, problems))
    given: dict[tuple[str, str], dict[str, Any]] = {}
    for goal in GOALS:
        sizes = take(goals.get(goal, {}), f"levels.{goal}", _branches(SIZES), problems)
        of_goal = shared | _given(take(sizes.get(EVERY, {}), f"levels.{goal}.every", numbers, problems))
        for size in SIZES:
            where = f"levels.{goal}.{size}"
            given[goal, size] = of_goal | _given(take(sizes.get(size, {}), where, numbers, problems))
    if len(problems) > before:
        return {}
    for (goal, size), pairs in given.items():
        missing = [name for name in LEVEL_FIELDS if name not in pairs]
        if missing:
            problems.append(f"levels.{goal}.{size}: {', '.join(missing)} missing here and under 'every'")
    if len(problems) > before:
        return {}
    return {goal: {size: _level(given[goal, size]) for size in SIZES} for goal in GOALS}


def _level(pairs: Mapping[str, tuple[Any, str]]) -> Level:
    values = {name: value for name, (value, _) in pairs.items()}
    return Level(**values, sources={name: source for name, (_, source) in pairs.items()})


def _branches(names: Iterable[str]) -> dict[str, Field]:
    return {name: Field(parse=_anything, default={}) for name in (EVERY, *names)}


def _given(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pair for name, pair in numbers.items() if pair is not None}


def _read_catalogue(
    node: Any, family: str, sources: Mapping[str, str], problems: list[str]
) -> tuple[CatalogueEntry, ...]:
    if not isinstance(node, list):
        problems.append(f"catalogue: got {_shown(node)}, expected a list of models")
        return ()
    fields = {
        "id": Field(parse=text),
        "model_type": Field(parse=text),
        "architecture": Field(parse=text),
        "parameters": Field(parse=whole),
        "context": Field(parse=whole),
        "licence": Field(parse=text),
        "gated": Field(parse=switch),
        "instruct": Field(parse=switch),
        "minimum_memory": Field(parse=_anything),
        "shape": Field(parse=_anything),
        "released": Field(parse=text),
        "bytes_per_token": Field(parse=number),
        "source": Field(parse=lambda keys: "; ".join(_source_of(key, sources) for key in texts(keys))),
    }
    memory_fields = {method: Field(parse=size_in_bytes) for method in METHODS}
    entries = []
    for index, item in enumerate(node):
        named = isinstance(item, Mapping) and isinstance(item.get("id"), str)
        where = f"catalogue.{item['id'] if named else index}"
        before = len(problems)
        values = take(item, where, fields, problems)
        shape = take(values.pop("shape", {}), f"{where}.shape", _SHAPE_FIELDS, problems)
        memory = take(values.pop("minimum_memory", {}), f"{where}.minimum_memory", memory_fields, problems)
        if len(problems) == before:
            entries.append(
                CatalogueEntry(**values, family=family, shape=ModelShape(**shape), minimum_memory_bytes=memory)
            )
    return tuple(entries)
