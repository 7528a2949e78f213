"""Chat templates at work: what they write, and the special tokens in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmtune.errors import ConfigError

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Renderer:
    """Writes conversations as `apply_chat_template` does.

    Args:
        tokenizer: A tokenizer of transformers.
        source: The Jinja text of a chat template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.source = source
        self.has_marks = _GENERATION.search(source) is not None
        self._variables = dict(tokenizer.special_tokens_map)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, *, prompt: bool
    ) -> tuple[str, list[Span]]:
        """The text, and the character ranges in it that the template marks as generated.

        Messages of plain text go straight to the compiled template: what transformers does to others beforehand
        would leave them as they are, and costs as much as the template.

        Raises:
            ConfigError: The template is not valid Jinja.
            Exception: Whatever the template raises.
        """
        from jinja2 import TemplateSyntaxError
        from transformers.utils import chat_template_utils

        try:
            compiled: Any = chat_template_utils._compile_jinja_template(self.source)
        except TemplateSyntaxError as error:
            raise ConfigError("chat template", [f"not valid Jinja: {error} (line {error.lineno})"]) from error
        variables = self._variables | {"add_generation_prompt": prompt}
        if not tools and all(len(message) == 2 for message in messages):
            variables |= {"messages": messages, "tools": None, "documents": None}
            if not self.has_marks:
                return compiled.render(variables), []
            marked: tuple[str, list[Span]] = chat_template_utils._render_with_assistant_indices(compiled, **variables)
            return marked
        rendered: Any = chat_template_utils.render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=self.source,
            return_assistant_tokens_mask=self.has_marks,
            **variables,
        )
        return rendered[0][0], rendered[1][0] if self.has_marks else []


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
