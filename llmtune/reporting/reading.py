"""Takes from JSON what is there: whatever is missing, or is not what it should be, counts as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.runs import number


def mapping(value: Any) -> dict[str, Any]:
    """An object, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """The items of a list, else none."""
    return value if isinstance(value, list) else []


def text(value: Any) -> str | None:
    """A value as text, None where there is none."""
    return None if value is None else str(value)


def count(value: Any) -> int | None:
    """A finite number as a count."""
    found = number(value)
    return None if found is None or not math.isfinite(found) else int(found)


def numbers(values: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, float]:
    """What of an object are numbers, NaN and infinities included."""
    found = {name: number(value) for name, value in values.items() if name not in without}
    return {name: value for name, value in found.items() if value is not None}


def finite(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The finite numbers that rows hold under a name."""
    values = (number(row.get(name)) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]
