"""Tools that a row offers, and the calls that its assistant makes, in the shape that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtune.data.reporter import RowReporter, holds_nulls, is_blank, is_list, kind_of, parsed_cell, without_nulls

Objects = tuple[Mapping[str, Any], ...]


def offered_tools(row: Mapping[str, Any], report: RowReporter) -> Objects | None:
    """Return the tools of a row: ``tools``, or ``functions`` as OpenAI called them before; None where there are none.

    Both may be JSON text, one object, or a list whose items are JSON texts.
    """
    tools, functions = (objects(row.get(field), report, field) for field in ("tools", "functions"))
    if functions is None:
        return tools
    wrapped = tuple({"type": "function", "function": each} for each in functions)
    if tools is not None and tools not in (functions, wrapped):
        report.add("functions", "the row has 'tools' and other 'functions'", "keep one of the two fields")
    return wrapped if tools is None else tools


def objects(value: Any, report: RowReporter, field: str) -> Objects | None:
    """Return a list of objects (tools, tool calls); null, blank and empty are the same as absent."""
    parsed = parsed_cell(value)
    if is_blank(parsed):
        return None
    if isinstance(parsed, Mapping):
        parsed = [parsed]
    items = [parsed_cell(item) for item in parsed] if is_list(parsed) else []
    if not items or not all(isinstance(item, Mapping) for item in items):
        report.add(field, f"expected a list of objects, got {kind_of(value)}", "write a list of objects")
        return None
    if isinstance(value, str):
        return tuple(items)  # a text says what it says, nulls included
    return tuple(_stated(item, given, report, field) for item, given in zip(items, parsed, strict=True))


def _stated(item: Mapping[str, Any], given: Any, report: RowReporter, field: str) -> Mapping[str, Any]:
    """Return an object without its null entries, and note them where the file is JSON, which wrote them itself."""
    if isinstance(given, str) or not holds_nulls(item):
        return item
    if report.row.raw is not None:
        report.unused[f"null values in {field.rsplit('.', 1)[-1]}"] = None
    stated: Mapping[str, Any] = without_nulls(item)
    return stated


def called_tools(message: Mapping[str, Any], report: RowReporter, path: str) -> Objects | None:
    """Return the calls of a message: ``tool_calls``, or ``function_call`` as OpenAI called it before."""
    calls = tool_calls(message.get("tool_calls"), report, f"{path}.tool_calls")
    older = message.get("function_call")
    if is_blank(older):
        return calls
    if calls is not None:
        report.add(f"{path}.function_call", "the message has 'tool_calls' and 'function_call'", "keep one of the two")
        return calls
    return function_call(older, report, f"{path}.function_call")


def function_call(value: Any, report: RowReporter, field: str) -> Objects | None:
    """Return the calls that ``value`` describes: a name and arguments, a list of such, or the JSON text of either."""
    call = parsed_cell(value)
    if not isinstance(call, (Mapping, list)):
        report.add(field, "the function call is not valid JSON", 'write {"name": …, "arguments": …}')
        return None
    given = call if isinstance(call, list) else [call]
    wrapped = [each if _is_wrapped(each) else {"type": "function", "function": each} for each in given]
    return tool_calls(wrapped, report, field)


def _is_wrapped(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)


def tool_calls(value: Any, report: RowReporter, field: str) -> Objects | None:
    """Return calls as templates read them: a name, and arguments as an object even where they were JSON text."""
    calls = objects(value, report, field)
    return None if calls is None else tuple(_call(call, report, f"{field}[{i}]") for i, call in enumerate(calls))


def _call(call: Mapping[str, Any], report: RowReporter, path: str) -> Mapping[str, Any]:
    wrapped = _is_wrapped(call)
    function = call["function"] if wrapped else call
    where = f"{path}.function." if wrapped else f"{path}."
    report.text(function, "name", path=where)
    arguments = function.get("arguments")
    parsed = parsed_cell(arguments)
    if not isinstance(parsed, (Mapping, type(None))):
        problem = f"the arguments are {kind_of(parsed)}, expected an object or its JSON"
        report.add(f"{where}arguments", problem, 'write {"name": value, …}')
    if parsed is arguments:
        return call
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if wrapped else function
