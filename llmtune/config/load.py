"""Sources of configuration, merged in one order: keyword or flag > files > ``LLMTUNE_*`` environment > defaults.

Of several files the later one is taken, and of each file the overlay that ``--env`` names before the rest of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr, ValidationError

from llmtune.config.aliases import ALIASES, HINTS, REMARKS, VALUES, plain_name
from llmtune.config.keys import is_text, read_key, resolve_key, settable_keys
from llmtune.config.origin import Origin
from llmtune.config.schema import RunConfig, SourceConfig
from llmtune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from llmtune.config.layers import Layer

__all__ = ["load_config", "resolve_key"]

ENVIRONMENT_PREFIX = "LLMTUNE_"
# Names the overlay of the configuration files, as --env does.
ENV_VARIABLE = "LLMTUNE_ENV"
# Read elsewhere: the run store's URL, the cache folder, the switch that shows tracebacks, the name of the overlay.
RESERVED_ENVIRONMENT = ("LLMTUNE_STORE", "LLMTUNE_CACHE", "LLMTUNE_DEBUG", ENV_VARIABLE)
SECRET = "model.token"


@dataclass(frozen=True, slots=True)
class _Setting:
    value: Any
    where: str


@dataclass(slots=True)
class _Gathered:
    """What all sources said, by full key, and what was wrong with it: ``(source, sentence)``."""

    settings: dict[str, _Setting] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was read as something else
    of_files: dict[str, list[_Setting]] = field(default_factory=dict)  # what each file said of a key, in their order

    def add_layer(self, layer: Layer) -> None:
        """Take the keys of a configuration file; an overlay that was not chosen is only checked."""
        if not layer.is_chosen:
            alone = _Gathered()
            alone.add(layer.where, _flatten(layer.document))
            self.problems += [*alone.problems, *alone.check()[1]]
            return
        self.add(layer.where, _flatten(layer.document))
        for key, setting in self.settings.items():
            if setting.where == layer.where:
                self.of_files.setdefault(key, []).append(setting)

    def check(self) -> tuple[RunConfig | None, list[tuple[str, str]]]:
        """Return the configuration, or what is wrong with its values."""
        try:
            return RunConfig.model_validate(self.tree()), []
        except ValidationError as error:
            return None, [(self.source_of(item["loc"]), _sentence(item)) for item in error.errors()]

    def readings(self) -> list[str]:
        """Return one sentence for each name that was read as another one."""
        notes = list(self.notes)
        for key, names in VALUES.items():
            given = self.settings.get(key)
            if given is None or not isinstance(given.value, str) or (name := plain_name(given.value)) not in names:
                continue
            remark = REMARKS.get((key, name))
            said = f"{given.where}: {key}: {given.value} is read as {names[name]}"
            notes.append(f"{said}; {remark}" if remark else said)
        return notes

    def disagreements(self) -> list[str]:
        """Return one sentence for each key that is taken from one file and has another value in an earlier one."""
        notes = []
        for key, (*earlier, last) in self.of_files.items():
            others = [one for one in reversed(earlier) if one.value != last.value]
            if not others or self.settings.get(key) != last:
                continue
            replaced = " and ".join(f"{_in_words(key, one.value)} of {one.where}" for one in others)
            notes.append(f"{key}: {_in_words(key, last.value)} of {last.where} replaces {replaced}")
        return notes

    def add(self, where: str, given: Iterable[tuple[str, Any]], *, is_source_text: bool = False) -> None:
        """Take the keys of one source; what earlier sources said about them no longer counts.

        Args:
            where: The source's name in messages.
            given: Keys, in full or by leaf, and values.
            is_source_text: The values are texts, to be read as YAML unless the key holds text.
        """
        from llmtune.config.reading import parse_value

        seen: set[str] = set()
        for key, value in given:
            try:
                full, alias = read_key(key)
            except ValueError as error:
                self.problems.append((where, str(error)))
                continue
            if full in seen and not is_source_text:  # a repeated flag is a correction, a repeated key a mistake
                self.problems.append((where, f"{full}: is given twice"))
            seen.add(full)
            if alias is not None:
                self.notes.append(f"{where}: {key} is read as {full}" + (f"; {alias.remark}" if alias.remark else ""))
            if is_source_text:
                value = value if is_text(full) else parse_value(value)
            for entry in [known for known in self.settings if known.startswith(full + ".")]:
                del self.settings[entry]
            self.settings[full] = _Setting(value, where)

    def tree(self) -> dict[str, dict[str, Any]]:
        """The nested document that ``RunConfig`` validates."""
        tree: dict[str, dict[str, Any]] = {}
        for key in sorted(self.settings):  # a whole mapping comes before the entries that are set on top of it
            group, leaf, *entry = key.split(".", 2)
            leaves = tree.setdefault(group, {})
            if not entry:
                leaves[leaf] = self.settings[key].value
            elif isinstance(whole := leaves.setdefault(leaf, {}), Mapping):
                leaves[leaf] = {**whole, entry[0]: self.settings[key].value}
        return tree

    def source_of(self, location: Sequence[str | int]) -> str:
        """Which source set the value at ``location`` of the document."""
        parts = [str(part) for part in location]
        for length in range(len(parts), 0, -1):
            if (setting := self.settings.get(".".join(parts[:length]))) is not None:
                return setting.where
        return "configuration"


def load_config(
    overrides: Mapping[str, Any] | None = None,
    *,
    settings: Sequence[str] = (),
    file: str | Path | Sequence[str | Path] | None = None,
    env: str | None = None,
    environ: Mapping[str, str] | None = None,
    where: str = "command line",
) -> RunConfig:
    """Merge every source into one validated configuration.

    Args:
        overrides: Keyword arguments or flags; keys in full or by unique leaf; ``None`` values are ignored.
        settings: ``key=value`` texts of ``--set``; the value is read as YAML.
        file: A YAML file, or several; where they disagree the later one is taken.
        env: Name of the overlay in ``environments`` of the files that is put on top of them; ``LLMTUNE_ENV`` when not
            given.
        environ: Environment to read ``LLMTUNE_*`` from; the process's own when not given.
        where: What to call the overrides in messages.

    Raises:
        ConfigError: With every problem of every source, each with the nearest known key.
    """
    environ = os.environ if environ is None else environ
    gathered = _Gathered()
    for name, key, text in _from_environment(environ):
        gathered.add(name, [(key, text)], is_source_text=True)
    files = [file] if isinstance(file, str | Path) else list(file or ())
    env, asked_by = (env, "--env") if env else (environ.get(ENV_VARIABLE) if files else None, ENV_VARIABLE)
    if files or env:
        from llmtune.config.layers import read_layers

        found = read_layers(files, env or None, asked_by)
        gathered.problems += found.problems
        for layer in found.layers:
            gathered.add_layer(layer)
    gathered.add(where, ((key, value) for key, value in _flatten(overrides or {}) if value is not None))
    pairs = [setting.partition("=") for setting in settings]
    gathered.problems += [("--set", _no_pair(key)) for key, separator, _ in pairs if not (separator and key.strip())]
    gathered.add(
        "--set", ((key.strip(), text) for key, equals, text in pairs if equals and key.strip()), is_source_text=True
    )
    config, problems = gathered.check()
    gathered.problems += problems
    if config is None or gathered.problems:
        raise _error(gathered.problems)
    return config.with_origin(
        Origin(files=tuple(map(str, files)), env=env or None, notes=(*gathered.readings(), *gathered.disagreements()))
    )


def _flatten(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys as given, with groups opened: ``{train: {epochs: 3}, rank: 8}`` -> ``train.epochs``, ``rank``."""
    flat: list[tuple[str, Any]] = []
    for key, value in document.items():
        if key in RunConfig.model_fields and isinstance(value, Mapping):
            flat += [(f"{key}.{leaf}", inner) for leaf, inner in value.items()]
        elif key not in RunConfig.model_fields or value is not None:  # a group whose keys are all commented out
            flat.append((key, value))
    return flat


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Variable, key and text of ``LLMTUNE_TRAIN_EPOCHS`` or, where the leaf is unique, ``LLMTUNE_EPOCHS``."""
    found = []
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in RESERVED_ENVIRONMENT or not text:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
        group, _, leaf = key.partition("_")
        full = f"{group}.{leaf}"
        is_full = full in settable_keys() or (
            group in RunConfig.model_fields and leaf in (ALIASES.keys() | HINTS.keys())
        )
        found.append((name, full if is_full and key not in ALIASES else key, text))
    return found


def _in_words(key: str, value: Any) -> str:
    if key.startswith(SECRET):
        return "a secret"
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _no_pair(setting: str) -> str:
    # What has no `=` may still end in an access token, so only the head of it is shown.
    head = setting.split(":")[0].split(" ")[0]
    return f"got '{head}', expected key=value, such as --set train.epochs=3"


def _error(problems: Sequence[tuple[str, str]]) -> ConfigError:
    places = {where for where, _ in problems}
    texts = [text if len(places) == 1 else f"{where}: {text}" for where, text in problems]
    if not texts[-1].endswith(("?", ".")):
        texts[-1] += "."
    return ConfigError(places.pop() if len(places) == 1 else "configuration", texts)


def _sentence(item: ErrorDetails) -> str:
    key = ".".join(str(part) for part in item["loc"])
    value = item["input"]
    if item["type"] == "missing":
        return f"{key}: is missing"
    if item["type"] == "extra_forbidden":  # below a list; other keys were resolved before
        return f"{key}: unknown key{did_you_mean(str(item['loc'][-1]), SourceConfig.model_fields)}"
    shown = "a secret" if key.startswith(SECRET) or isinstance(value, SecretStr) else repr(value)
    return f"{key}: got {shown}, expected {_expectation(item)}"


def _expectation(item: ErrorDetails) -> str:
    context = item.get("ctx", {})
    for name, sign in {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}.items():
        if name in context:
            kind = "an integer" if isinstance(context[name], int) else "a number"
            return f"{kind} {sign} {context[name]:g}"
    if "expected" in context:
        return str(context["expected"])
    kinds = {
        "int": "an integer",
        "float": "a number",
        "finite": "a finite number",
        "bool": "true or false",
        "string": "a text that is not empty" if item["type"] == "string_too_short" else "a text; quote it in YAML",
        "tuple": "a list",
        "too": "a list that is not empty",
        "dict": "a mapping",
    }
    return kinds.get(item["type"].split("_")[0], item["msg"])
