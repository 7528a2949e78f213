"""Columns of the data under the names that a format gives them: as the person said, or as their names say plainly."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtune.data.formats import FORMATS, Format
from llmtune.data.records import Problem, SourceRow
from llmtune.data.reporter import is_blank, is_list, parsed_cell
from llmtune.errors import UnknownColumnsError, nearest

# Names that people give to a field, written as `_plain_name` writes them.
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "messages": ("message", "chat", "dialog", "dialogue", "conversation", "conversations"),
    "conversations": ("conversation",),
    "instruction": ("instructions",),
    "output": ("response", "answer", "completion", "target"),
    "prompt": ("prompts",),
    "completion": ("completions", "response", "answer", "output", "reply", "target"),
    "question": (
        "questions",
        "q",
        "query",
        "user",
        "user_message",
        "human",
        "input",
        "prompt",
        "instruction",
        "request",
    ),
    "answer": (
        "answers",
        "a",
        "response",
        "assistant",
        "assistant_message",
        "bot",
        "gpt",
        "reply",
        "output",
        "completion",
        "target",
    ),
    "system": ("system_prompt", "system_message"),
    "context": ("contexts", "passage"),
    "tools": ("tool",),
}
# Shapes whose required fields are looked for under other names, the plainest first.
_GUESSED = ("chat", "sharegpt", "alpaca", "prompt_completion", "question_answer")
# Further fields whose names and synonyms tell a column, where the person is asked to say what it is.
_MEANS = {"prompt": "question", "completion": "answer", "text": ""}
_OPTIONAL = ("system", "context", "input", "history", "tools", "functions")


def spelled_columns(rows: Sequence[SourceRow], fields: Iterable[str]) -> dict[str, str]:
    """Return the columns that are fields in another spelling: ``Question``, `` answer``, ``System-Prompt``."""
    columns = {name: None for row in rows for name in row.value}
    spelled: dict[str, list[str]] = {}
    for column in columns:
        spelled.setdefault(_plain_name(column), []).append(column)
    return {field: spelled[field][0] for field in fields if field not in columns and len(spelled.get(field, ())) == 1}


def guessed_columns(rows: Sequence[SourceRow], among: Iterable[Format]) -> dict[str, str] | None:
    """Return the columns of the first format whose required fields can be told by name, None where none can.

    A field is told where one column alone has its name, in any spelling, or a synonym of it. Where two formats would
    read different columns, nothing is guessed.
    """
    columns = {name: None for row in rows for name, value in row.value.items() if value is not None}
    found: list[dict[str, str]] = []
    for each in among:
        if each.name in _GUESSED and (each.name != "question_answer" or each.required == ("question", "answer")):
            told = {field: _column_of(field, columns) for field in each.required}
            if None not in told.values() and _holds(rows, each, told):
                found.append({field: column for field, column in told.items() if column is not None})
    if not found or any(set(other.values()) != set(found[0].values()) for other in found):
        return None
    return found[0]


def optional_columns(rows: Sequence[SourceRow], format: Format, taken: Collection[str]) -> dict[str, str]:
    """Return the columns of optional fields that no row has under the field's own name, but under a plain other one."""
    columns = {name: None for row in rows for name in row.value if name not in taken}
    wanted = [field for field in _OPTIONAL if field in format.fields and field not in columns and field not in taken]
    told = {field: _column_of(field, columns) for field in wanted}
    return {field: column for field, column in told.items() if column is not None}


def _plain_name(column: str) -> str:
    return re.sub(r"[\s\-.]+", "_", column.strip().lower())


def _column_of(field: str, columns: Iterable[str]) -> str | None:
    """Return the one column that means ``field``; None where none does, or several do."""
    exact = [column for column in columns if column == field]
    spelled = exact or [column for column in columns if _plain_name(column) == field]
    meant = spelled or [column for column in columns if _plain_name(column) in _SYNONYMS.get(field, ())]
    return meant[0] if len(meant) == 1 else None


def _holds(rows: Sequence[SourceRow], format: Format, told: Mapping[str, str | None]) -> bool:
    """Return whether the columns hold what the format reads: lists for conversations, else texts."""
    if len(set(told.values())) < len(told):
        return False
    wants_list = format.name in ("chat", "sharegpt")
    names = [column for column in told.values() if column is not None]
    values = [row.value[column] for row in rows for column in names if row.value.get(column) is not None]
    if wants_list:
        return all(is_list(parsed_cell(value)) for value in values)
    return all(isinstance(value, str) for value in values)


