"""Read each container row by row, in bounded memory and in parts. A row that cannot be read is a `Problem`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from llmtune.data.arrow_json import row_decoder
from llmtune.data.lines import BLOCK_BYTES, Part, line_parts, numbered_lines, open_utf8
from llmtune.data.records import Problem, SourceRow
from llmtune.data.strict_json import MAX_ROW_BYTES, invalid_utf8, parse_object, read_array, too_large
from llmtune.data.tables import read_table
from llmtune.errors import DataError

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """How to divide files of one kind (path, about so many bytes) and read them (path, start, end, first line).

    The last argument of both is the name of the file in messages; its path when empty.
    """

    parts: Callable[[Path, int, str], Iterator[Part]]
    read: Callable[[Path, int, int, int, str], Iterator[SourceRow | Problem]]


def _whole_file(path: Path, num_bytes: int, name: str = "") -> Iterator[Part]:
    yield 0, -1, 1


def _one_document(path: Path, num_bytes: int, name: str = "") -> Iterator[Part]:
    """The file as one part of bounded size: a larger document than `MAX_ROW_BYTES` is not held in memory."""
    yield 0, -1, 1


def read_jsonl(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """One JSON object per line; a byte order mark, CRLF and blank lines are tolerated."""
    name = name or str(path)
    for number, first, raw, after in numbered_lines(path, start, end, first_line):
        if raw is None:
            yield too_large(name, number, (first, after))
        elif not raw.isspace():
            row = parse_object(raw, name, number)
            yield row if isinstance(row, SourceRow) else replace(row, span=(first, after))


def read_json(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """An array of objects (``line`` is the row number), or one object per line."""
    name = name or str(path)
    with open_utf8(path) as file:
        begin = file.tell()
        head = next((block for block in iter(lambda: file.read(BLOCK_BYTES), b"") if not block.isspace()), b"")
        first = head.lstrip()[:1]
        file.seek(begin)
        if first == b"[":
            yield from read_array(file, name)
            return
        lines = iter(lambda: file.readline(BLOCK_BYTES), b"")
        line = next((line for line in lines if not line.isspace()), b"").strip()
        if first == b"{" and line in (b"{", b"{}"):
            raise DataError(
                f"{name}: the file is one JSON object spread over lines; expected an array of objects, "
                "or one object per line. Save its list of rows alone."
            )
    yield from read_jsonl(path, name=name)


def read_csv(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """Comma-separated values with a header row; another delimiter is recognised."""
    yield from read_table(path, ",", name or str(path))


def read_tsv(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """Tab-separated values with a header row; another delimiter is recognised."""
    yield from read_table(path, "\t", name or str(path))


def read_lines(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """One document per line that is not blank."""
    name = name or str(path)
    for number, first, raw, after in numbered_lines(path, start, end, first_line):
        if raw is None:
            yield too_large(name, number, (first, after))
        elif not raw.isspace():
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as bad:
                yield replace(invalid_utf8(raw, bad.start, name, number), span=(first, after))
            else:
                yield SourceRow(file=name, line=number, value={"text": text})


def read_document(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """The whole file as one document, with LF line ends and without the line ends at its end; nothing if blank."""
    name = name or str(path)
    with open_utf8(path) as file:
        begin = file.tell()
        raw = file.read(MAX_ROW_BYTES + 1)
        after = begin + len(raw)
        if len(raw) > MAX_ROW_BYTES:
            yield too_large(name, 1, (begin, file.seek(0, 2)))
            return
    if not raw.strip():
        return
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").rstrip("\r\n")
    except UnicodeDecodeError as bad:
        line, column = raw.count(b"\n", 0, bad.start) + 1, bad.start - (raw.rfind(b"\n", 0, bad.start) + 1)
        problem = f"invalid UTF-8: byte 0x{raw[bad.start]:02x} at line {line}, column {column + 1}"
        yield Problem(
            file=name, line=1, field=None, problem=problem, hint="save the file as UTF-8", span=(begin, after)
        )
    else:
        yield SourceRow(file=name, line=1, value={"text": text})


def parquet_parts(path: Path, num_bytes: int, name: str = "") -> Iterator[Part]:
    """Every row group by itself: what Parquet can read alone, and what a problem is named after."""
    with _opened_parquet(path, name) as file:
        first_row = 1
        for group in range(file.num_row_groups):
            yield group, group + 1, first_row
            first_row += file.metadata.row_group(group).num_rows


def read_parquet(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """Rows of a Parquet file; ``line`` is the row number in the file."""
    import pyarrow as pa

    name = name or str(path)
    with _opened_parquet(path, name) as file:
        for group in range(start, file.num_row_groups if end < 0 else end):
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group])
            try:
                yield from _rows_of_batches(name, batches, first_line, group)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{name}: row group {group:,} cannot be read ({error}). Write or download the file again."
                ) from error
            first_line += file.metadata.row_group(group).num_rows


def _opened_parquet(path: Path, name: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{name or path}: not a readable Parquet file ({error}). Write or download it again."
        ) from error


def arrow_parts(path: Path, num_bytes: int, name: str = "") -> Iterator[Part]:
    """Runs of record batches of about ``num_bytes`` in memory."""
    start = held = 0
    first_row = row = 1
    for index, batch in enumerate(_record_batches(path, 0, -1, name)):
        held += batch.nbytes
        row += batch.num_rows
        if held >= num_bytes:
            yield start, index + 1, first_row
            start, first_row, held = index + 1, row, 0
    if row > first_row:
        yield start, -1, first_row


def read_arrow(
    path: Path, start: int = 0, end: int = -1, first_line: int = 1, name: str = ""
) -> Iterator[SourceRow | Problem]:
    """Rows of an Arrow IPC file or stream; ``line`` is the row number."""
    name = name or str(path)
    yield from _rows_of_batches(name, _record_batches(path, start, end, name), first_line)


def _record_batches(path: Path, start: int, end: int, name: str) -> Iterator[Any]:
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
        raise DataError(f"{name or path}: not a readable Arrow file ({error}). Write or download it again.") from error


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


CONTAINERS: dict[str, Container] = {
    "jsonl": Container(parts=line_parts, read=read_jsonl),
    "json": Container(parts=_whole_file, read=read_json),
    "csv": Container(parts=_whole_file, read=read_csv),
    "tsv": Container(parts=_whole_file, read=read_tsv),
    "parquet": Container(parts=parquet_parts, read=read_parquet),
    "arrow": Container(parts=arrow_parts, read=read_arrow),
    "document": Container(parts=_one_document, read=read_document),
    "lines": Container(parts=line_parts, read=read_lines),
}
# What comes in parts of bounded size; the others are one part per file, however large.
DIVISIBLE = frozenset(name for name, container in CONTAINERS.items() if container.parts is not _whole_file)
