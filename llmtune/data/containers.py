"""Read each container row by row, in bounded memory. A row that cannot be read is a `Problem`, and reading goes on."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llmtune.data.records import Problem, SourceRow
from llmtune.errors import DataError

_KEY = re.compile(rb'"[ \t\r\n]*:')
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRING_END = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 1024


def read_jsonl(path: Path) -> Iterator[SourceRow | Problem]:
    """One JSON object per line; a byte order mark, CRLF and blank lines are tolerated."""
    with open_utf8(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            yield parse_object(raw, str(path), number)


def read_json(path: Path) -> Iterator[SourceRow | Problem]:
    """An array of objects (``line`` is the row number), or one object per line."""
    with open_utf8(path) as file:
        start = file.tell()
        head = file.read(_CHUNK_BYTES)
        while head and head.isspace():
            head = file.read(_CHUNK_BYTES)
        first = head.lstrip()[:1]
        file.seek(start)
        if first == b"[":
            for number, raw in enumerate(_array_elements(file), start=1):
                if raw is None:
                    yield _problem(str(path), number, "the array is cut off", "the file was truncated; write it again")
                else:
                    yield parse_object(raw, str(path), number)
            return
        line = next((line for line in file if not line.isspace()), b"").strip()
        if first == b"{" and line in (b"{", b"{}"):
            raise DataError(
                f"{path}: the file is one JSON object spread over lines; expected an array of objects, "
                "or one object per line. Save its list of rows alone."
            )
    yield from read_jsonl(path)


def parse_object(raw: bytes, file: str, line: int) -> SourceRow | Problem:
    """One JSON object, strictly: valid UTF-8, no duplicate keys, nothing cut off."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return _json_problem(raw, file, line, error)
    if not isinstance(value, dict):
        return _problem(
            file, line, f"the row is {_json_kind(value)}, expected an object", 'write {"field": value, …}, one per row'
        )
    # Every key is followed by a colon, so equal counts prove that no key was lost to a duplicate.
    if len(_KEY.findall(raw)) != _num_keys(value):
        try:
            duplicate = _duplicate_key(raw)
        except RecursionError:
            return _problem(file, line, "nested too deep to be read", "a row needs a handful of levels; flatten it")
        if duplicate is not None:
            return _problem(
                file, line, f"the key '{duplicate}' occurs twice", "remove or rename one of the two", duplicate
            )
    return SourceRow(file=file, line=line, value=value)


def _num_keys(value: Any) -> int:
    count, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            count += len(item)
            item = item.values()
        stack.extend(child for child in item if isinstance(child, (dict, list)))
    return count


def _duplicate_key(raw: bytes) -> str | None:
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                duplicates.append(key)
            seen.add(key)

    json.loads(raw, object_pairs_hook=collect, parse_int=str)
    return duplicates[0] if duplicates else None


def _json_problem(raw: bytes, file: str, line: int, error: orjson.JSONDecodeError) -> Problem:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        byte = raw[bad.start]
        return _problem(
            file, line, f"invalid UTF-8: byte 0x{byte:02x} at column {bad.start + 1}", "save the file as UTF-8"
        )
    if "\x00" in text:
        return _problem(file, line, f"a NUL character at column {text.index(chr(0)) + 1}", "remove it")
    if error.pos >= len(text.rstrip()) or "unexpected end" in error.msg:
        return _problem(file, line, "the JSON is cut off", "complete or remove the row")
    return _problem(file, line, f"not valid JSON: {error.msg} at column {error.pos + 1}", "correct the row")


