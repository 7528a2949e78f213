"""Names of the keys: every ``group.leaf``, and which one a shorter name means."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import SecretStr

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
    """The mapping that a full key is an entry of; None where it is no entry."""
    return next((mapping for mapping in MAPPING_KEYS if key.startswith(f"{mapping}.")), None)


def resolve_key(key: str) -> str:
    """The full ``group.leaf[.entry]`` of a key given in full or, where unique, by its leaf alone.

    Raises:
        ValueError: The key is unknown (the nearest one is named) or its leaf stands in several groups.
    """
    known = _fields()
    if key in known or _mapping_of(key) is not None:
        return key
    if key in BARE_VALUE_KEY:
        return f"{key}.{BARE_VALUE_KEY[key]}"
    first, _, rest = key.partition(".")
    if key in RunConfig.model_fields:
        example = next(full for full in known if full.startswith(f"{key}."))
        raise ValueError(f"{key}: is a group; give one of its keys, such as '{example}'")
    if first in RunConfig.model_fields:
        leaf, _, below = rest.partition(".")
        if below and f"{first}.{leaf}" in known:
            raise ValueError(f"{key}: '{first}.{leaf}' has no keys below it")
        leaves = [full.split(".")[1] for full in known if full.startswith(f"{first}.")]
        raise ValueError(f"{key}: unknown key{did_you_mean(rest, leaves)}")
    owners = [full for full in known if full.split(".")[1] == first]
    if len(owners) == 1 and (not rest or owners[0] in MAPPING_KEYS):
        return f"{owners[0]}.{rest}" if rest else owners[0]
    if len(owners) > 1 and not rest:
        raise ValueError(f"{key}: stands in several groups, give one of {', '.join(owners)}")
    match = nearest(key, [*known, *(full.split(".")[1] for full in known)])
    groups = ", ".join(f"{group}.*" for group in RunConfig.model_fields)
    raise ValueError(f"{key}: unknown key, " + (f"did you mean '{match}'?" if match else f"known are {groups}"))
