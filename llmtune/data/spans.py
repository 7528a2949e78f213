"""Where the answers are in the text that a chat template writes.

An answer's span is what the model will have to write at inference: from the end of the generation prompt to the end
of the stop token. A template that marks its answers (``{% generation %}``) says so itself; any other is asked twice,
for the whole text and for the prompt of each answer, and the prompt must be how the text begins. The answer ends with
the special tokens that follow its text; those after an earlier answer must be those after the last one, or those that
the template would write if the conversation ended there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from llmtune.data.records import Conversation, Message, Problem
from llmtune.data.rendering import Renderer, Span, SpecialTokens, own_template, skip_space
from llmtune.errors import ConfigError

_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")

Supervise = Literal["all", "last", "completion", "text"]

_OTHER_TEMPLATE = "use a template that fits the data: --set data.chat_template=FILE"
_LAST_ONLY = f"learn only the last answer of each row (--set data.supervise=last), or {_OTHER_TEMPLATE}"
# Names under which a message may carry its reasoning (those that transformers passes on to templates).
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Marks of reasoning that a few tokenizers flag as special, and that answers hold by right.
_REASONING_MARKS = frozenset({"<think>", "</think>", "[THINK]", "[/THINK]"})


class Located(NamedTuple):
    """A rendered conversation; ``spans`` are the character ranges of its supervised answers, stop tokens included."""

    text: str
    spans: tuple[Span, ...]


class TemplateRefusal(Exception):
    """Why one row cannot be used with the template, and what to do about it."""

    def __init__(self, reason: str, *, hint: str = _OTHER_TEMPLATE, field: str | None = None) -> None:
        self.hint = hint
        self.field = field
        super().__init__(reason)


class ChatTemplate:
    """Renders conversations and finds their answers.

    Args:
        tokenizer: A tokenizer of transformers.
        template: The Jinja text of a chat template; the tokenizer's own when None.
        specials: Texts of the special tokens; an answer ends with such tokens.
        supervise: Which answers are learned: see `ChatEncoder`.
    """

    def __init__(self, tokenizer: Any, template: str | None, specials: Iterable[str], supervise: Supervise) -> None:
        self.text = template or own_template(tokenizer)
        # A tokenizer may have a template of its own for conversations with tools.
        with_tools = template or own_template(tokenizer, [{}])
        self._plain = Renderer(tokenizer, self.text or "")
        self._tools = Renderer(tokenizer, with_tools or "")
        self._specials = SpecialTokens(specials)
        self._supervise = supervise

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
        return [self._located(chat) for chat in chats]

    def _located(self, chat: Conversation) -> Located | Problem:
        renderer = self._tools if chat.tools else self._plain
        try:
            self._check_special_tokens(chat)
            if chat.tools and "tools" not in renderer.source:
                raise TemplateRefusal("the chat template has no place for 'tools'")
            if "tool_calls" not in renderer.source and any(message.tool_calls for message in chat.messages):
                raise TemplateRefusal("the chat template has no place for 'tool_calls'")
            page = _Page(chat, renderer, self._specials)
            _check_written(chat, page.text)
            if self._supervise == "text":
                return Located(page.text, ((0, len(page.text)),))
            return Located(page.text, page.spans(supervised_turns(chat, self._supervise)))
        except TemplateRefusal as refusal:
            return refused(chat, str(refusal), hint=refusal.hint, field=refusal.field)

    def _check_special_tokens(self, chat: Conversation) -> None:
        """Refuse special tokens inside the texts: they would act as if the template had written them."""
        for i, message in enumerate(chat.messages):
            for field, text in _texts(message):
                for token in self._specials.inside(text):
                    if message.role != "assistant":
                        raise TemplateRefusal(
                            f"the text of role {message.role!r} contains the special token {token!r}, which the model "
                            "reads as written by the chat template (prompt injection)",
                            hint="take the token out of the text, or write it in another way",
                            field=f"messages[{i}].{field}",
                        )
                    if token not in _REASONING_MARKS:
                        raise TemplateRefusal(
                            f"the answer contains the special token {token!r}; the model would learn to write it in "
                            "the middle of its answers",
                            hint="take the token out of the answer: the chat template writes the stop token itself",
                            field=f"messages[{i}].{field}",
                        )
        for text in _strings(chat.tools):
            for token in self._specials.inside(text):
                raise TemplateRefusal(
                    f"a tool's description contains the special token {token!r} (prompt injection)",
                    hint="take the token out of the description",
                    field="tools",
                )


class _Page:
    """One conversation as its template writes it."""

    def __init__(self, chat: Conversation, renderer: Renderer, specials: SpecialTokens) -> None:
        self._chat = chat
        self._renderer = renderer
        self._specials = specials
        self._messages = [message.to_template() for message in chat.messages]
        self._last = len(chat.messages) - 1
        self.text, self._marks = self._render(self._last + 1, prompt=False)

    def _render(self, count: int, *, prompt: bool) -> tuple[str, list[Span]]:
        """The first ``count`` messages, and what the template marks in them."""
        try:
            return self._renderer.render(self._messages[:count], self._chat.tools, prompt=prompt)
        except ConfigError:
            raise
        except Exception as error:  # a template is a foreign program and may raise anything
            raise TemplateRefusal(f"the chat template refuses the row: {error}") from error

    def spans(self, wanted: Sequence[int]) -> tuple[Span, ...]:
        """The spans of the answers ``wanted``, each from its generation prompt to the end of its stop token."""
        found: list[Span] = []
        marks = self._marks_of_turns() if self._renderer.has_marks else {}
        closing = self._closing_of_last(marks.get(self._last, (0, 0))[0])
        # From the last answer backwards: nothing follows it, so what closes it is known for certain.
        for i in reversed(wanted):
            try:
                found.append(
                    self._marked(i, marks[i], closing) if self._renderer.has_marks else self._derived(i, closing)
                )
            except TemplateRefusal as refusal:
                if i < self._last and self._last in wanted and refusal.hint == _OTHER_TEMPLATE:
                    raise TemplateRefusal(str(refusal), hint=_LAST_ONLY, field=f"messages[{i}]") from refusal
                raise
        return tuple(reversed(found))

    # ── templates that mark their answers ────────────────────────────────────────────────────────────────────────

    def _marks_of_turns(self) -> dict[int, Span]:
        marks: list[Span] = []
        for start, end in self._marks:
            if marks and marks[-1][1] == start and self._bare_end(start, end) == start:
                marks[-1] = (marks[-1][0], end)  # Phi-3 marks the end-of-text token after its last answer by itself
            else:
                marks.append((start, end))
        turns = [i for i, message in enumerate(self._chat.messages) if message.role == "assistant"]
        if len(marks) != len(turns):
            raise TemplateRefusal(f"the chat template marks {len(marks)} answers, the row has {len(turns)}")
        return dict(zip(turns, marks, strict=True))

    def _marked(self, i: int, mark: Span, closing: str | None) -> Span:
        start, end = mark
        bare = self._bare_end(start, end)
        _check_answer(self._chat.messages[i], self.text, start, bare)
        stop = self._specials.group_end(self.text, bare, end)
        if stop is None and i == self._last:
            stop = self._specials.group_end(self.text, bare, len(self.text))
        elif stop is None:
            stop = self._closed_as_last(bare, closing)
        if stop is None:
            raise _no_stop(self.text, bare, closing)
        return start, stop

    # ── templates that do not ────────────────────────────────────────────────────────────────────────────────────

    def _derived(self, i: int, closing: str | None) -> Span:
        if i == 0:
            raise TemplateRefusal("the conversation begins with the assistant, so no prompt leads to that answer")
        message, prompt = self._chat.messages[i], self._render(i, prompt=True)[0]
        if not self.text.startswith(prompt):
            same = _common_length(prompt, self.text)
            raise TemplateRefusal(
                "the chat template writes the prompt of an answer differently once the answer follows: "
                f"{clip(prompt[same:])} becomes {clip(self.text[same:])}"
            )
        start = len(prompt)
        if i == self._last:
            stop = self._ending(self.text, start, message)[1]
        else:
            stop = self._plain_end(start, message, closing) or self._end_as_last(i, start, closing)
        self._check_opening(i, start, stop)
        return start, stop

    def _ending(self, text: str, start: int, message: Message) -> Span:
        """Where the text of an answer ends that ends ``text``, and where its stop token does."""
        bare = self._specials.bare_end(text, start, len(text))
        _check_answer(message, text, start, bare)
        stop = self._specials.group_end(text, bare, len(text))
        if stop is None:
            raise _no_stop(text, bare, None)
        return bare, stop

    def _plain_end(self, start: int, message: Message, closing: str | None) -> int | None:
        """The end of the stop token where nothing but the content stands before what closes the last answer."""
        if closing is None or message.tool_calls:
            return None
        content = message.content.strip()
        at = skip_space(self.text, start)
        if not self.text.startswith(content, at):
            return None
        stop = self._closed_as_last(at + len(content), closing)
        if stop is not None:
            _check_answer(message, self.text, start, at + len(content))
        return stop

    def _end_as_last(self, i: int, start: int, closing: str | None) -> int:
        """The end of the stop token, taken from what the template writes when the conversation ends with turn ``i``."""
        message, alone = self._chat.messages[i], self._render(i + 1, prompt=False)[0]
        bare, stop = self._ending(alone, start, message)
        # Qwen3 writes an empty thought before the last answer only.
        empty = _EMPTY_THOUGHT.match(alone, start, bare)
        body, end = alone[empty.end() if empty else start : bare], bare
        if empty and self.text.startswith(body, start):
            end = start + len(body)
        elif not self.text.startswith(alone[:bare]):
            same = _common_length(alone, self.text)
            strips = "strips the reasoning of" if any(_reasoning(message)) else "rewrites"
            raise TemplateRefusal(
                f"the chat template {strips} an answer once the conversation goes on: "
                f"{clip(alone[same:])} becomes {clip(self.text[same:])}"
            )
        while stop > bare and alone[bare:stop].strip():
            if self.text.startswith(alone[bare:stop], end):
                return end + stop - bare
            stop = self._specials.before(alone, stop)
        raise _no_stop(self.text, end, closing)

    def _check_opening(self, i: int, start: int, stop: int) -> None:
        """Refuse a template that ignores ``add_generation_prompt``, so that its header would be learned."""
        content = self._chat.messages[i].content.strip()
        if content not in self.text[start:stop]:
            content = content.rpartition("</think>")[2].strip()
        before = self.text[start : self.text.find(content, start, stop)].strip() if content else ""
        if before and len(self._render(i, prompt=False)[0]) == start:
            raise TemplateRefusal(
                f"the chat template ignores add_generation_prompt, so {clip(before)} would be learned as an answer"
            )

    # ── what closes an answer ────────────────────────────────────────────────────────────────────────────────────

    def _bare_end(self, start: int, end: int) -> int:
        return self._specials.bare_end(self.text, start, end)

    def _closing_of_last(self, start: int) -> str | None:
        """The special tokens that follow the last answer, None where there are none."""
        bare = self._bare_end(start, len(self.text))
        stop = self._specials.group_end(self.text, bare, len(self.text))
        return None if stop is None else self.text[bare:stop].strip()

    def _closed_as_last(self, end: int, closing: str | None) -> int | None:
        """The end of ``closing`` where it follows after at most whitespace."""
        at = skip_space(self.text, end)
        return at + len(closing) if closing and self.text.startswith(closing, at) else None


def supervised_turns(chat: Conversation, supervise: Supervise) -> list[int]:
    """The positions of the assistant's messages that are learned."""
    roles = [message.role for message in chat.messages]
    first = 0
    if supervise == "last":
        first = max((i for i, role in enumerate(roles) if role == "assistant"), default=0)
    elif supervise == "completion":
        first = max((i for i, role in enumerate(roles) if role == "user"), default=0)
    return [
        i for i, message in enumerate(chat.messages) if roles[i] == "assistant" and message.supervised and i >= first
    ]


