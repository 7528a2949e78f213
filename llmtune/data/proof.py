"""Proof that a rendered text holds all that its conversation says: texts, answers, tools, calls and results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmtune.data.records import Conversation, Message
from llmtune.data.rendering import REASONING_FIELDS, SpecialTokens, skip_space
from llmtune.data.shapes import function_of

OTHER_TEMPLATE = "use a template that fits the data: --set data.chat_template=FILE"
# Marks of reasoning that a few tokenizers flag as special, and that answers hold by right.
_REASONING_MARKS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})
# A word such as /no_think, which SmolLM3 and others read as a switch; no part of a path.
_SWITCH = re.compile(r"(?<![\w/.:-])/[a-z][a-z_]+(?![\w/-])")


class TemplateRefusal(Exception):
    """Why one row cannot be used with the template, and what to do about it.

    ``of_shape``: whether the row may be accepted when it is given to the template in another way.
    """

    def __init__(
        self, reason: str, *, hint: str = OTHER_TEMPLATE, field: str | None = None, of_shape: bool = False
    ) -> None:
        self.hint = hint
        self.field = field
        self.of_shape = of_shape
        super().__init__(reason)


class TemplateFailure(TemplateRefusal):
    """The template raised an error. Another shape of the row may suit it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, of_shape=True)


def clip(text: str) -> str:
    """``text`` quoted, its middle left out when it is long."""
    return repr(text if len(text) <= 60 else f"{text[:30]}…{text[-30:]}")


# ── special tokens in the data ───────────────────────────────────────────────────────────────────────────────────────


def without_stop_tokens(chat: Conversation, specials: SpecialTokens) -> tuple[Conversation, dict[int, str]]:
    """Take the stop token from the end of answers that bring one, and refuse every other special token in a text.

    A special token in a text would act as if the template had written it. The template writes the stop token of an
    answer itself, so that an answer with one would end with two. `check_stop_tokens` proves that it is the same token.

    Returns:
        The conversation, and the tokens that were taken from the end of its answers by the turn's position.
    """
    removed: dict[int, str] = {}
    for i, message in enumerate(chat.messages):
        for field, text in _texts(message):
            for token in specials.inside(text):
                if message.role != "assistant":
                    raise TemplateRefusal(
                        f"the text of role {message.role!r} contains the special token {token!r}, which the model "
                        "reads as written by the chat template (prompt injection)",
                        hint="take the token out of the text, or write it in another way",
                        field=f"messages[{i}].{field}",
                    )
                if token in _REASONING_MARKS:
                    continue
                if field == "content" and i not in removed and _ends_once_with(text, token, specials):
                    removed[i] = token
                    continue
                raise TemplateRefusal(
                    f"the answer contains the special token {token!r}; the model would learn to write it in "
                    "the middle of its answers",
                    hint="take the token out of the answer: the chat template writes the stop token itself",
                    field=f"messages[{i}].{field}",
                )
    for text in _strings(chat.tools):
        for token in specials.inside(text):
            raise TemplateRefusal(
                f"a tool's description contains the special token {token!r} (prompt injection)",
                hint="take the token out of the description",
                field="tools",
            )
    if not removed:
        return chat, removed
    messages = tuple(
        replace(message, content=message.content.rstrip().removesuffix(removed[i]).rstrip())
        if i in removed
        else message
        for i, message in enumerate(chat.messages)
    )
    return replace(chat, messages=messages), removed


def _ends_once_with(text: str, token: str, specials: SpecialTokens) -> bool:
    """Return whether ``token`` is the last thing of ``text``, after some text and no other special token."""
    rest = text.rstrip().removesuffix(token)
    return rest != text.rstrip() and bool(rest.strip()) and set(specials.inside(rest)) <= _REASONING_MARKS


def check_stop_tokens(chat: Conversation, removed: Mapping[int, str], text: str) -> None:
    """Refuse a template that does not close an answer with the stop token that was taken from its end."""
    for i, token in removed.items():
        content = chat.messages[i].content.rpartition("</think>")[2].strip()
        at = text.find(content)
        while at >= 0 and not text.startswith(token, skip_space(text, at + len(content))):
            at = text.find(content, at + 1)
        if at < 0:
            raise TemplateRefusal(
                f"the answer ends with the special token {token!r}, and the chat template closes it in another way",
                hint="take the token out of the answer: the chat template writes the stop token itself",
                field=f"messages[{i}].content",
            )


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check_written(chat: Conversation, text: str, source: str) -> None:
    """Refuse a template that leaves out anything said: a system prompt, a call, a tool's result, all text (vision).

    Args:
        chat: The conversation.
        text: Its rendered text.
        source: The Jinja text of the template.
    """
    at = 0
    for i, message in enumerate(chat.messages):
        content = message.content.strip()
        if message.role == "assistant":  # earlier reasoning may go where it is not learned
            content = "" if message.tool_calls else content.rpartition("</think>")[2].strip()
        # In their order, so that long conversations are searched once; templates may also move a system prompt.
        found = text.find(content, at)
        if found >= 0:
            at = found + len(content)
        elif content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            if message.role == "assistant" and message.supervised:
                raise TemplateRefusal(f"the chat template rewrites the assistant's text {clip(content)}")
            if message.role in ("assistant", "tool") or not _switches_removed(content, text, source):
                raise TemplateRefusal(
                    f"the chat template leaves out or rewrites the text of role {message.role!r} {clip(content)}",
                    field=f"messages[{i}].content",
                )


