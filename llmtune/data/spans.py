"""Where the answers are in the text that a chat template writes.

An answer's span is what the model will have to write at inference: from the end of the generation prompt to the end
of the stop token. The text is rendered whole and once more for the prompt of each answer, and the prompt must be how
the text begins. The answer ends with the special tokens that follow its text; those after an earlier answer must be
those after the last one, or those that the template would write if the conversation ended there. A template that marks
its answers (``{% generation %}``) may leave out more of an answer's beginning, but never add what the prompt supplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from llmtune.data.proof import (
    OTHER_TEMPLATE,
    TemplateFailure,
    TemplateRefusal,
    check_answer,
    check_calls,
    check_results,
    check_stop_tokens,
    check_tools,
    check_written,
    clip,
    reasoning,
    renamed_calls,
    renamed_tools,
    without_stop_tokens,
)
from llmtune.data.records import Conversation, Message, Problem
from llmtune.data.rendering import Renderer, Span, SpecialTokens, is_prepared, own_template, skip_space
from llmtune.data.shapes import PLAIN, Given, Shape, other_shapes
from llmtune.errors import ConfigError

_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")

Supervise = Literal["all", "last", "completion", "text"]

_LAST_ONLY = f"learn only the last answer of each row (--set data.supervise=last), or {OTHER_TEMPLATE}"


class Located(NamedTuple):
    """A rendered conversation; ``spans`` are the character ranges of its supervised answers, stop tokens included."""

    text: str
    spans: tuple[Span, ...]


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
            said, removed = without_stop_tokens(chat, self._specials)
            located = self._proven_in_any_shape(said, renderer)
            if removed:
                check_stop_tokens(said, removed, located.text)
            return located
        except TemplateRefusal as refusal:
            return refused(chat, str(refusal), hint=refusal.hint, field=refusal.field)

    def _proven_in_any_shape(self, chat: Conversation, renderer: Renderer) -> Located:
        """Return the text and spans in the first shape that passes the proof.

        The plain shape comes first; `other_shapes` are for rows with tools or calls only. A refusal that no shape can
        change is final. The refusal to report is the first of a shape that got furthest: past the template, past the
        proof of tools and calls.
        """
        try:
            return self._proven(chat, renderer, PLAIN)
        except TemplateRefusal as refusal:
            if not refusal.of_shape or not (chat.tools or any(message.tool_calls for message in chat.messages)):
                raise
            reported = refusal
        for shape in other_shapes(chat, renderer.source):
            try:
                return self._proven(chat, renderer, shape)
            except TemplateRefusal as refusal:
                reported = max(reported, refusal, key=_progress)
        raise reported

    def _proven(self, chat: Conversation, renderer: Renderer, shape: Shape) -> Located:
        page = _Page(chat, renderer, self._specials, shape)
        if chat.tools:  # a template without tools is named as such, before it is found to leave out the calls
            check_tools(chat.tools, page.text)
        check_written(chat, page.text, renderer.source)
        if self._supervise == "text":
            turns: list[int] = []
            spans: tuple[Span, ...] = ((0, len(page.text)),)
        else:
            turns = supervised_turns(chat, self._supervise)
            spans = page.spans(turns)
        page.check_tools_and_calls(turns, spans)
        return Located(page.text, spans)


class _Page:
    """One conversation as its template writes it."""

    def __init__(self, chat: Conversation, renderer: Renderer, specials: SpecialTokens, shape: Shape) -> None:
        self._chat = chat
        self._renderer = renderer
        self._specials = specials
        self._shape = shape
        self._given = shape.give(chat)
        self._prepared = is_prepared(self._given.messages, self._given.tools, self._given.variables)
        self._last = len(chat.messages) - 1
        self._last_start = 0
        self.text, self._marks = self._render(self._last + 1, prompt=False)

    def _render(self, count: int, *, prompt: bool, given: Given | None = None) -> tuple[str, list[Span]]:
        """Return the first ``count`` messages as the template writes them, and its marks in them."""
        messages, tools, variables, lead = given or self._given
        try:
            return self._renderer.render(
                messages[: count + lead], tools, prompt=prompt, variables=variables, prepared=self._prepared
            )
        except ConfigError:
            raise
        except Exception as error:  # a template is a foreign program and may raise anything
            raise TemplateFailure(f"the chat template refuses the row: {error}") from error

    def check_tools_and_calls(self, learned: Sequence[int], spans: Sequence[Span]) -> None:
        """Refuse a template that leaves out a tool, or a call of an answer that is not learned.

        The schemas must stand in the prompt of the first learned answer. A name that also stands elsewhere proves
        nothing, so that such rows are rendered once more under other names. Calls of learned answers are proven within
        their spans.
        """
        chat = self._chat
        if chat.tools:
            first = learned[0] if learned else self._last + 1
            end = spans[0][0] if learned else len(self.text)
            check_tools(chat.tools, self.text[:end], as_json=self._shape.place.kind == "key")
            renamed = renamed_tools(chat.tools, chat.messages[:first])
            if renamed is not None:
                given = self._shape.give(replace(chat, tools=renamed[0]))
                prompt = self._render(first, prompt=first <= self._last, given=given)[0]
                check_tools(chat.tools, prompt, mark=renamed[1])
        others = [i for i, message in enumerate(chat.messages) if message.tool_calls and i not in learned]
        if others:
            calling, mark = renamed_calls(chat, others)
            text = self._render(self._last + 1, prompt=False, given=self._shape.give(calling))[0]
            for i in others:
                check_calls(chat.messages[i], text, 0, len(text), mark=mark)
        check_results(chat, self.text)

    def spans(self, wanted: Sequence[int]) -> tuple[Span, ...]:
        """The spans of the answers ``wanted``, each from its generation prompt to the end of its stop token."""
        found: list[Span] = []
        marks = self._marks_of_turns() if self._renderer.has_marks else {}
        self._last_start = marks.get(self._last, (0, 0))[0]
        # From the last answer backwards: nothing follows it, so what closes it is known for certain.
        for i in reversed(wanted):
            try:
                found.append(self._marked(i, marks[i]) if self._renderer.has_marks else self._derived(i))
            except TemplateRefusal as refusal:
                earlier = i < self._last and self._last in wanted
                if earlier and refusal.hint == OTHER_TEMPLATE and not refusal.of_shape:
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

    def _marked(self, i: int, mark: Span) -> Span:
        """Return the span of an answer that the template marks, without the text that the generation prompt supplies.

        A mark may begin before the end of the generation prompt (the header, or an empty thought in SmolLM3): the model
        is given that text, and the span begins where the prompt ends. A mark that begins later is kept: the template
        says that the model does not write the text before.
        """
        supplied = self._supplied_end(i, mark)
        start, end = max(mark[0], supplied), mark[1]
        bare = self._bare_end(start, end)
        check_answer(self._chat.messages[i], self.text, start, bare)
        stop = self._specials.group_end(self.text, bare, end)
        if stop is None and i == self._last:
            stop = self._specials.group_end(self.text, bare, len(self.text))
        elif stop is None:
            stop = self._closed_as_last(bare)
        if stop is None:
            raise _no_stop(self.text, bare, self._closing)
        if start == supplied:
            self._check_opening(i, start, stop)
        return start, stop

    def _supplied_end(self, i: int, mark: Span) -> int:
        """Return where the text ends that the generation prompt of turn ``i`` supplies.

        Every answer is checked, because no cheaper check is sound: a template may write another prompt after each
        conversation. Three cases:

        - The text begins with the prompt: the end of the prompt.
        - The prompt differs from the text only in the part that asks for the answer (it opens a thought that the text
          closes at once, or leaves out): the end of what both have in common, at the border of a tag.
        - The messages before differ too: refused, as with templates that mark nothing.
        """
        try:
            prompt = self._render(i, prompt=True)[0]
        except TemplateFailure:
            # Some templates demand a message of the user. Nothing supplied is learned where the mark begins with the
            # answer itself.
            content = self._chat.messages[i].content.strip()
            if content and self.text.startswith(content, skip_space(self.text, mark[0]), mark[1]):
                return mark[0]
            raise
        if self.text.startswith(prompt):
            return len(prompt)
        same = _common_length(prompt, self.text)
        asks = _common_length(prompt, self._render(i, prompt=False)[0])
        if same < asks:
            raise self._prompt_differs(prompt, same)
        tag = prompt.rfind("<", asks, same)
        return tag if tag >= 0 and ">" not in prompt[tag:same] else same

    def _prompt_differs(self, prompt: str, same: int) -> TemplateRefusal:
        return TemplateRefusal(
            "the chat template writes the prompt of an answer differently once the answer follows: "
            f"{clip(prompt[same:])} becomes {clip(self.text[same:])}"
        )

    # ── templates that do not ────────────────────────────────────────────────────────────────────────────────────

    def _derived(self, i: int) -> Span:
        if i == 0:
            raise TemplateRefusal("the conversation begins with the assistant, so no prompt leads to that answer")
        message, prompt = self._chat.messages[i], self._render(i, prompt=True)[0]
        if not self.text.startswith(prompt):
            raise self._prompt_differs(prompt, _common_length(prompt, self.text))
        start = len(prompt)
        if i == self._last:
            stop = self._ending(self.text, start, message)[1]
        else:
            stop = self._plain_end(start, message) or self._end_as_last(i, start)
        self._check_opening(i, start, stop)
        return start, stop

    def _ending(self, text: str, start: int, message: Message) -> Span:
        """Where the text of an answer ends that ends ``text``, and where its stop token does."""
        bare = self._specials.bare_end(text, start, len(text))
        check_answer(message, text, start, bare)
        stop = self._specials.group_end(text, bare, len(text))
        if stop is None:
            raise _no_stop(text, bare, None)
        return bare, stop

    def _plain_end(self, start: int, message: Message) -> int | None:
        """The end of the stop token where nothing but the content stands before what closes the last answer."""
        if message.tool_calls:
            return None
        content = message.content.strip()
        at = skip_space(self.text, start)
        if not self.text.startswith(content, at):
            return None
        stop = self._closed_as_last(at + len(content))
        if stop is not None:
            check_answer(message, self.text, start, at + len(content))
        return stop

    def _end_as_last(self, i: int, start: int) -> int:
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
            strips = "strips the reasoning of" if any(reasoning(message)) else "rewrites"
            raise TemplateRefusal(
                f"the chat template {strips} an answer once the conversation goes on: "
                f"{clip(alone[same:])} becomes {clip(self.text[same:])}"
            )
        while stop > bare and alone[bare:stop].strip():
            if self.text.startswith(alone[bare:stop], end):
                return end + stop - bare
            stop = self._specials.before(alone, stop)
        raise _no_stop(self.text, end, self._closing)

    def _check_opening(self, i: int, start: int, stop: int) -> None:
        """Refuse a template that ignores ``add_generation_prompt``, so that its header would be learned."""
        content = self._chat.messages[i].content.strip()
        if self.text.startswith(content, start):
            return
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

    @cached_property
    def _closing(self) -> str | None:
        """The special tokens that follow the last answer, None where there are none."""
        bare = self._bare_end(self._last_start, len(self.text))
        stop = self._specials.group_end(self.text, bare, len(self.text))
        return None if stop is None else self.text[bare:stop].strip()

    def _closed_as_last(self, end: int) -> int | None:
        """Return the end of what closes the last answer, where it follows ``end`` after at most whitespace."""
        at, closing = skip_space(self.text, end), self._closing
        return at + len(closing) if closing and self.text.startswith(closing, at) else None


def _progress(refusal: TemplateRefusal) -> int:
    """Return how far the proof got before it refused the row: the template, the tools, the calls, all the rest."""
    if isinstance(refusal, TemplateFailure):
        return 0
    if refusal.of_shape:
        return 1 if refusal.field == "tools" else 2
    return 3


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


def refused(chat: Conversation, reason: str, *, hint: str = OTHER_TEMPLATE, field: str | None = None) -> Problem:
    """The problem of a row that the template cannot do justice to."""
    return Problem(file=chat.file, line=chat.line, field=field, problem=reason, hint=hint)


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
