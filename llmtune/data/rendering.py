"""Chat templates at work: what they write, and the special tokens in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmtune.errors import ConfigError

Span = tuple[int, int]

# Names under which a message may carry its reasoning (those that transformers passes on to templates).
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Renderer:
    """Renders conversations as `apply_chat_template` does. Can be pickled where its tokenizer's token texts can.

    Args:
        tokenizer: A tokenizer of transformers.
        source: The Jinja text of a chat template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.source = source
        self.has_marks = _GENERATION.search(source) is not None
        self._variables = dict(tokenizer.special_tokens_map)
        self._compiled: tuple[Any, dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}  # a compiled template cannot be pickled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        prompt: bool,
        variables: Mapping[str, Any] | None = None,
        prepared: bool | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the text, and the character ranges in it that the template marks as generated.

        Args:
            messages: The messages as templates read them.
            tools: The tools that the template finds in its variable ``tools``.
            prompt: Whether to end with the prompt of the next answer (``add_generation_prompt``). The marks are left
                out of a prompt.
            variables: More variables for the template.
            prepared: The answer of `is_prepared` for the same data, to save the time of asking.

        Raises:
            ConfigError: The template is not valid Jinja.
            Exception: Any error of the template.
        """
        compiled, base = self._compiled or self._compile()
        if not (is_prepared(messages, tools, variables) if prepared is None else prepared):
            return self._prepare_and_render(messages, tools, prompt, variables or {})
        values = {**base, "messages": messages, "add_generation_prompt": prompt}
        if tools:
            values["tools"] = list(tools)
        if variables:
            values |= variables
        context = compiled.new_context(values, shared=True)
        if prompt or not self.has_marks:
            return "".join(compiled.root_render_func(context)), []
        blocks: list[str] = []
        marks: list[Span] = []
        with compiled.environment.activate_tracker(blocks, marks):
            for block in compiled.root_render_func(context):  # the tracker reads the blocks as they come
                blocks.append(block)
        return "".join(blocks), marks

    def _prepare_and_render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = self.has_marks and not prompt
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=self.source,
            return_assistant_tokens_mask=marked,
            **{**self._variables, "add_generation_prompt": prompt, **variables},
        )
        return rendered[0][0], rendered[1][0] if marked else []

    def _compile(self) -> tuple[Any, dict[str, Any]]:
        """Return the compiled template, and the variables that are the same in every rendering."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils import chat_template_utils

        try:
            compiled: Any = chat_template_utils._compile_jinja_template(self.source)
        except TemplateSyntaxError as error:
            raise ConfigError("chat template", [f"not valid Jinja: {error} (line {error.lineno})"]) from error
        base = {**compiled.globals, **self._variables, "tools": None, "documents": None}
        self._compiled = (compiled, base)
        return self._compiled


def is_prepared(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
) -> bool:
    """Return whether a template may read the data as it is: transformers' preparation would change nothing.

    transformers copies everything into JSON types, and gives reasoning under two names, at the cost of a rendering.
    """
    if not tools and not variables and all(len(message) == 2 for message in messages):
        return True
    if any(field in message for message in messages for field in REASONING_FIELDS):
        return False
    return _is_json(messages) and _is_json(tools) and _is_json(variables)


def _is_json(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return all(map(_is_json, value)) and all(map(_is_json, value.values()))
    if kind is list or kind is tuple:
        return all(map(_is_json, value))
    return value is None or kind in (str, int, float, bool)


def own_template(tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None) -> str | None:
    """The tokenizer's template for conversations with these tools, None where it has none."""
    try:
        template: str = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    except ValueError:
        return None
    return template


def skip_space(text: str, at: int) -> int:
    """The first place from ``at`` on that holds no whitespace."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


class SpecialTokens:
    """The special tokens of a tokenizer, to be found in a text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self._tokens = frozenset(longest_first)
        self._lengths = sorted({len(token) for token in longest_first}, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def inside(self, text: str) -> Iterator[str]:
        """Every special token in ``text``."""
        return (found[0] for found in self._any.finditer(text))

    def before(self, text: str, end: int) -> int:
        """Where the special token begins that ends at ``end``; ``end`` where there is none."""
        return next((end - n for n in self._lengths if n <= end and text[end - n : end] in self._tokens), end)

    def bare_end(self, text: str, start: int, end: int) -> int:
        """Where ``text[start:end]`` ends without the special tokens and the whitespace at its end."""
        while end > start:
            if text[end - 1].isspace():
                end -= 1
            elif start <= (begin := self.before(text, end)) < end:
                end = begin
            else:
                break
        return end

    def group_end(self, text: str, start: int, limit: int) -> int | None:
        """The end of the special tokens that follow ``start`` after at most whitespace, with nothing between them."""
        at = end = skip_space(text, start)
        while found := next((n for n in self._lengths if end + n <= limit and text[end : end + n] in self._tokens), 0):
            end += found
        return end if at < end else None
