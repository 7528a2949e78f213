"""Messages of a row, held to what a chat can be: who may speak, in which order, with what text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmtune.data.records import Conversation, Message, SourceRow
from llmtune.data.reporter import (
    MEDIA,
    NO_TEXT,
    RowReporter,
    holds_text,
    is_blank,
    is_list,
    kind_of,
    parsed_cell,
    without_nulls,
)
from llmtune.data.tools import called_tools, function_call
from llmtune.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
# Who speaks calls a tool; the text of the turn is the call.
_CALLERS = ("function_call", "tool_call")
# Names of roles in the data of other toolkits, in lower case.
_ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    **dict.fromkeys(_CALLERS, "assistant"),
}
# What people write for a role, where neither the table above nor spelling would find the name that was meant.
_ROLE_MEANT = {"agent": "assistant", "customer": "user", "instruction": "system"}
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
# Fields beside the messages that belong to the conversation.
BESIDE_MESSAGES = frozenset(("system", "history", "tools", "functions"))
# Marks by which toolkits say whether a turn is learned: OpenAI and mistral-finetune, LLaMA-Factory, axolotl, ms-swift.
_MARKS = ("weight", "loss_weight", "train", "training", "loss")
# Kinds of parts of a content that are text, and the keys that hold it.
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_KEYS = ("text", "value", "content")
_REASONING_PARTS = ("reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_READ_KEYS = frozenset(("role", "content", "from", "value", *_CALL_KEYS, "name", *_MARKS))
# Further keys that chat templates are known to read.
_TEMPLATE_KEYS = frozenset(("reasoning_content", "thinking", "reasoning", "tool_call_id"))


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
    if type(values) is not list or (len(row.value) > 1 and any(row.value.get(key) for key in BESIDE_MESSAGES)):
        return None
    clean, before = row.clean, ""
    messages: list[Message] = []
    for value in values:
        if type(value) is not dict or len(value) != 2:
            return None
        role, content = value.get("role"), value.get("content")
        if type(content) is not str or role not in _FOLLOWS[before] or not content or content.isspace():
            return None
        if not clean and NO_TEXT.search(content) is not None:
            return None
        messages.append(Message(role=role, content=content))
        before = role
    if before != "assistant":
        return None
    return Conversation(messages=tuple(messages), file=row.file, line=row.line)


def read_messages(values: Any, report: RowReporter, field: str) -> list[Turn] | None:
    """The messages of a list of objects with role and content; None when it is no such list at all."""
    values, given = parsed_cell(values), values
    if not is_list(values):
        report.add(field, f"the field '{field}' is {kind_of(given)}, expected a list of messages", "write a list")
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
            report.add(
                field,
                "every assistant turn is marked as not learned, so nothing would be learned",
                "remove the row",
            )
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
    """Read one turn: ``role`` and ``content``, or ``from`` and ``value`` as ShareGPT calls them."""
    given = parsed_cell(value)
    if not isinstance(given, Mapping):
        expected = "from and value" if path.startswith("conversations") else "role and content"
        report.add(path, f"the turn is {kind_of(value)}, expected an object with {expected}", "write an object")
        return Turn(role=None, field=path, message=None)
    role_key = "from" if "role" not in given and "from" in given else "role"
    text_key = "value" if "content" not in given and "value" in given else "content"
    if path.startswith("conversations") and not given.keys() & {"role", "content"}:
        role_key, text_key = "from", "value"
    before = len(report.problems)
    speaker, role = _role(given, role_key, report, path)
    said = _call_turn(given, text_key, report, path) if speaker in _CALLERS else _said(given, text_key, report, path)
    if said is not None and role == "assistant" and not said.calls and not said.text.strip():
        # A user may say nothing (a model continues freely); an assistant that says nothing teaches nothing.
        report.add(f"{path}.{text_key}", "the assistant's turn is empty", "give the answer, or remove the row")
    supervised = _is_learned(given, role, report, path)
    passed_over = {"role", "from", "content", "value"} - {role_key, text_key}
    for key in (*passed_over, *(_CALL_KEYS if speaker in _CALLERS else ())):
        if holds_text(given.get(key)):
            report.unused[f"{_shape(path)}.{key}"] = None
    extra = _extra(given, "" if said is None else said.thought, report, path)
    message = None
    if role is not None and said is not None and len(report.problems) == before:
        message = Message(
            role=role,
            content=said.text,
            tool_calls=said.calls or None,
            name=given.get("name"),
            extra=extra or None,
            supervised=supervised,
        )
    return Turn(role=role, field=f"{path}.{role_key}", message=message)


class _Said(NamedTuple):
    """What a turn says: its text, its reasoning and its calls."""

    text: str
    thought: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()


def _call_turn(value: Mapping[str, Any], key: str, report: RowReporter, path: str) -> _Said | None:
    """Read a turn whose text is a call."""
    called = report.text(value, key, path=f"{path}.")
    calls = None if called is None else function_call(called, report, f"{path}.{key}")
    return None if calls is None else _Said("", calls=calls)


def _said(value: Mapping[str, Any], key: str, report: RowReporter, path: str) -> _Said | None:
    """Read what a turn says, in one text or in parts."""
    calls = called_tools(value, report, path) or ()
    content: Any = value.get(key)
    if content is None and calls:
        return _Said("", calls=calls)
    if not is_list(content):
        text = report.text(value, key, path=f"{path}.", blank=True)
        return None if text is None else _Said(text, calls=calls)
    parts = [_part(part, report, f"{path}.{key}[{i}]") for i, part in enumerate(content)]
    read = [part for part in parts if part is not None]
    if len(read) < len(parts):
        return None
    text = "".join(part.text for part in read)
    if not report.row.clean and not report.undamaged(text, f"{path}.{key}"):
        return None
    thought = "".join(part.thought for part in read)
    return _Said(text, thought, (*calls, *(call for part in read for call in part.calls)))


def _part(given: Any, report: RowReporter, path: str) -> _Said | None:
    """Read one part of a content; report one that is neither text nor reasoning nor a call."""
    part = {"text": given} if isinstance(given, str) else without_nulls(given)
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    key = next((key for key in (*_PART_KEYS, kind) if isinstance(part.get(key), str)), None) if kind else None
    if key is None or kind not in (*_TEXT_PARTS, *_REASONING_PARTS, *_CALLERS):
        found = f"a part of type {kind!r}" if isinstance(kind, str) and kind != "text" else "a part without a text"
        report.add(path, f"the content has {found}, and only text can be trained", "remove the row")
        return None
    for other in part.keys() - {"type", key}:
        if holds_text(part[other]):
            report.unused[f"{_shape(path)}.{other}"] = None
    if kind in _CALLERS:
        calls = function_call(part[key], report, path)
        return None if calls is None else _Said("", calls=calls)
    return _Said("", thought=part[key]) if kind in _REASONING_PARTS else _Said(part[key])


def _is_learned(value: Mapping[str, Any], role: str | None, report: RowReporter, path: str) -> bool:
    """Return whether the marks of a turn let it be learned; report marks that say neither yes nor no."""
    learned: dict[str, bool] = {}
    for mark in _MARKS:
        given = value.get(mark)
        if given is None:
            continue
        if given not in (0, 1):
            report.add(
                f"{path}.{mark}",
                f"the {mark} is {given!r}, expected 0 or 1 (false or true)",
                "a turn is learned or not; write 0 to read it only, 1 to learn it",
            )
            continue
        learned[mark] = bool(given)
    if len(set(learned.values())) > 1:
        said = " and ".join(f"{mark} {value[mark]!r}" for mark in learned)
        report.add(path, f"the marks {said} contradict each other", "keep one of them")
    if role not in (None, "assistant") and True in learned.values():
        # Only answers are learned, whatever asks for more.
        report.unused.update({f"{_shape(path)}.{mark} of '{role}' turns": None for mark in learned})
    return all(learned.values())


def _extra(value: Mapping[str, Any], thought: str, report: RowReporter, path: str) -> dict[str, Any]:
    """Return the keys of a turn that a chat template may read."""
    extra = {}
    for key in value.keys() - _READ_KEYS:
        item = without_nulls(value[key])
        if key in MEDIA and not is_blank(item):
            report.add(f"{path}.{key}", f"the turn has '{key}', and only text can be trained", "remove the row")
        elif not is_blank(item):
            extra[key] = item
            if key not in _TEMPLATE_KEYS and holds_text(item):
                report.extra_keys[f"{_shape(path)}.{key}"] = None
    if thought:
        if extra.get("reasoning_content", thought) != thought:
            report.add(f"{path}.reasoning_content", "the turn holds two thoughts", "keep one of them")
        extra["reasoning_content"] = thought
    if not report.row.clean:
        for key, item in (("name", value.get("name")), *extra.items()):
            if isinstance(item, str):
                report.undamaged(item, f"{path}.{key}")
    return {key: extra[key] for key in sorted(extra)}


def _shape(path: str) -> str:
    """Return a path without the numbers of its items: ``messages[3]`` -> ``messages[]``."""
    return "".join(part if i == 0 else f"[]{part.partition(']')[2]}" for i, part in enumerate(path.split("[")))


def _role(value: Mapping[str, Any], key: str, report: RowReporter, path: str) -> tuple[str | None, str | None]:
    """Return a turn's role as it is written, in lower case, and the role that it means."""
    written = report.text(value, key, path=f"{path}.")
    if written is None:
        return None, None
    speaker = written.strip().lower()
    role = _ROLE_OF.get(speaker)
    if role is None:
        known = "human, gpt, system, function_call or observation" if key == "from" else ", ".join(ROLES)
        report.add(f"{path}.{key}", f"unknown role {written!r}{_role_hint(speaker)}", f"use {known}")
    return speaker, role


def _role_hint(role: str) -> str:
    match = _ROLE_MEANT.get(role) or nearest(role, _ROLE_OF)
    return f" — did you mean '{_ROLE_OF[match]}'?" if match else ""
