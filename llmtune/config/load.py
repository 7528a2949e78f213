"""Sources of configuration, merged in one order: keyword or flag > file > ``LLMTUNE_*`` environment > defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtune.config.schema import RunConfig
from llmtune.errors import ConfigError, did_you_mean

ENVIRONMENT_PREFIX = "LLMTUNE_"
# Read elsewhere in `config`: the run store's URL, the cache folder, and the switch that shows tracebacks.
RESERVED_ENVIRONMENT = ("LLMTUNE_STORE", "LLMTUNE_CACHE", "LLMTUNE_DEBUG")
# A bare string given for these groups means this key of theirs.
BARE_STRING_KEY = {"model": "id", "output": "dir"}


def settable_keys() -> dict[str, str]:
    """Every key as ``group.leaf`` -> its description."""
    return {
        f"{group}.{leaf}": info.description or ""
        for group, field in RunConfig.model_fields.items()
        for leaf, info in field.annotation.model_fields.items()  # type: ignore[union-attr]
    }


def _leaves() -> dict[str, list[str]]:
    leaves: dict[str, list[str]] = {}
    for key in settable_keys():
        leaves.setdefault(key.split(".")[1], []).append(key)
    return leaves


def resolve_key(key: str) -> str:
    """The full ``group.leaf[.entry]`` of a key given in full or, where unique, by its leaf alone.

    Raises:
        ValueError: The key is unknown (the nearest one is named) or its leaf stands in several groups.
    """
    known = settable_keys()
    head = ".".join(key.split(".")[:2])
    if head in known:
        if key != head and head != "data.columns":
            raise ValueError(f"{key}: '{head}' has no keys below it")
        return key
    if key in RunConfig.model_fields:
        if key in BARE_STRING_KEY:
            return f"{key}.{BARE_STRING_KEY[key]}"
        raise ValueError(
            f"{key}: is a group; give one of its keys, such as '{next(k for k in known if k.startswith(key + '.'))}'"
        )
    owners = _leaves().get(key.split(".")[0], [])
    if len(owners) == 1 and "." not in key:
        return owners[0]
    if len(owners) == 1 and owners[0] == "data.columns":
        return f"data.{key}"
    if len(owners) > 1 and "." not in key:
        raise ValueError(f"{key}: stands in several groups, give one of {', '.join(owners)}")
    group, _, leaf = key.partition(".")
    if leaf and group in RunConfig.model_fields:
        siblings = [k.split(".")[1] for k in known if k.startswith(group + ".")]
        raise ValueError(f"{key}: unknown key{did_you_mean(leaf, siblings)}")
    match = did_you_mean(key, [*known, *_leaves()])
    raise ValueError(f"{key}: unknown key{match if 'did you mean' in match else '; `llmtune train --help` lists them'}")


def _put(tree: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    group, leaf, *entry = key.split(".", 2)
    if entry:
        tree.setdefault(group, {}).setdefault(leaf, {})[entry[0]] = value
    else:
        tree.setdefault(group, {})[leaf] = value


def _flatten(document: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as given, with groups opened one level: ``{train: {epochs: 3}, rank: 8}`` -> ``train.epochs``, ``rank``."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and key in RunConfig.model_fields:
            flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; --config expects a YAML file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"is not valid YAML: {str(error).replace(chr(10), ' ')}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ConfigError(str(path), ["expected a mapping of keys such as `train: {epochs: 3}`"])
    return document


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """``LLMTUNE_TRAIN_EPOCHS`` or, where the leaf is unique, ``LLMTUNE_EPOCHS``."""
    values: dict[str, Any] = {}
    groups = tuple(RunConfig.model_fields)
    for name, text in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or name in RESERVED_ENVIRONMENT:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        group = next((g for g in groups if key.startswith(g + "_")), None)
        qualified = f"{group}.{key.removeprefix(f'{group}_')}" if group else key
        values[qualified if qualified in settable_keys() else key] = parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """The YAML meaning of a flag's text: ``3`` is a number, ``true`` a switch, ``[a, b]`` a list, ``1e-4`` a number."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return text
    return text if value is None and text not in ("null", "~", "") else value


def _merge(
    tree: dict[str, dict[str, Any]], source: Mapping[str, Any], where: str, problems: dict[str, list[str]]
) -> None:
    for key, value in _flatten(source).items():
        try:
            _put(tree, resolve_key(key), value)
        except ValueError as error:
            problems.setdefault(where, []).append(str(error))


def load_config(
    overrides: Mapping[str, Any] | None = None,
    *,
    settings: Sequence[str] = (),
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    where: str = "command line",
) -> RunConfig:
    """Merge every source into one validated configuration.

    Args:
        overrides: Keyword arguments or flags; keys in full or by unique leaf; ``None`` values are ignored.
        settings: ``key=value`` texts of ``--set``; the value is read as YAML.
        file: A YAML file.
        environ: Environment to read ``LLMTUNE_*`` from; the process's own when not given.
        where: What to call the overrides in messages.

    Raises:
        ConfigError: With every problem of the first source that has one, each with the nearest known key.
    """
    import os

    tree: dict[str, dict[str, Any]] = {}
    problems: dict[str, list[str]] = {}
    _merge(tree, _from_environment(os.environ if environ is None else environ), "environment", problems)
    if file is not None:
        _merge(tree, _read_file(Path(file)), str(file), problems)
    pairs: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            problems.setdefault("--set", []).append(f"got '{setting}', expected key=value")
            continue
        pairs[key.strip()] = parse_value(text)
    _merge(tree, {k: v for k, v in (overrides or {}).items() if v is not None}, where, problems)
    _merge(tree, pairs, "--set", problems)
    invalid = _validation_problems(tree)
    if problems or invalid:
        place = (
            next(iter(problems)) if len(problems) == 1 and not invalid else (str(file) if file and invalid else where)
        )
        raise ConfigError(place, [text for texts in problems.values() for text in texts] + invalid)
    return RunConfig.model_validate(tree)


def _validation_problems(tree: Mapping[str, Any]) -> list[str]:
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        return [
            f"{'.'.join(str(part) for part in item['loc'])}: got {_shown(item['input'])}, {_expectation(item)}"
            for item in error.errors()
        ]
    return []


def _shown(value: Any) -> str:
    return "a secret" if "SecretStr" in type(value).__name__ else repr(value)


def _expectation(item: Any) -> str:
    context = item.get("ctx", {})
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    for name, sign in bounds.items():
        if name in context:
            kind = "an integer" if isinstance(context[name], int) else "a number"
            return f"expected {kind} {sign} {context[name]:g}"
    if "expected" in context:
        return f"expected {context['expected']}"
    return f"expected: {item['msg'].removeprefix('Input should be ')}"
