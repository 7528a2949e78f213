"""Where the answers are in the text that a chat template writes.

An answer's span is what the model will have to write at inference: from the end of the generation prompt to the end
of the stop token. A template that marks its answers (``{% generation %}``) says so itself; any other is asked twice,
for the whole text and for the prompt of each answer, and the prompt must be how the text begins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.data.records import Conversation, Message, Problem
from llmtune.errors import ConfigError

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_HINT = "use a template that fits the data: --set data.chat_template=FILE"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A rendered conversation; ``spans`` are the character ranges of its supervised answers, stop tokens included."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendered:
    text: str
    marks: tuple[Span, ...] = ()


class TemplateRefusal(Exception):
    """Why the template cannot be used for one row."""


class ChatTemplate:
    """Renders conversations and finds their answers.

    Args:
        tokenizer: A tokenizer of transformers.
        template: The Jinja text of a chat template; the tokenizer's own when None.
        stops: Texts of the tokens that can end a turn.
    """

    def __init__(self, tokenizer: Any, template: str | None, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._given = template
        self.text = template or _own_template(tokenizer)
        self._has_marks = self.text is not None and _MARKER.search(self.text) is not None
        pattern = "|".join(map(re.escape, sorted(stops, key=len, reverse=True))) or "(?!)"
        self._stop = re.compile(pattern)
        self._stop_next = re.compile(rf"\s*(?:{pattern})")

    def locate(self, chats: Sequence[Conversation]) -> list[Located | Problem]:
        """Per conversation its text and the spans of its supervised answers, or why the template cannot be used.

        Raises:
            ConfigError: There is no template, or it is not valid Jinja.
        """
        if self.text is None:
            raise ConfigError(
                "chat template",
                ["the tokenizer has none and the data is conversations; give one with --set data.chat_template=FILE"],
            )
        whole = self._render_all([(chat, len(chat.messages)) for chat in chats], prompt=False)
        wanted = [
            (chat, i)
            for chat, rendered in zip(chats, whole, strict=True)
            if not self._has_marks and isinstance(rendered, _Rendered)
            for i in _supervised_turns(chat)
        ]
        prompts = iter(self._render_all(wanted, prompt=True))
        results: list[Located | Problem] = []
        for chat, rendered in zip(chats, whole, strict=True):
            mine = []
            if not self._has_marks and isinstance(rendered, _Rendered):
                mine = [next(prompts) for _ in _supervised_turns(chat)]
            try:
                results.append(self._locate(chat, _unless_refused(rendered), mine))
            except TemplateRefusal as refusal:
                results.append(refused(chat, str(refusal)))
        return results

    def _locate(
        self, chat: Conversation, rendered: _Rendered, prompts: Sequence[_Rendered | TemplateRefusal]
    ) -> Located:
        source = self.text or ""
        if chat.tools and "tools" not in source:
            raise TemplateRefusal("the chat template has no place for 'tools'")
        if any(message.tool_calls for message in chat.messages) and "tool_calls" not in source:
            raise TemplateRefusal("the chat template has no place for 'tool_calls'")
        if self._has_marks:
            return Located(text=rendered.text, spans=self._marked_spans(chat, rendered))
        return Located(text=rendered.text, spans=self._derived_spans(chat, rendered.text, prompts))

    # ── rendering ────────────────────────────────────────────────────────────────────────────────────────────────

    def _render_all(
        self, jobs: Sequence[tuple[Conversation, int]], *, prompt: bool
    ) -> list[_Rendered | TemplateRefusal]:
        """The first so many messages of each conversation, all in one call where that works."""
        if jobs and all(chat.tools is None and count > 0 for chat, count in jobs):
            try:
                return list(self._render([_first(chat, count) for chat, count in jobs], None, prompt))
            except Exception as error:
                # A template is a foreign program and may raise anything: go row by row to see whose fault it is.
                if len(jobs) == 1:
                    return [_refusal(error)]
        return [self._render_one(chat, count, prompt=prompt) for chat, count in jobs]

    def _render_one(self, chat: Conversation, count: int, *, prompt: bool) -> _Rendered | TemplateRefusal:
        if count == 0:
            return TemplateRefusal("the conversation begins with the assistant, so no prompt leads to that answer")
        try:
            return self._render([_first(chat, count)], chat.tools, prompt)[0]
        except Exception as error:  # see above
            return _refusal(error)

    def _render(self, conversations: list[list[dict[str, Any]]], tools: Any, prompt: bool) -> list[_Rendered]:
        tools = list(tools) if tools else None
        if not self._has_marks:
            texts = self._tokenizer.apply_chat_template(
                conversations,
                tools=tools,
                chat_template=self._given,
                add_generation_prompt=prompt,
                tokenize=False,
            )
            return [_Rendered(text=text) for text in texts]
        # The tokenizer's own method keeps the marks to itself unless it also tokenises, row by row.
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=conversations,
            tools=tools,
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **self._tokenizer.special_tokens_map,
        )
        return [_Rendered(text=text, marks=tuple(spans)) for text, spans in zip(*rendered, strict=True)]

    # ── spans ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _marked_spans(self, chat: Conversation, rendered: _Rendered) -> tuple[Span, ...]:
        text = rendered.text
        turns = [message for message in chat.messages if message.role == "assistant"]
        if len(rendered.marks) != len(turns):
            raise TemplateRefusal(f"the chat template marks {len(rendered.marks)} answers, the row has {len(turns)}")
        spans = []
        for (start, end), message in zip(rendered.marks, turns, strict=True):
            # Where the marks leave the stop token out, it is the one that follows.
            follows = None if self._closed(text, start, end, message) else self._stop_next.match(text, end)
            limit = end if follows is None else follows.end()
            if message.supervised:
                spans.append((start, self._end(text, start, limit, message)))
        return tuple(spans)

    def _closed(self, text: str, start: int, end: int, message: Message) -> bool:
        """Whether a stop token of the template's own is inside the marks."""
        if message.tool_calls:
            marked = text[start:end].rstrip()
            return any(marked.endswith(stop) for stop in self._stop.findall(marked))
        content = message.content.strip()
        return self._stop.search(text, text.find(content, start, end) + len(content), end) is not None

    def _derived_spans(
        self, chat: Conversation, text: str, prompts: Sequence[_Rendered | TemplateRefusal]
    ) -> tuple[Span, ...]:
        spans: list[Span] = []
        last_stop: str | None = None
        # From the last answer backwards: nothing follows it, so its stop token is known for certain.
        for i, prompt in reversed(list(zip(_supervised_turns(chat), prompts, strict=True))):
            message, start = chat.messages[i], _start(text, _unless_refused(prompt).text)
            end = self._plain_end(text, start, message)
            if i == len(chat.messages) - 1:
                end = end or self._end(text, start, len(text), message)
                last_stop = self._stop.findall(text, start, end)[-1]
            elif end is None or last_stop is None or not text.endswith(last_stop, start, end):
                # Not plainly this turn's own stop token: ask the template where the turn ends.
                rendered = _unless_refused(self._render_one(chat, i + 1, prompt=False))
                end = self._end(text, start, _common_length(rendered.text, text), message)
            self._check_opening(chat, i, text, start)
            spans.append((start, end))
        return tuple(reversed(spans))

    def _plain_end(self, text: str, start: int, message: Message) -> int | None:
        """The end of the stop token where only whitespace surrounds the content, else None."""
        if message.tool_calls:
            return None
        content = message.content.strip()
        at = start
        while at < len(text) and text[at].isspace():
            at += 1
        if not text.startswith(content, at):
            return None
        stop = self._stop_next.match(text, at + len(content))
        return None if stop is None else stop.end()

    def _end(self, text: str, start: int, limit: int, message: Message) -> int:
        """The end of the stop token of the answer that begins at ``start`` and reaches ``limit`` at most."""
        if message.tool_calls:
            # Calls may be written with special tokens of their own; the stop token is the last thing in the turn.
            end = start + len(text[start:limit].rstrip())
            if any(stop.end() == end for stop in self._stop.finditer(text, start, limit)):
                return end
        else:
            content = message.content.strip()
            at = text.find(content, start, limit)
            if at < 0:
                raise TemplateRefusal(f"the chat template rewrites the assistant's text {clip(content)}")
            stop = self._stop.search(text, at + len(content), limit)
            if stop is not None:
                return stop.end()
        raise TemplateRefusal(
            "the chat template leaves no stop token after the assistant's text, so the model would never learn to stop"
        )

    def _check_opening(self, chat: Conversation, index: int, text: str, start: int) -> None:
        """Refuse a template that ignores ``add_generation_prompt``, so that its header would be learned."""
        content = chat.messages[index].content.strip()
        before = text[start : text.find(content, start)] if content else ""
        if not before.strip():
            return
        without = self._render_one(chat, index, prompt=False)
        if isinstance(without, _Rendered) and len(without.text) == start:
            raise TemplateRefusal(
                f"the chat template ignores add_generation_prompt, so {clip(before)} would be learned as an answer"
            )


