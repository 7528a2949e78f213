"""Shapes: the ways to give one conversation to a chat template.

Templates disagree about tools and calls. Most read schemas from the variable ``tools``; Phi-4-mini reads them from the
system message, as JSON text; SmolLM3 reads ``xml_tools``. Some join the arguments of a call as text; some demand ids of
nine characters. A shape changes only the way of giving. The conversation stays the same, and the proof compares the
rendered text with the conversation.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Literal, NamedTuple

from llmtune.data.records import Conversation, Message

_ID = re.compile(r"[a-zA-Z0-9]{9}")
_ID_LETTERS = string.ascii_letters + string.digits
# Names that templates read schemas from: variables, and keys of the system message.
_TOOL_VARIABLES = ("xml_tools", "functions")
_TOOL_KEYS = ("tools", "functions")


class Given(NamedTuple):
    """The input of a chat template. ``lead``: number of messages added before the first of the conversation."""

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None = None
    lead: int = 0


class ToolPlace(NamedTuple):
    """The place of tool schemas: a variable of the template, or a key of its system message."""

    kind: Literal["variable", "key"]
    name: str
    as_text: bool = False


_TOOLS = ToolPlace("variable", "tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A way to give a conversation to a template. The default is the way of `apply_chat_template`.

    Attributes:
        place: Where the template finds the tool schemas.
        schemas: Wrapped schemas are ``{"type": "function", "function": {…}}``, bare ones the inner object.
        calls: The same for tool calls.
        arguments: Arguments of calls as objects, or as their JSON text.
        ids: Ids of calls: ``nine`` letters and digits (Mistral), or the ``name`` and number of the call (Kimi).
        content: The content of a turn with calls and no text: empty text, or none.
    """

    place: ToolPlace = _TOOLS
    schemas: Literal["given", "wrapped", "bare"] = "given"
    calls: Literal["given", "wrapped"] = "given"
    arguments: Literal["given", "text"] = "given"
    ids: Literal["given", "nine", "name"] = "given"
    content: Literal["given", "none"] = "given"

    def give(self, chat: Conversation) -> Given:
        """Return the input of the template for ``chat``."""
        messages = [message.to_template() for message in chat.messages]
        if any(message.role == "tool" for message in chat.messages):
            _link_results(messages)
        if self is PLAIN:
            return Given(messages, chat.tools)
        for message in messages:
            if message.get("tool_calls"):
                message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
                if self.content == "none" and not message["content"].strip():
                    message["content"] = None
        if self.ids != "given":
            _write_ids(messages, self.ids)
        return self._with_tools(messages, chat.tools)

    def _with_tools(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Given:
        if not tools:
            return Given(messages, tools)
        if self.schemas != "given":
            tools = [_wrapped(tool) if self.schemas == "wrapped" else _bare(tool) for tool in tools]
        if self.place == _TOOLS:
            return Given(messages, tools)
        value: Any = json.dumps(list(tools), ensure_ascii=False) if self.place.as_text else list(tools)
        if self.place.kind == "variable":
            return Given(messages, None, {self.place.name: value})
        lead = int(messages[0]["role"] not in ("system", "developer"))
        if lead:
            messages.insert(0, {"role": "system", "content": ""})
        messages[0][self.place.name] = value
        return Given(messages, None, lead=lead)

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(call)
        if self.calls == "wrapped":
            changed = _wrapped_call(changed)
        if self.arguments == "text":
            inner = function_of(changed)
            if isinstance(inner.get("arguments"), Mapping):
                inner = {**inner, "arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
                changed = {**changed, "function": inner} if "function" in changed else dict(inner)
        return changed

    @property
    def changes(self) -> int:
        """The number of fields that differ from the plain shape."""
        return sum(getattr(self, field.name) != field.default for field in fields(self))


PLAIN = Shape()


def other_shapes(chat: Conversation, source: str) -> list[Shape]:
    """Return the shapes beside the plain one that may suit ``chat`` and a template, in the order to try them.

    The order depends on the conversation and the template alone: first those with the fewest changes. The first shape
    that passes the proof is therefore the same whatever rows were encoded before, in every process.

    Args:
        chat: The conversation.
        source: The Jinja text of the template; a shape for a name that the text does not mention is left out.
    """
    calls = [call for message in chat.messages for call in message.tool_calls or ()]
    shapes = (
        Shape(place=place, schemas=schemas, calls=wrapping, arguments=arguments, ids=ids, content=content)
        for place, schemas, wrapping, arguments, ids, content in product(
            _places(chat, source),
            _schemas(chat),
            _wrappings(calls),
            _arguments(calls),
            _ids(chat, calls, source),
            _contents(chat.messages),
        )
    )
    return sorted((shape for shape in shapes if shape != PLAIN), key=lambda shape: shape.changes)


def function_of(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object with name and parameters or arguments of a schema or a call, wrapped or bare."""
    inner = item.get("function")
    return inner if isinstance(inner, Mapping) else item


def _places(chat: Conversation, source: str) -> Iterator[ToolPlace]:
    yield _TOOLS
    if not chat.tools:
        return
    for name in _TOOL_KEYS:
        if re.search(rf"""\[\s*['"]{name}['"]|\.{name}\b|['"]{name}['"]\s*(\)|,|in\b)""", source):
            yield ToolPlace("key", name)
            yield ToolPlace("key", name, as_text=True)
    for name in _TOOL_VARIABLES:
        if re.search(rf"""(?<![.\w'"]){name}\b""", source):
            yield ToolPlace("variable", name)
            yield ToolPlace("variable", name, as_text=True)


def _schemas(chat: Conversation) -> Iterator[Literal["given", "wrapped", "bare"]]:
    yield "given"
    wrapped = [function_of(tool) is not tool for tool in chat.tools or ()]
    if not all(wrapped):
        yield "wrapped"
    if any(wrapped):
        yield "bare"


def _wrappings(calls: Sequence[Mapping[str, Any]]) -> Iterator[Literal["given", "wrapped"]]:
    yield "given"
    if any(call != _wrapped_call(call) for call in calls):
        yield "wrapped"


def _arguments(calls: Sequence[Mapping[str, Any]]) -> Iterator[Literal["given", "text"]]:
    yield "given"
    if any(isinstance(function_of(call).get("arguments"), Mapping) for call in calls):
        yield "text"


def _ids(
    chat: Conversation, calls: Sequence[Mapping[str, Any]], source: str
) -> Iterator[Literal["given", "nine", "name"]]:
    yield "given"
    if not calls or not re.search(r"\bid\b|tool_call_id|call_id", source):
        return
    ids = [call.get("id") for call in calls]
    ids += [(message.extra or {}).get("tool_call_id") for message in chat.messages if message.role == "tool"]
    if not all(isinstance(each, str) and _ID.fullmatch(each) for each in ids):
        yield "nine"
    yield "name"


def _contents(messages: Sequence[Message]) -> Iterator[Literal["given", "none"]]:
    yield "given"
    if any(message.tool_calls and not message.content.strip() for message in messages):
        yield "none"


def _wrapped(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "function", "function": tool} if function_of(tool) is tool else tool


def _bare(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return function_of(tool)


def _wrapped_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if function_of(call) is not call:
        return {"type": "function", **call}
    inner = {key: value for key, value in call.items() if key not in ("id", "type")}
    return {"type": call.get("type", "function"), **({"id": call["id"]} if "id" in call else {}), "function": inner}


def _results(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, int]]:
    """Yield the positions of each result, of the turn with its call, and of the call in that turn.

    A result belongs to the call whose id it names, else to the first call since the last question without a result.
    """
    pending: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] == "user":
            pending = []
        pending += [(i, k) for k in range(len(message.get("tool_calls") or ()))]
        if message["role"] == "tool" and pending:
            named = message.get("tool_call_id")
            ids = [messages[turn]["tool_calls"][k].get("id") for turn, k in pending]
            turn, k = pending.pop(ids.index(named) if named is not None and named in ids else 0)
            yield i, turn, k


def _link_results(messages: Sequence[dict[str, Any]]) -> None:
    """Write the name of its tool into each result without one, for templates that write it before the content.

    Gemma 4 finds the name by the id of the call, which is ambiguous where several calls of a turn have none: these get
    ids.
    """
    for i, turn, k in list(_results(messages)):
        calls = messages[turn]["tool_calls"]
        name = function_of(calls[k]).get("name")
        if isinstance(name, str):
            messages[i].setdefault("name", name)
        if len(calls) > 1 and calls[k].get("id") is None and messages[i].get("tool_call_id") is None:
            made = _made_id(function_of(calls[k]), turn + k, "nine")
            calls[k] = {**calls[k], "id": made}
            messages[i]["tool_call_id"] = made


def _write_ids(messages: Sequence[dict[str, Any]], kind: Literal["nine", "name"]) -> None:
    """Give every call an id, and every result the id of its call."""
    linked = list(_results(messages))
    number = 0
    for message in messages:
        for call in message.get("tool_calls") or ():
            call["id"] = _made_id(function_of(call), number, kind)
            number += 1
    for i, turn, k in linked:
        messages[i]["tool_call_id"] = messages[turn]["tool_calls"][k]["id"]


def _made_id(function: Mapping[str, Any], number: int, kind: Literal["nine", "name"]) -> str:
    if kind == "name":
        return f"functions.{function.get('name')}:{number}"
    said = json.dumps([number, function], sort_keys=True, default=str)
    digest = hashlib.sha256(said.encode(errors="surrogatepass")).digest()
    return "".join(_ID_LETTERS[byte % len(_ID_LETTERS)] for byte in digest[:9])