def _switches_removed(content: str, text: str, source: str) -> bool:
    """Return whether ``text`` holds all of ``content`` but the switches that the template itself reads.

    A switch is a word such as ``/no_think`` that the template's own text names. Nothing but whitespace may stand in
    its place.
    """
    switches = [found.span() for found in _SWITCH.finditer(content) if found[0] in source]
    if not switches:
        return False
    borders = [0, *(border for span in switches for border in span), len(content)]
    pieces = [content[start:end].strip() for start, end in zip(borders[::2], borders[1::2], strict=True)]
    return re.search(r"\s*".join(re.escape(piece) for piece in pieces if piece), text) is not None


def check_answer(message: Message, text: str, start: int, end: int) -> None:
    """Refuse a template that does not write all of a supervised answer into ``text[start:end]``."""

    def written(part: str) -> bool:
        # Calls follow the content; without calls the answer is what the turn ends with.
        return text.find(part, start, end) >= 0 if message.tool_calls else text.endswith(part, start, end)

    content = message.content.strip()
    if not written(content) and not ("</think>" in content and written(content.rpartition("</think>")[2].strip())):
        if content and (at := text.rfind(content, start, end)) >= 0:
            raise TemplateRefusal(
                "the chat template leaves no stop token after the assistant's text: "
                f"{clip(text[at + len(content) : end])} is none of the tokenizer's special tokens"
            )
        raise TemplateRefusal(f"the chat template rewrites the assistant's text {clip(content)}")
    if "</think>" in content and (at := text.rfind(content, start, end)) >= 0:
        if text[max(0, at - 20) : at].rstrip().endswith(("<think>", "</think>")):
            raise TemplateRefusal(
                "the chat template writes a thought of its own before the one in the content",
                hint="move the thought from the content to a field 'reasoning_content' of the message",
            )
    for thought in reasoning(message):
        if text.find(thought, start, end) < 0:
            raise TemplateRefusal(f"the chat template strips the reasoning of an answer, {clip(thought)}")
    if message.tool_calls:
        check_calls(message, text, start, end)


def reasoning(message: Message) -> Iterator[str]:
    """The pieces of reasoning that a message carries, in its fields and between the marks in its content."""
    for field in REASONING_FIELDS:
        value = (message.extra or {}).get(field)
        if isinstance(value, str) and value.strip():
            yield value.strip()
    if "</think>" in message.content:
        for piece in message.content.rpartition("</think>")[0].split("<think>"):
            if piece.strip():
                yield piece.strip()


# ── tools and calls ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_calls(message: Message, text: str, start: int, end: int, *, mark: str = "") -> None:
    """Refuse a template that does not write each call into ``text[start:end]``: name, and every key and value.

    Args:
        message: The turn with the calls.
        text: The rendered text.
        start: Where to begin in it.
        end: Where to stop.
        mark: An ending that every name of a call has in the text, see `renamed_calls`.
    """
    for call in message.tool_calls or ():
        function = function_of(call)
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and text.find(name + mark, start, end) < 0:
            raise TemplateRefusal(
                f"the chat template leaves out the call of the tool {name!r}",
                hint=f"write the call into the content in the model's own form, or {OTHER_TEMPLATE}",
                of_shape=True,
            )
        if arguments and isinstance(arguments, Mapping) and text.find(str(dict(arguments)), start, end) >= 0:
            raise TemplateRefusal(
                f"the chat template writes the arguments of the call of {name!r} as Python, expected JSON",
                of_shape=True,
            )
        for leaf in _leaves(arguments):
            if not is_written(leaf, text, start, end):
                raise TemplateRefusal(
                    f"the chat template leaves out {clip(str(leaf))} of the call of the tool {name!r}", of_shape=True
                )


def check_results(chat: Conversation, text: str) -> None:
    """Refuse a template that leaves out the name of a tool's result; `check_written` proves its content."""
    for i, message in enumerate(chat.messages):
        if message.role == "tool" and message.name and not is_written(message.name, text, 0, len(text)):
            raise TemplateRefusal(
                f"the chat template leaves out the name {message.name!r} of a tool's result",
                hint=f"remove 'name' from the message where the model need not know it, or {OTHER_TEMPLATE}",
                field=f"messages[{i}].name",
                of_shape=True,
            )


