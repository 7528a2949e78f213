"""The page of ``llmtune preview --html``: rows token by token, in one file that needs no network."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from llmtune.data.preview import PreviewRow
from llmtune.errors import OutputError
from llmtune.reporting.pages import page
from llmtune.runs.documents import write_atomically

# Invisible characters that belong to writing: they join or part letters and emoji.
_JOINERS = "\u200c\u200d"


def write_preview(rows: Sequence[PreviewRow], path: Path | str, *, model: str | None = None) -> Path:
    """Write the page of these rows, with every token of theirs, and return where it lies.

    Args:
        rows: What `llmtune.data.preview.preview` returned.
        path: The file; one that is there is replaced.
        model: Whose tokens they are.

    Raises:
        OutputError: The place is not writable.
    """
    path = Path(path)
    try:
        write_atomically(path, render_preview(rows, model=model).encode("utf-8"), durable=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}. Name a file in a directory that exists.") from None
    return path


def render_preview(rows: Sequence[PreviewRow], *, model: str | None = None) -> str:
    """The page as text."""
    return page("preview.html.j2", rows=rows, model=model, visible=visible, stretches=_stretches)


def _stretches(row: PreviewRow) -> list[tuple[bool, int]]:
    """How many tokens are learned, or not, in a row: for the bar."""
    runs = groupby(row.tokens, key=lambda token: token.supervised)
    return [(supervised, sum(1 for _ in run)) for supervised, run in runs]


def visible(text: str) -> str:
    """``text`` with every character that shows nothing, or moves others about, replaced by one that can be seen.

    New lines stay: how they are shown depends on where.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable() or character == "\n" or character in _JOINERS:
        return character
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"