def refused(chat: Conversation, reason: str, *, hint: str = _OTHER_TEMPLATE, field: str | None = None) -> Problem:
    """The problem of a row that the template cannot do justice to."""
    return Problem(file=chat.file, line=chat.line, field=field, problem=reason, hint=hint)


def clip(text: str) -> str:
    """``text`` quoted, its middle left out when it is long."""
    return repr(text if len(text) <= 60 else f"{text[:30]}…{text[-30:]}")


def _check_written(chat: Conversation, text: str) -> None:
    """Refuse a template that leaves out what somebody says: a system prompt, a tool's result, all text (vision)."""
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
            raise TemplateRefusal(
                f"the chat template leaves out or rewrites the text of role {message.role!r} {clip(content)}",
                field=f"messages[{i}].content",
            )


def _check_answer(message: Message, text: str, start: int, end: int) -> None:
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
    for thought in _reasoning(message):
        if text.find(thought, start, end) < 0:
            raise TemplateRefusal(f"the chat template strips the reasoning of an answer, {clip(thought)}")
    for call in message.tool_calls or ():
        name = call.get("function", call).get("name")
        if isinstance(name, str) and text.find(name, start, end) < 0:
            raise TemplateRefusal(f"the chat template leaves out the call of the tool {name!r}")


def _reasoning(message: Message) -> Iterator[str]:
    """The pieces of reasoning that a message carries, in its fields and between the marks in its content."""
    for field in _REASONING_FIELDS:
        value = (message.extra or {}).get(field)
        if isinstance(value, str) and value.strip():
            yield value.strip()
    if "</think>" in message.content:
        for piece in message.content.rpartition("</think>")[0].split("<think>"):
            if piece.strip():
                yield piece.strip()


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


def _no_stop(text: str, end: int, closing: str | None) -> TemplateRefusal:
    follows = f" ({clip(text[end : end + 20])} follows one, {clip(closing)} the last)" if closing else ""
    return TemplateRefusal(
        f"the chat template leaves no stop token after the assistant's text{follows}, so the model would never learn "
        "to stop"
    )


def _common_length(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