def check_tools(tools: Sequence[Mapping[str, Any]], prompt: str, *, as_json: bool = False, mark: str = "") -> None:
    """Refuse a template that does not write each tool into the prompt: its name, parameters and descriptions.

    Args:
        tools: The schemas.
        prompt: The prompt of the first learned answer.
        as_json: Whether to refuse schemas that are written as Python writes them.
        mark: An ending that every name of a tool has in the prompt, see `renamed_tools`.
    """
    for tool in tools:
        function = function_of(tool)
        name = function.get("name")
        if as_json and str(dict(function)) in prompt:
            raise TemplateRefusal(
                f"the chat template writes the schema of the tool {name!r} as Python, expected JSON",
                field="tools",
                of_shape=True,
            )
        if isinstance(name, str) and not is_written(name + mark, prompt, 0, len(prompt)):
            raise TemplateRefusal(
                f"the chat template leaves out the tool {name!r} from the prompt", field="tools", of_shape=True
            )
        for part in _schema_texts(function) if isinstance(name, str) else _strings(tool):
            if not is_written(part, prompt, 0, len(prompt)):
                raise TemplateRefusal(
                    f"the chat template leaves out {clip(part)} of the tool {name!r} from the prompt",
                    field="tools",
                    of_shape=True,
                )


def renamed_tools(
    tools: Sequence[Mapping[str, Any]], messages: Sequence[Message]
) -> tuple[tuple[Mapping[str, Any], ...], str] | None:
    """Return the tools under other names and the ending of these, None where no message mentions a name of theirs.

    A name in the prompt proves nothing about the schemas where a message holds the same word. The other names stand in
    no message.
    """
    said = _all_texts(messages)
    names = [name for tool in tools if isinstance(name := function_of(tool).get("name"), str)]
    if not any(name in said for name in names):
        return None
    mark = _unused(said)
    return tuple(_renamed(tool, mark) for tool in tools), mark


def renamed_calls(chat: Conversation, turns: Sequence[int]) -> tuple[Conversation, str]:
    """Return the conversation with other names in the calls of ``turns``, and the ending of these names."""
    mark = _unused(_all_texts(chat.messages))
    messages = list(chat.messages)
    for i in turns:
        calls = tuple(_renamed(call, mark) for call in messages[i].tool_calls or ())
        messages[i] = replace(messages[i], tool_calls=calls)
    return replace(chat, messages=tuple(messages)), mark


def _all_texts(messages: Sequence[Message]) -> str:
    return "\n".join(text for message in messages for _, text in _texts(message))


def _unused(said: str) -> str:
    return next(mark for n in range(len(said) + 1) if (mark := f"_x{n}") not in said)


def _renamed(item: Mapping[str, Any], mark: str) -> Mapping[str, Any]:
    function = function_of(item)
    inner = {**function, "name": f"{function.get('name')}{mark}"}
    return inner if function is item else {**item, "function": inner}


def _schema_texts(schema: Any) -> Iterator[str]:
    """The descriptions and the names of parameters in a JSON schema, at every depth."""
    if not isinstance(schema, Mapping):
        return
    description = schema.get("description")
    if isinstance(description, str):
        yield description
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, each in properties.items():
            yield str(name)
            yield from _schema_texts(each)
    for key in ("parameters", "items"):
        yield from _schema_texts(schema.get(key))


def _leaves(value: Any) -> Iterator[Any]:
    """Every key, and every value that is no object and no list, of a JSON value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif value is not None and value != "":
        yield value


def is_written(value: Any, text: str, start: int, end: int) -> bool:
    """Return whether ``text[start:end]`` holds a text or a number, as it is or as JSON or Python write it."""
    if not isinstance(value, str):
        return text.find(json.dumps(value, default=str), start, end) >= 0 or text.find(str(value), start, end) >= 0
    value = value.strip()
    if text.find(value, start, end) >= 0:
        return True
    quoted = json.dumps(value, ensure_ascii=False)[1:-1]
    forms = (quoted, json.dumps(value)[1:-1], json.dumps(quoted, ensure_ascii=False)[1:-1], repr(value)[1:-1])
    return any(text.find(form, start, end) >= 0 for form in forms)


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """The texts of a message with the names of their fields."""
    yield "content", message.content
    if message.tool_calls or message.name or message.extra:
        for text in _strings(message.tool_calls):
            yield "tool_calls", text
        if message.name:
            yield "name", message.name
        for field, value in (message.extra or {}).items():
            for text in _strings(value):
                yield field, text


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
