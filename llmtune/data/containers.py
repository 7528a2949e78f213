"""Read each container row by row, in bounded memory and in parts. A row that cannot be read is a `Problem`."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, AnyStr, BinaryIO, TextIO

from llmtune.data.arrow_json import row_decoder
from llmtune.data.records import Problem, SourceRow
from llmtune.data.strict_json import MAX_ROW_BYTES, invalid_utf8, parse_object, read_array, too_large
from llmtune.errors import DataError

# Start, end and number of the first row, as in `llmtune.data.records.Chunk`.
Part = tuple[int, int, int]
_BLOCK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 18  # lines of several KB would need a system call for every few in the usual 8 KiB
_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How files of one kind are taken apart (path, about so many bytes) and read (path, start, end, first line)."""

    parts: Callable[[Path, int], Iterator[Part]]
    read: Callable[[Path, int, int, int], Iterator[SourceRow | Problem]]


def line_parts(path: Path, num_bytes: int) -> Iterator[Part]:
    """Byte ranges of whole lines, of about ``num_bytes``; a longer line makes its range longer."""
    with open_utf8(path) as file:
        file.seek(0)
        start = end = offset = 0  # where the part begins, where its last whole line ends, what has been looked at
        first_line = line = 1
        block = bytearray(min(num_bytes, _BLOCK_BYTES))  # one for all reads: fresh pages cost more than the search
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


def _whole_file(path: Path, num_bytes: int) -> Iterator[Part]:
    yield 0, -1, 1


def _lines(path: Path, start: int, end: int, first_line: int) -> Iterator[tuple[int, int, bytes | None, int]]:
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
                after += sum(map(len, _rest_of_line(file.readline, b"\n")))
                yield number, position, None, after
            else:
                yield number, position, raw, after
            position = after
            number += 1


def _rest_of_line(readline: Callable[[int], AnyStr], *ends: AnyStr) -> Iterator[AnyStr]:
    """A line from where its file stands, in pieces."""
    while rest := readline(_BLOCK_BYTES):
        yield rest
        if rest.endswith(ends):
            return


def read_jsonl(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """One JSON object per line; a byte order mark, CRLF and blank lines are tolerated."""
    name = str(path)
    for number, first, raw, after in _lines(path, start, end, first_line):
        if raw is None:
            yield too_large(name, number, (first, after))
        elif not raw.isspace():
            row = parse_object(raw, name, number)
            yield row if isinstance(row, SourceRow) else replace(row, span=(first, after))


def read_json(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """An array of objects (``line`` is the row number), or one object per line."""
    with open_utf8(path) as file:
        begin = file.tell()
        head = next((block for block in iter(lambda: file.read(_BLOCK_BYTES), b"") if not block.isspace()), b"")
        first = head.lstrip()[:1]
        file.seek(begin)
        if first == b"[":
            yield from read_array(file, str(path))
            return
        lines = iter(lambda: file.readline(_BLOCK_BYTES), b"")
        line = next((line for line in lines if not line.isspace()), b"").strip()
        if first == b"{" and line in (b"{", b"{}"):
            raise DataError(
                f"{path}: the file is one JSON object spread over lines; expected an array of objects, "
                "or one object per line. Save its list of rows alone."
            )
    yield from read_jsonl(path)


def read_csv(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """Comma-separated values with a header row."""
    yield from _read_delimited(path, ",")


def read_tsv(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """Tab-separated values with a header row."""
    yield from _read_delimited(path, "\t")


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
            self.position += sum(map(_num_bytes, _rest_of_line(self.file.readline, "\n", "\r")))
            raise _TooLarge
        return line


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _read_delimited(path: Path, delimiter: str) -> Iterator[SourceRow | Problem]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the default of 128 KiB is shorter than many answers
    name = str(path)
    binary = open_utf8(path)
    position = binary.tell()
    # Undecodable bytes become surrogates, so that one bad row does not end the reading.
    with io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = _TextLines(file, position)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(path, reader)
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


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((cells for cells in reader if cells), [])  # blank lines may come first
    except (csv.Error, _TooLarge) as error:
        raise DataError(f"{path}:1: the header cannot be read ({error}); check its quotes.") from error
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, repeated))} twice; rename one column.")
    return header


def read_txt(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """One document per line that is not blank."""
    name = str(path)
    for number, first, raw, after in _lines(path, start, end, first_line):
        if raw is None:
            yield too_large(name, number, (first, after))
        elif not raw.isspace():
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as bad:
                yield replace(invalid_utf8(raw, bad.start, name, number), span=(first, after))
            else:
                yield SourceRow(file=name, line=number, value={"text": text})


def parquet_parts(path: Path, num_bytes: int) -> Iterator[Part]:
    """Every row group by itself: what Parquet can read alone, and what a problem is named after."""
    with _opened_parquet(path) as file:
        first_row = 1
        for group in range(file.num_row_groups):
            yield group, group + 1, first_row
            first_row += file.metadata.row_group(group).num_rows


def read_parquet(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """Rows of a Parquet file; ``line`` is the row number in the file."""
    import pyarrow as pa

    with _opened_parquet(path) as file:
        for group in range(start, file.num_row_groups if end < 0 else end):
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])
            try:
                yield from _rows_of_batches(str(path), batches, first_line, group)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{path}: row group {group:,} cannot be read ({error}). Write or download the file again."
                ) from error
            first_line += file.metadata.row_group(group).num_rows


