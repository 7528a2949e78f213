"""Questions put to a person at a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.console import speaker
from llmtune.errors import ConfigError, LlmtuneError

if TYPE_CHECKING:
    from llmtune.wizard import Question

# So many questions at most; what would be asked beyond takes its default.
MOST_QUESTIONS = 5
# So often an answer may be one that cannot be used.
MOST_TRIES = 4
# Lines are not made longer than this, however wide the terminal.
WIDEST = 100
# The last column is not squeezed below this; a terminal so narrow breaks the lines itself.
NARROWEST = 24


class Interview:
    """Asks where somebody answers, and takes the defaults where nobody does."""

    def __init__(self, *, answered: bool) -> None:
        self.answered = answered
        self._asked = 0

    def ask(self, question: Question) -> Mapping[str, Any]:
        """The keys that the answer sets.

        Raises:
            ConfigError: No answer could be used.
            EOFError: The input has ended.
            KeyboardInterrupt: Ctrl-C.
        """
        if not self.answered or self._asked == MOST_QUESTIONS:
            return question.read("")
        self._asked += 1
        speaker.say(f"\n{question.title}", bold=True)
        width = min(WIDEST, shutil.get_terminal_size().columns)
        for line in (*textwrap.wrap(question.explanation, width), *_listed(question, width)):
            speaker.say(line)
        prompt = ", or ".join(filter(None, ["Choice" if question.options else "", question.free]))
        prompt = f"{prompt[0].upper()}{prompt[1:]}" + (f" [{question.default}]:" if question.default else ":")
        for _ in range(MOST_TRIES):
            try:
                return question.read(speaker.ask(prompt))
            except (ValueError, LlmtuneError) as error:
                for line in textwrap.wrap(f"{error}", width):
                    speaker.say(line)
        raise ConfigError("init", [f"no answer to '{question.title}' could be used; give it with {question.flag}"])


def _listed(question: Question, width: int) -> Iterator[str]:
    """The options as numbered rows, the one that Enter takes marked."""
    if not question.options:
        return
    rows = [
        (f"{'>' if option.name == question.default else ' '} {number}", option.name, *option.cells)
        for number, option in enumerate(question.options, 1)
    ]
    yield from aligned([("", *question.columns), *rows] if question.columns else rows, width)


def aligned(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Rows as lines of one width for each column; the last column of each row is wrapped."""
    widths = [max(len(row[i]) for row in rows if i < len(row) - 1) for i in range(max(map(len, rows)) - 1)]
    for row in rows:
        head = "".join(cell.ljust(width) + "  " for cell, width in zip(row[:-1], widths, strict=False))
        room = max(NARROWEST, width - len(head))
        yield from textwrap.wrap(
            row[-1], len(head) + room, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        ) or [head.rstrip()]
