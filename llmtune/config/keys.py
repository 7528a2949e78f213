"""Names of the keys: every ``group.leaf``, and which one a shorter name means."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import SecretStr

from llmtune.config.aliases import ALIASES, HINTS, Alias, plain_name
from llmtune.config.schema import Group, RunConfig, kinds_of
from llmtune.errors import did_you_mean, nearest

# A bare value given for these groups means this key of theirs.
BARE_VALUE_KEY = {"model": "id", "output": "dir"}
# Keys whose value is a mapping, so that `data.columns.prompt` is a key as well; of the first one the values are text.
COLUMNS = "data.columns"
MAPPING_KEYS = (COLUMNS, "train.schedule_arguments", "train.optimizer_arguments")


@cache
def _fields() -> dict[str, Any]:
    return {
        f"{group}.{leaf}": info
        for group, owner in RunConfig.model_fields.items()
        if isinstance(owner.annotation, type) and issubclass(owner.annotation, Group)
        for leaf, info in owner.annotation.model_fields.items()
    }


def settable_keys() -> dict[str, str]:
    """Every key as ``group.leaf`` -> its description."""
    return {key: info.description or "" for key, info in _fields().items()}


def is_text(key: str) -> bool:
    """Whether a full key holds text, so that ``2024`` or ``1e-4`` given for it stays as it was written."""
    if (mapping := _mapping_of(key)) is not None:
        return mapping == COLUMNS
    return kinds_of(_fields()[key].annotation) <= {str, SecretStr}


def _mapping_of(key: str) -> str | None:
    """Return the mapping that a full key is an entry of; None where it is no entry."""
    return next((mapping for mapping in MAPPING_KEYS if key.startswith(f"{mapping}.")), None)


def resolve_key(key: str) -> str:
    """The full ``group.leaf[.entry]`` of a key given in full or, where unique, by its leaf alone.

    Raises:
        ValueError: See `read_key`.
    """
    return read_key(key)[0]


def read_key(key: str) -> tuple[str, Alias | None]:
    """Return the full key, and the alias that it was read by: another toolkit's name of the same setting.

    Raises:
        ValueError: The key is unknown (the nearest one is named), is another toolkit's name of something else (what
            to do is said), or its leaf stands in several groups.
    """
    known = _fields()
    if key in known or _mapping_of(key) is not None:
        return key, None
    key = _plain(key)
    first, _, rest = key.partition(".")
    leaf, _, below = rest.partition(".")
    if key in known or _mapping_of(key) is not None:
        return key, None
    if key in BARE_VALUE_KEY:
        return f"{key}.{BARE_VALUE_KEY[key]}", None
    if key in RunConfig.model_fields:
        example = next(full for full in known if full.startswith(f"{key}."))
        raise ValueError(f"{key}: is a group; give one of its keys, such as '{example}'")
    if first in RunConfig.model_fields:
        if below and f"{first}.{leaf}" in known:
            raise ValueError(f"{key}: '{first}.{leaf}' has no keys below it")
        return _of_other_toolkits(key, rest, group=first)
    owners = [full for full in known if full.split(".")[1] == first]
    if len(owners) == 1 and (not rest or owners[0] in MAPPING_KEYS):
        return (f"{owners[0]}.{rest}" if rest else owners[0]), None
    if len(owners) > 1 and not rest:
        raise ValueError(f"{key}: stands in several groups, give one of {', '.join(owners)}")
    return _of_other_toolkits(key, key, group=None)


def _plain(key: str) -> str:
    """Return the key with group and leaf in small letters and underscores; entries of mappings stay unchanged."""
    first, *rest = key.strip().split(".", 2)
    first = plain_name(first)
    if rest and first in RunConfig.model_fields:
        rest[0] = plain_name(rest[0])
    return ".".join([first, *rest])


def _of_other_toolkits(key: str, name: str, *, group: str | None) -> tuple[str, Alias | None]:
    """Return the key that another toolkit's name stands for; ``name`` is the key without its group.

    Raises:
        ValueError: There is no such name, or it means something else.
    """
    first, dot, entry = name.partition(".")
    alias = ALIASES.get(first)
    if alias is not None and (not dot or alias.key in MAPPING_KEYS):
        if group is None or alias.key.startswith(f"{group}."):
            return f"{alias.key}{dot}{entry}", alias
        raise ValueError(f"{key}: unknown key, did you mean '{alias.key}'?")
    if first in HINTS:
        raise ValueError(f"{key}: is not a key of llmtune; {HINTS[first]}")
    if group is not None:
        leaves = [full.split(".")[1] for full in _fields() if full.startswith(f"{group}.")]
        raise ValueError(f"{key}: unknown key{did_you_mean(name, leaves)}")
    raise ValueError(f"{key}: unknown key, {_nearest_of_all(key)}")


def _nearest_of_all(key: str) -> str:
    """Return the hint for an unknown key: the nearest key or the nearest name of another toolkit."""
    known = _fields()
    match = nearest(key, [*known, *(full.split(".")[1] for full in known), *ALIASES, *HINTS])
    if match is None:
        return f"known are {', '.join(f'{group}.*' for group in RunConfig.model_fields)}"
    if match in HINTS:
        return HINTS[match]
    return f"did you mean '{ALIASES[match].key if match in ALIASES else match}'?"