def refused(chat: Conversation, reason: str) -> Problem:
    """The problem of a row that the template cannot do justice to."""
    return Problem(file=chat.file, line=chat.line, field=None, problem=reason, hint=_HINT)


def clip(text: str) -> str:
    """``text`` quoted, its middle left out when it is long."""
    return repr(text if len(text) <= 60 else f"{text[:30]}…{text[-30:]}")


def _own_template(tokenizer: Any) -> str | None:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template


def _first(chat: Conversation, count: int) -> list[dict[str, Any]]:
    return [message.to_template() for message in chat.messages[:count]]


def _supervised_turns(chat: Conversation) -> list[int]:
    return [i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.supervised]


def _unless_refused(rendered: _Rendered | TemplateRefusal) -> _Rendered:
    if isinstance(rendered, TemplateRefusal):
        raise rendered
    return rendered


def _refusal(error: Exception) -> TemplateRefusal:
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        raise ConfigError("chat template", [f"not valid Jinja: {error} (line {error.lineno})"]) from error
    return TemplateRefusal(f"the chat template refuses the row: {error}")


def _start(text: str, prompt: str) -> int:
    if text.startswith(prompt):
        return len(prompt)
    same = _common_length(prompt, text)
    raise TemplateRefusal(
        "the chat template writes the prompt of an answer differently once the answer follows: "
        f"{clip(prompt[same:])} becomes {clip(text[same:])}"
    )


def _common_length(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
