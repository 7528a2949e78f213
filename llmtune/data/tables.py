"""Tables of text: CSV and TSV as spreadsheets, databases and people write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from llmtune.data.lines import open_utf8, rest_of_line
from llmtune.data.records import Problem, SourceRow
from llmtune.data.strict_json import MAX_ROW_BYTES, too_large
from llmtune.errors import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_SAMPLE_BYTES = 1 << 16
_SAMPLE_ROWS = 50
# Excel's first line: which delimiter follows.
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?[\t,;]*\r?\n?', re.IGNORECASE)
# What a column may be called, unlike a sentence: up to four words.
_NAME = re.compile(r"[\w#.()/?-]+(?: +[\w#.()/?-]+){0,3}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a table of text is written. ``has_separator_line``: a line such as ``sep=;`` stands above the header."""

    delimiter: str
    has_separator_line: bool = False


def dialect_of(path: Path, default: str) -> Dialect:
    """Recognise the delimiter: an Excel ``sep=`` line decides, then the header, then the first rows.

    A delimiter counts only outside of quoted cells. Text in the rows cannot outvote the header: a delimiter that does
    not divide the header is none.
    """
    with open_utf8(path) as file:
        raw = file.read(_SAMPLE_BYTES)
    head = raw.decode("utf-8", "replace")
    stated = _SEPARATOR_LINE.match(head)
    if stated:
        return Dialect(delimiter=stated[1], has_separator_line=True)
    found: list[tuple[bool, int, str]] = []
    for delimiter in DELIMITERS:
        records = _records(head, delimiter, is_cut=len(raw) == _SAMPLE_BYTES)
        if records and len(records[0]) > 1 and _divides(*records):
            header = records[0]
            is_clean = not any(other in cell for cell in header for other in DELIMITERS)
            found.append((not is_clean, len(header[0]), delimiter))
    # Of several that fit, the one whose cells hold no other, then the one that comes first in the header.
    return Dialect(delimiter=min(found)[2] if found else default)


def _records(text: str, delimiter: str, *, is_cut: bool) -> list[list[str]]:
    """The first records under this delimiter; empty where the header cannot be read."""
    records: list[list[str]] = []
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            if cells:
                records.append(cells)
            if len(records) > _SAMPLE_ROWS:
                return records
    except csv.Error:  # a damaged row, or one that ends beyond the sample
        return records
    return records[:-1] if is_cut and len(records) > 1 else records


def _divides(header: list[str], *rows: list[str]) -> bool:
    """Whether this delimiter divides the rows as it divides the header; a few rows may be damaged."""
    fitting = sum(len(row) == len(header) for row in rows)
    are_names = all(_NAME.fullmatch(cell.strip()) for cell in header)
    return 2 * fitting >= len(rows) or (are_names and fitting > 0)


class _TooLarge(Exception):
    """A line of a table of text is too large to be held in memory."""


class _TextLines:
    """Lines for ``csv.reader``, which can go on after one that was too large.

    ``number``: of the last line. ``position``: the byte after it.
    """

    def __init__(self, file: TextIO, position: int) -> None:
        self.file = file
        self.number = 0
        self.position = position

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.position += _num_bytes(line)
        if len(line) > MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            self.position += sum(map(_num_bytes, rest_of_line(self.file.readline, "\n", "\r")))
            raise _TooLarge
        return line


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def read_table(path: Path, default: str, name: str) -> Iterator[SourceRow | Problem]:
    """The rows below the header, with blanks around the names of the columns removed.

    Args:
        path: The file, in UTF-8.
        default: The delimiter where nothing in the file says which.
        name: What messages call the file.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # the default of 128 KiB is shorter than many answers
    dialect = dialect_of(path, default)
    delimiter = dialect.delimiter
    binary = open_utf8(path)
    position = binary.tell()
    # Undecodable bytes become surrogates, so that one bad row does not end the reading.
    with io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = _TextLines(file, position)
        if dialect.has_separator_line:
            next(lines)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(name, reader)
        while True:
            line, start = lines.number + 1, lines.position
            try:
                cells = next(reader)
            except StopIteration:
                return
            except _TooLarge:
                yield too_large(name, line, (start, lines.position))
                continue
            except csv.Error as error:
                found = f"not valid CSV: {error}", "check the quotes of this row"
            else:
                if not cells:
                    continue
                if len(cells) == len(header) and not any(map(_undecodable, cells)):
                    yield SourceRow(file=name, line=line, value=dict(zip(header, cells, strict=True)))
                    continue
                found = "invalid UTF-8", "save the file as UTF-8"
                if len(cells) != len(header):
                    hint = f"quote cells that contain {delimiter!r} or line breaks"
                    found = f"{len(cells)} cells, the header has {len(header)}", hint
            span = (start, lines.position)
            yield Problem(file=name, line=line, field=None, problem=found[0], hint=found[1], span=span)


def _undecodable(cell: str) -> bool:
    return not cell.isascii() and any("\ud800" <= char <= "\udfff" for char in cell)


def _header(name: str, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [cell.strip() for cell in next((cells for cells in reader if cells), [])]  # blank lines may come first
    except (csv.Error, _TooLarge) as error:
        raise DataError(f"{name}:1: the header cannot be read ({error}); check its quotes.") from error
    if header.count("") > 1:  # a spreadsheet that was once wider
        header = [cell or f"column {number}" for number, cell in enumerate(header, 1)]
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{name}:1: the header names {', '.join(map(repr, repeated))} twice; rename one column.")
    return header
