"""Lines of a file in binary: read one by one, or divided into byte ranges that can be read alone."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import AnyStr, BinaryIO

from llmtune.data.strict_json import MAX_ROW_BYTES
from llmtune.errors import DataError

# Start, end and number of the first row, as in `llmtune.data.records.Chunk`.
Part = tuple[int, int, int]
BLOCK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 18  # lines of several KB would need a system call for every few in the usual 8 KiB


def line_parts(path: Path, num_bytes: int, name: str = "") -> Iterator[Part]:
    """Byte ranges of whole lines, of about ``num_bytes``; a longer line makes its range longer."""
    with open_utf8(path) as file:
        file.seek(0)
        start = end = offset = 0  # where the part begins, where its last whole line ends, what has been looked at
        first_line = line = 1
        block = bytearray(min(num_bytes, BLOCK_BYTES))  # one for all reads: fresh pages cost more than the search
        while size := file.readinto(block):  # type: ignore[attr-defined]
            cut = block.rfind(b"\n", 0, size) + 1
            if cut:
                end, line = offset + cut, line + block.count(b"\n", 0, size)
            offset += size
            if end > start and offset - start >= num_bytes:
                yield start, end, first_line
                start, first_line = end, line
        if offset > start:
            yield start, offset, first_line


def numbered_lines(path: Path, start: int, end: int, first_line: int) -> Iterator[tuple[int, int, bytes | None, int]]:
    """The lines of a byte range as number, first byte, content and last byte (exclusive).

    Of a line longer than `MAX_ROW_BYTES` the content is None, and it is not held in memory.
    """
    with open_utf8(path) as file:
        if start:
            file.seek(start)
        position, number = file.tell(), first_line
        while (end < 0 or position < end) and (raw := file.readline(MAX_ROW_BYTES + 1)):
            after = position + len(raw)
            if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
                after += sum(map(len, rest_of_line(file.readline, b"\n")))
                yield number, position, None, after
            else:
                yield number, position, raw, after
            position = after
            number += 1


def rest_of_line(readline: Callable[[int], AnyStr], *ends: AnyStr) -> Iterator[AnyStr]:
    """A line from where its file stands, in pieces."""
    while rest := readline(BLOCK_BYTES):
        yield rest
        if rest.endswith(ends):
            return


def open_utf8(path: Path) -> BinaryIO:
    """The file in binary, after its UTF-8 byte order mark.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        file = open(path, "rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
    file.seek(len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
    return file