def with_columns(row: SourceRow, columns: Mapping[str, str], required: Collection[str]) -> SourceRow | list[Problem]:
    """Return the row with its columns named as fields; where a required one is missing, the problems.

    A column that stands where a mapped field belongs stays in the row under a name that says so.
    """
    missing = [column for field, column in columns.items() if column not in row.value and field in required]
    if missing:
        hint = f"the row has {listed(row.value)}"
        return [_problem(row, column, f"the column '{column}' is missing", hint) for column in missing]
    taken = columns.values()
    value: dict[str, Any] = {}
    for key, item in row.value.items():
        if key not in taken:
            value[f"{key} (the column)" if key in columns else key] = item
    value |= {field: row.value[column] for field, column in columns.items() if column in row.value}
    return replace(row, value=value)


def _problem(row: SourceRow, field: str | None, problem: str, hint: str) -> Problem:
    return Problem(file=row.file, line=row.line, field=field, problem=problem, hint=hint, row_group=row.row_group)


def no_column(rows: Sequence[SourceRow], columns: Mapping[str, str]) -> str | None:
    """Return what is wrong with a mapping: the columns that no row has; None where each is in some row."""
    there = {name for row in rows for name in row.value}
    missing = [column for column in columns.values() if column not in there]
    if not missing:
        return None
    hints = [f"'{name}'{_near(name, there)}" for name in missing]
    return f"{rows[0].file}:{rows[0].line}: no column {', '.join(hints)}. The row has {listed(rows[0].value)}."


def not_recognised(rows: Sequence[SourceRow]) -> UnknownColumnsError:
    """Return the error for rows that no format fits: the columns, and a command that says what they are."""
    first = rows[0]
    columns: dict[str, str] = {}
    for row in rows:
        for name, value in row.value.items():
            if isinstance(value, str) and not is_blank(value):
                columns.setdefault(name, value)
    place = f"{first.file}:{first.line}: the format is not recognised; the row has {listed(first.value)}."
    if nested := [name for name, value in first.value.items() if is_list(value) or isinstance(value, Mapping)]:
        place += f" To learn what is inside {listed(nested)}, write it as 'messages' with role and content."
    if not columns:
        shapes = "; ".join(dict.fromkeys(" + ".join(each.required) for each in FORMATS if each.trainable))
        message = (
            f"{place} No column holds text. Expected one of: {shapes}; columns of other names are given with "
            "--set data.columns.prompt=COLUMN --set data.columns.completion=COLUMN."
        )
        return UnknownColumnsError(message, columns={}, likely={})
    likely = likely_columns(rows, [*columns], ("prompt", "completion") if len(columns) > 1 else ("text",))
    if first.file == "rows":
        command = f"FineTuner(rows, columns={likely})"
    else:
        flags = (f"--set {shlex.quote(f'data.columns.{field}={column}')}" for field, column in likely.items())
        command = f"llmtune check {shlex.quote(first.file)} {' '.join(flags)}"
    what = "which column is the question and which the answer" if len(likely) > 1 else "what the column is"
    return UnknownColumnsError(f"{place} Say {what}, for example: {command}", columns=columns, likely=likely)


def likely_columns(rows: Sequence[SourceRow], texts: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """Return a column for each field: one that is called so, else of the others the longest texts, in their order."""
    told: dict[str, str] = {}
    for field in fields:
        names = (_column_of(name, texts) for name in (field, _MEANS[field]) if name)
        column = next((name for name in names if name is not None and name not in told.values()), None)
        if column is not None:
            told[field] = column
    left = [name for name in texts if name not in told.values()]
    longest = sorted(left, key=lambda name: -sum(len(str(row.value.get(name) or "")) for row in rows))
    missing = [field for field in fields if field not in told]
    chosen = [name for name in left if name in longest[: len(missing)]]
    told |= dict(zip(missing, chosen, strict=False))
    return {field: told[field] for field in fields if field in told}


def listed(row: Iterable[str]) -> str:
    """Return the names of a row's fields."""
    return ", ".join(map(repr, row)) or "no fields"


def _near(name: str, known: Iterable[str]) -> str:
    match = nearest(name, known)
    return f" (did you mean '{match}'?)" if match else ""