def _opened_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write or download it again.") from error


def arrow_parts(path: Path, num_bytes: int) -> Iterator[Part]:
    """Runs of record batches of about ``num_bytes`` in memory."""
    start = held = 0
    first_row = row = 1
    for index, batch in enumerate(_record_batches(path, 0, -1)):
        held += batch.nbytes
        row += batch.num_rows
        if held >= num_bytes:
            yield start, index + 1, first_row
            start, first_row, held = index + 1, row, 0
    if row > first_row:
        yield start, -1, first_row


def read_arrow(path: Path, start: int = 0, end: int = -1, first_line: int = 1) -> Iterator[SourceRow | Problem]:
    """Rows of an Arrow IPC file or stream; ``line`` is the row number."""
    yield from _rows_of_batches(str(path), _record_batches(path, start, end), first_line)


def _record_batches(path: Path, start: int, end: int) -> Iterator[Any]:
    """Record batches of a file or stream. The file is mapped, so batches that are passed over cost next to nothing."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:
                mapped.seek(0)
                stream = pa.ipc.open_stream(mapped)
                yield from islice(stream, start, None if end < 0 else end)
            else:
                for index in range(start, reader.num_record_batches if end < 0 else end):
                    yield reader.get_batch(index)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}). Write or download it again.") from error


def _rows_of_batches(
    name: str, batches: Iterator[Any], first_line: int, row_group: int | None = None
) -> Iterator[SourceRow | Problem]:
    number = first_line
    for batch in batches:
        decode = row_decoder(batch.schema)
        for part in (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS)):
            try:
                rows: list[Any] = part.to_pylist()
            except UnicodeDecodeError:
                rows = [_row_or_none(part, index) for index in range(part.num_rows)]
            for row in rows:
                if row is None:
                    yield Problem(
                        file=name,
                        line=number,
                        field=None,
                        problem="invalid UTF-8",
                        hint="write the text as UTF-8",
                        row_group=row_group,
                    )
                else:
                    value = row if decode is None else decode(row)
                    yield SourceRow(file=name, line=number, value=value, row_group=row_group)
                number += 1


def _row_or_none(batch: Any, index: int) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
    return row


def open_utf8(path: Path) -> BinaryIO:
    """The file in binary, after its UTF-8 byte order mark.

    Raises:
        DataError: It cannot be opened, or is UTF-16.
    """
    try:
        file = open(path, "rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
    head = file.read(4)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        file.close()
        raise DataError(f"{path}: the file is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > NEW")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return file


CONTAINERS: dict[str, Container] = {
    "jsonl": Container(parts=line_parts, read=read_jsonl),
    "json": Container(parts=_whole_file, read=read_json),
    "csv": Container(parts=_whole_file, read=read_csv),
    "tsv": Container(parts=_whole_file, read=read_tsv),
    "parquet": Container(parts=parquet_parts, read=read_parquet),
    "arrow": Container(parts=arrow_parts, read=read_arrow),
    "txt": Container(parts=line_parts, read=read_txt),
}
# What comes in parts of bounded size; the others are one part per file, however large.
DIVISIBLE = frozenset(name for name, container in CONTAINERS.items() if container.parts is not _whole_file)
