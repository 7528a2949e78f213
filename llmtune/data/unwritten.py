"""Parts of a conversation that a chat template does not write, so that the model never sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.data.proof import is_written
from llmtune.data.records import Conversation

# Keys whose values link a call to its result, or name a kind: structure, not text.
_LINKS = ("id", "tool_call_id", "type")


def unwritten(chat: Conversation, text: str) -> tuple[str, ...]:
    """Return the names of the parts of ``chat`` whose texts do not stand in ``text``, sorted.

    Looked at are tools, calls, names and further keys of messages; contents are proven elsewhere.

    Args:
        chat: The conversation.
        text: What the chat template wrote.
    """
    if chat.tools is None and not any(message.extra or message.name or message.tool_calls for message in chat.messages):
        return ()
    missing: dict[str, None] = {}
    for name, part in _parts(chat):
        if name not in missing and not is_written(part, text, 0, len(text)):
            missing[name] = None
    return tuple(sorted(missing))


def _parts(chat: Conversation) -> Iterator[tuple[str, str]]:
    """Yield every text besides the contents, with the name of its place."""
    yield from _texts(chat.tools, "tools")
    for message in chat.messages:
        if message.name:
            yield from _texts(message.name, "messages[].name")
        if message.tool_calls:
            yield from _texts(message.tool_calls, "messages[].tool_calls")
        if message.extra:
            for key, value in message.extra.items():
                if not _is_link(key, value):
                    yield from _texts(value, f"messages[].{key}")


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not _is_link(key, item):
                yield from _texts(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, f"{name}[]")


def _is_link(key: str, value: Any) -> bool:
    return key in _LINKS and isinstance(value, str) and not any(char.isspace() for char in value)