def _array_elements(file: BinaryIO) -> Iterator[bytes | None]:
    """The bytes of each element of a JSON array, found by counting brackets; None at the end when it is cut off."""
    buffer, pos, depth, start = file.read(_CHUNK_BYTES), 0, 0, 0
    while True:
        match = _STRUCTURE.search(buffer, pos)
        if match is not None and match[0] == b'"':
            end = _STRING_END.match(buffer, match.end())
            if end is not None:
                pos = end.end()
                continue
        if match is None or match[0] == b'"':
            chunk = file.read(max(_CHUNK_BYTES, len(buffer)))  # doubling keeps one huge string linear
            if not chunk:
                yield None
                return
            resume = len(buffer) if match is None else match.start()
            buffer, pos, start = buffer[start:] + chunk, resume - start, 0
            continue
        pos = match.end()
        if match[0] in b"[{":
            depth += 1
            if depth == 1:
                start = pos
        elif match[0] == b"," and depth == 1:
            yield buffer[start : match.start()]
            start = pos
        elif match[0] in b"]}":
            depth -= 1
            if depth == 0:
                last = buffer[start : match.start()]
                if last.strip():
                    yield last
                if buffer[pos:].strip() or file.read().strip():
                    yield b"text after the end of the array"
                return


def read_csv(path: Path) -> Iterator[SourceRow | Problem]:
    """Comma-separated values with a header row."""
    yield from _read_delimited(path, ",")


def read_tsv(path: Path) -> Iterator[SourceRow | Problem]:
    """Tab-separated values with a header row."""
    yield from _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> Iterator[SourceRow | Problem]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than many answers
    name = str(path)
    # Undecodable bytes become surrogates, so that one bad row does not end the reading.
    with io.TextIOWrapper(open_utf8(path), encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        repeated = sorted({column for column in header if header.count(column) > 1})
        if repeated:
            raise DataError(f"{path}:1: the header names {', '.join(map(repr, repeated))} twice; rename one column.")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _problem(name, line, f"not valid CSV: {error}", "check the quotes of this row")
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                problem = f"{len(cells)} cells, the header has {len(header)}"
                yield _problem(name, line, problem, f"quote cells that contain {delimiter!r} or line breaks")
            elif any("\ud800" <= char <= "\udfff" for cell in cells if not cell.isascii() for char in cell):
                yield _problem(name, line, "invalid UTF-8", "save the file as UTF-8")
            else:
                yield SourceRow(file=name, line=line, value=dict(zip(header, cells, strict=True)))


def read_txt(path: Path) -> Iterator[SourceRow | Problem]:
    """One document per line that is not blank."""
    with open_utf8(path) as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as bad:
                problem = f"invalid UTF-8: byte 0x{raw[bad.start]:02x} at column {bad.start + 1}"
                yield _problem(str(path), number, problem, "save the file as UTF-8")
            else:
                yield SourceRow(file=str(path), line=number, value={"text": text})


def read_parquet(path: Path) -> Iterator[SourceRow | Problem]:
    """Rows of a Parquet file; ``line`` is the row number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _rows_of_batches(str(path), file.iter_batches(batch_size=_BATCH_ROWS))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write or download it again.") from error


def read_arrow(path: Path) -> Iterator[SourceRow | Problem]:
    """Rows of an Arrow IPC file or stream; ``line`` is the row number."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                reader = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:
                mapped.seek(0)
                yield from _rows_of_batches(str(path), pa.ipc.open_stream(mapped))
            else:
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                yield from _rows_of_batches(str(path), batches)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}). Write or download it again.") from error


def _rows_of_batches(name: str, batches: Any) -> Iterator[SourceRow | Problem]:
    number = 0
    for batch in batches:
        for part in (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS)):
            try:
                rows: list[Any] = part.to_pylist()
            except UnicodeDecodeError:
                rows = [_row_or_none(part, index) for index in range(part.num_rows)]
            for row in rows:
                number += 1
                if row is None:
                    yield _problem(name, number, "invalid UTF-8", "write the text as UTF-8")
                else:
                    yield SourceRow(file=name, line=number, value=row)


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
        file = open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
    head = file.read(4)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        file.close()
        raise DataError(f"{path}: the file is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > NEW")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return file


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _problem(file: str, line: int, problem: str, hint: str, field: str | None = None) -> Problem:
    return Problem(file=file, line=line, field=field, problem=problem, hint=hint)


READERS: dict[str, Callable[[Path], Iterator[SourceRow | Problem]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "txt": read_txt,
}
