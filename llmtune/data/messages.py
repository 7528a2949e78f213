"""Messages of a row, held to what a chat can be: who may speak, in which order, with what text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from llmtune.data.records import Conversation, Message, Problem, SourceRow
from llmtune.data.strict_json import code_point
from llmtune.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
# What people write for a role, where spelling alone would not find the name that was meant.
_ROLE_MEANT = {
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
    "agent": "assistant",
    "human": "user",
    "customer": "user",
    "prompter": "user",
    "function": "tool",
    "observation": "tool",
    "instruction": "system",
}
# Who may speak after whom; "" is the beginning. See `check_order` for what real data needs.
_FOLLOWS = {
    "": ("user", "system", "assistant", "developer"),
    "system": ("user", "system", "assistant", "developer"),
    "developer": ("user", "system", "assistant", "developer"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool", "user"),
}
_OUT_OF_ORDER = {
    "system": "move it to the beginning",
    "developer": "move it to the beginning",
    "user": "join the two turns, or put the answer between them",
    "assistant": "join the two turns, or put what was asked between them",
    "tool": "a tool answers an assistant's call; put the call before it",
}
# Control characters that no text needs (C0 without tab and line ends, DEL), and lone surrogates, which are no text.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_KNOWN_KEYS = frozenset(("role", "content", "tool_calls", "name", "weight"))


class RowReporter:
    """Collects the problems of one row while it is converted.

    Args:
        row: The row.
        texts: Fields that are texts in the first rows of the data.
    """

    def __init__(self, row: SourceRow, texts: frozenset[str] = frozenset()) -> None:
        self.row = row
        self.texts = texts
        self.problems: list[Problem] = []

    def add(self, field: str | None, problem: str, hint: str) -> None:
        """Report one problem of this row."""
        row = self.row
        self.problems.append(
            Problem(file=row.file, line=row.line, field=field, problem=problem, hint=hint, row_group=row.row_group)
        )

    def text(self, values: Mapping[str, Any], key: str, *, path: str = "", blank: bool = False) -> str | None:
        """The string at ``key``; a missing, null, wrong, damaged or (unless ``blank``) empty value is reported."""
        value = values.get(key)
        if isinstance(value, str):
            if not blank and (not value or value.isspace()):
                self.add(path + key, f"the field '{key}' is empty", "give a text, or remove the row")
                return None
            return value if self.row.clean or self.undamaged(value, path + key) else None
        if value is not None:
            expected = "expected a text as in the other rows" if key in self.texts else "expected a text"
            hint = "write it as a text"
            if isinstance(value, Sequence):
                hint = 'join the texts of a list of {"type": "text", "text": …} to one text; other parts cannot be used'
            self.add(path + key, f"the field '{key}' is {kind_of(value)}, {expected}", hint)
        elif key in values:
            self.add(path + key, f"the field '{key}' is null", "give a text, or remove the row")
        else:
            self.add(path + key, f"the field '{key}' is missing", f"add '{key}'")
        return None

    def undamaged(self, text: str, field: str) -> bool:
        """Whether ``text`` holds no control character; the first is reported."""
        found = _NO_TEXT.search(text)
        if found is None:
            return True
        kind = "lone surrogate" if found[0] >= "\ud800" else "control character"
        self.add(field, f"the {kind} {code_point(found[0])} at character {found.start() + 1:,}", "remove it")
        return False


def kind_of(value: object) -> str:
    """A value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def is_list(value: object) -> bool:
    """Whether ``value`` is a list of something (texts are not)."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


@dataclass(slots=True, kw_only=True)
class Turn:
    """A message as far as it could be read. ``field``: where its role stands; ``message``: None when it is not good."""

    role: str | None
    field: str
    message: Message | None


def plain_chat(row: SourceRow) -> Conversation | None:
    """The conversation of a row that is as nearly all are: good turns of role and content, nothing else.

    Anything odd gives None, and the row goes the long way, which knows every shape and names what is wrong.
    """
    values = row.value.get("messages")
    if type(values) is not list or row.value.get("tools") is not None:
        return None
    clean, before = row.clean, ""
    messages: list[Message] = []
    for value in values:
        if type(value) is not dict or len(value) != 2:
            return None
        role, content = value.get("role"), value.get("content")
        if type(content) is not str or role not in _FOLLOWS[before] or not content or content.isspace():
            return None
        if not clean and _NO_TEXT.search(content) is not None:
            return None
        messages.append(Message(role=role, content=content))
        before = role
    if before != "assistant":
        return None
    return Conversation(messages=tuple(messages), file=row.file, line=row.line)


def read_messages(values: Any, report: RowReporter, field: str) -> list[Turn] | None:
    """The messages of a list of objects with role and content; None when it is no such list at all."""
    if not is_list(values):
        report.add(field, f"the field '{field}' is {kind_of(values)}, expected a list of messages", "write a list")
        return None
    if not values:
        report.add(field, f"the field '{field}' holds no messages", "add messages, or remove the row")
        return None
    return [_turn(value, report, f"{field}[{i}]") for i, value in enumerate(values)]


def answered(
    turns: Sequence[Turn], report: RowReporter, field: str, *, before: Turn | None = None
) -> tuple[Message, ...] | None:
    """The messages, when all are good, in order (after ``before``), and end with an answer that is learned."""
    check_order(turns, report, before=before)
    roles = [turn.role for turn in turns]
    if roles and None not in roles:
        if "assistant" not in roles:
            report.add(field, "there is no assistant turn, so nothing to learn", "add the answer, or remove the row")
        elif roles[-1] != "assistant":
            report.add(
                turns[-1].field,
                f"the last message has role '{roles[-1]}'; a training example must end with 'assistant'",
                "add the answer, or remove the last message",
            )
    messages = collected(turns)
    if messages is not None and not any(message.supervised for message in messages if message.role == "assistant"):
        if "assistant" in roles:
            report.add(field, "every assistant turn has weight 0, nothing would be learned", "remove the row")
        return None
    return messages


def collected(turns: Sequence[Turn]) -> tuple[Message, ...] | None:
    """The messages, when all are good."""
    messages = tuple(turn.message for turn in turns if turn.message is not None)
    return messages if len(messages) == len(turns) else None


def check_order(turns: Sequence[Turn], report: RowReporter, *, before: Turn | None = None) -> None:
    """Report every turn that cannot follow the one before it.

    Accepted is what sound data has:

    - system and developer texts stand at the beginning only, any number of them;
    - a user speaks first, or after an assistant or a tool; never after a user, whose answer would be missing;
    - an assistant speaks after anyone, also first (a greeting); after an assistant only when one of the two turns
      calls a tool, as where text and call are written as two turns, or results are left out;
    - a tool speaks after an assistant or another tool. The assistant's turn need not have ``tool_calls``: many data
      sets (Hermes and what follows it) write the call into the text.

    Args:
        turns: The turns in order; one whose role is unknown is passed over with its neighbours.
        report: Where the problems go.
        before: The turn before the first.
    """
    previous = before
    for turn in turns:
        first = previous is None
        role, last = turn.role, "" if previous is None else previous.role
        if role is not None and last is not None and role not in _FOLLOWS[last]:
            two_calls = role == last == "assistant" and (_calls(turn) or (previous is not None and _calls(previous)))
            if not two_calls:
                where = "at the beginning" if first else f"after a '{last}' turn"
                report.add(turn.field, f"turns out of order: a '{role}' turn {where}", _OUT_OF_ORDER[role])
        previous = turn


def _calls(turn: Turn) -> bool:
    # A turn that is not good may well have called a tool; its own problem is enough.
    return turn.message is None or turn.message.tool_calls is not None


def _turn(value: Any, report: RowReporter, path: str) -> Turn:
    if not isinstance(value, Mapping):
        report.add(
            path, f"the message is {kind_of(value)}, expected an object with role and content", "write an object"
        )
        return Turn(role=None, field=path, message=None)
    before = len(report.problems)
    role = _role(value, report, path)
    calls = tool_calls(value.get("tool_calls"), report, f"{path}.tool_calls")
    content = _content(value, report, path, role, calls)
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        report.add(f"{path}.weight", f"the weight is {weight!r}, expected 0 or 1", "write 0 to read it, 1 to learn it")
    extra = {key: item for key, item in value.items() if key not in _KNOWN_KEYS and item is not None}
    name = value.get("name")
    if not report.row.clean:
        for key, item in (("name", name), *extra.items()):
            if isinstance(item, str):
                report.undamaged(item, f"{path}.{key}")
    message = None
    if role is not None and content is not None and len(report.problems) == before:
        message = Message(
            role=role, content=content, tool_calls=calls, name=name, extra=extra or None, supervised=weight != 0
        )
    return Turn(role=role, field=f"{path}.role", message=message)


def _content(
    value: Mapping[str, Any], report: RowReporter, path: str, role: str | None, calls: tuple[Any, ...] | None
) -> str | None:
    content = value.get("content")
    if content is None and calls is not None:
        return ""
    # A user may say nothing (a model continues freely); an assistant that says nothing teaches nothing.
    if role == "assistant" and calls is None and isinstance(content, str) and not content.strip():
        report.add(f"{path}.content", "the assistant's turn is empty", "give the answer, or remove the row")
        return None
    return report.text(value, "content", path=f"{path}.", blank=True)


def _role(value: Mapping[str, Any], report: RowReporter, path: str) -> str | None:
    if "role" not in value and "from" in value:
        report.add(
            f"{path}.role",
            "the message has 'from' and 'value', expected 'role' and 'content'",
            "this is ShareGPT: --set data.format=sharegpt --set data.columns.conversations=FIELD",
        )
        return None
    role = report.text(value, "role", path=f"{path}.")
    if role is not None and role not in ROLES:
        report.add(f"{path}.role", f"unknown role {role!r}{role_hint(role, ROLES)}", f"use {', '.join(ROLES)}")
        return None
    return role


def role_hint(role: str, known: Sequence[str]) -> str:
    """``" — did you mean 'assistant'?"`` where a role was probably meant."""
    lowered = role.strip().lower()
    match = lowered if lowered in known else _ROLE_MEANT.get(lowered)
    match = match if match in known else nearest(lowered, known)
    return f" — did you mean '{match}'?" if match else ""


def objects(value: Any, report: RowReporter, field: str) -> tuple[Mapping[str, Any], ...] | None:
    """A list of objects (tools, tool calls); null and empty are the same as absent."""
    if value is None or (isinstance(value, Sequence) and not value):
        return None
    if not is_list(value) or not all(isinstance(item, Mapping) for item in value):
        report.add(field, f"expected a list of objects, got {kind_of(value)}", "write a list of objects")
        return None
    return tuple(value)


def tool_calls(value: Any, report: RowReporter, field: str) -> tuple[Mapping[str, Any], ...] | None:
    """Calls as templates read them: a name, and arguments as an object even where they were written as JSON text."""
    calls = objects(value, report, field)
    return None if calls is None else tuple(_call(call, report, f"{field}[{i}]") for i, call in enumerate(calls))


def _call(call: Mapping[str, Any], report: RowReporter, path: str) -> Mapping[str, Any]:
    wrapped = isinstance(call.get("function"), Mapping)
    function = call["function"] if wrapped else call
    where = f"{path}.function." if wrapped else f"{path}."
    report.text(function, "name", path=where)
    arguments = function.get("arguments")
    parsed = parsed_json(arguments)
    if not isinstance(parsed, (Mapping, type(None))):
        problem = f"the arguments are {kind_of(parsed)}, expected an object or its JSON"
        report.add(f"{where}arguments", problem, 'write {"name": value, …}')
    if parsed is arguments:
        return call
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if wrapped else function


def parsed_json(value: Any) -> Any:
    """The JSON inside a text, where there is any; tools and calls are often written as text."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError:
        return value
