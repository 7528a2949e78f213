"""Problems and unused parts of one row, collected while it is converted."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from llmtune.data.records import Problem, SourceRow
from llmtune.data.strict_json import code_point

# Control characters that no text needs (C0 without tab and line ends, DEL), and lone surrogates, which are no text.
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# Only text is trained: an answer about a picture cannot be learned from its text alone.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# A cell longer than this is not evaluated as a Python literal.
_MOST_LITERAL_CHARS = 1 << 20
# Types of values that hold nothing of numpy or pandas; floats may be NaN.
_PLAIN = frozenset((str, int, bool, list, dict, type(None)))


class RowReporter:
    """Collector of the problems of one row, and of the parts of it that nothing reads.

    Args:
        row: The row.
        texts: Fields that are texts in the first rows of the data.

    Attributes:
        problems: Everything that is wrong with the row.
        unused: Names of parts that hold something and are not read, in order.
        extra_keys: Names of message keys that only some chat templates read, in order.
    """

    def __init__(self, row: SourceRow, texts: frozenset[str] = frozenset()) -> None:
        self.row = row
        self.texts = texts
        self.problems: list[Problem] = []
        self.unused: dict[str, None] = {}
        self.extra_keys: dict[str, None] = {}

    def add(self, field: str | None, problem: str, hint: str) -> None:
        """Report one problem of this row."""
        row = self.row
        self.problems.append(
            Problem(file=row.file, line=row.line, field=field, problem=problem, hint=hint, row_group=row.row_group)
        )

    def text(self, values: Mapping[str, Any], key: str, *, path: str = "", blank: bool = False) -> str | None:
        """Return the string at ``key``; report a missing, null, wrong, damaged or (unless ``blank``) empty value."""
        value = values.get(key)
        if isinstance(value, str):
            if not blank and (not value or value.isspace()):
                self.add(path + key, f"the field '{key}' is empty", "give a text, or remove the row")
                return None
            return value if self.row.clean or self.undamaged(value, path + key) else None
        if value is not None:
            expected = "expected a text as in the other rows" if key in self.texts else "expected a text"
            self.add(path + key, f"the field '{key}' is {kind_of(value)}, {expected}", "write it as a text")
        elif key in values:
            self.add(path + key, f"the field '{key}' is null", "give a text, or remove the row")
        else:
            self.add(path + key, f"the field '{key}' is missing", f"add '{key}'")
        return None

    def undamaged(self, text: str, field: str) -> bool:
        """Return whether ``text`` holds no control character; report the first one."""
        found = NO_TEXT.search(text)
        if found is None:
            return True
        kind = "lone surrogate" if found[0] >= "\ud800" else "control character"
        self.add(field, f"the {kind} {code_point(found[0])} at character {found.start() + 1:,}", "remove it")
        return False


def kind_of(value: object) -> str:
    """Return a value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def is_list(value: object) -> bool:
    """Return whether ``value`` is a list of something; texts are not."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_blank(value: object) -> bool:
    """Return whether ``value`` says nothing: null, an empty or blank text, an empty list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, (Sequence, Mapping)) and not value)


def holds_text(value: object) -> bool:
    """Return whether a text that is not blank stands anywhere in ``value``."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, Mapping):
        return any(map(holds_text, value.values()))
    return is_list(value) and any(map(holds_text, value))  # type: ignore[call-overload]


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the null entries of its objects, at every depth; null items of lists stay.

    Arrow gives every object of a column the keys of all others, with null. A null entry therefore means the same as
    no entry, in every container.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if is_list(value):
        return [without_nulls(item) for item in value]
    return value


def holds_nulls(value: Any) -> bool:
    """Return whether `without_nulls` would leave something out."""
    if isinstance(value, Mapping):
        return any(item is None or holds_nulls(item) for item in value.values())
    return is_list(value) and any(map(holds_nulls, value))


def parsed_json(value: Any) -> Any:
    """Return the JSON inside a text, else ``value``; tools and calls are often written as text."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError:
        return value


def parsed_cell(value: Any) -> Any:
    """Return the list or object inside a cell of a table, as JSON or as pandas writes it, else ``value``."""
    if not isinstance(value, str):
        return value
    parsed = parsed_json(value)
    if parsed is not value or not value.lstrip().startswith(("[", "{")) or len(value) > _MOST_LITERAL_CHARS:
        return parsed
    try:
        literal = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return literal if isinstance(literal, (list, dict)) else value


def plain_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of this process without values of numpy or pandas; NaN, pandas' missing text, is null."""
    if all(type(value) in _PLAIN for value in row.values()):
        return row
    return {key: _plain_value(value) for key, value in row.items()}


def _plain_value(value: Any) -> Any:
    """Return a value of numpy or pandas as plain Python has it; a missing number (NaN) is null."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    return value
