"""Take data apart into rows that can be used and rows that cannot, with the reasons, and lose nothing."""

from __future__ import annotations

import codecs
import json
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llmtune.data.masks import ChatEncoder
from llmtune.data.reading import Reading, readings_of
from llmtune.data.records import Conversation, Document, Problem, SourceRow
from llmtune.data.spans import Supervise
from llmtune.errors import ConfigError

_BATCH_ROWS = 256
_BLOCK_BYTES = 3 << 18  # a multiple of three, so that blocks of base64 can be put together


def write_fixed(
    data: Any,
    out: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    supervise: Supervise = "all",
) -> tuple[int, int]:
    """Write the good rows to ``out`` (jsonl) and the others, with the reasons, to ``STEM.quarantine.jsonl`` beside it.

    Good rows that were JSON are copied as they were written. A line of the quarantine has ``file``, ``line``,
    ``problems`` and ``row``; where the row could not be parsed, ``row`` is null and ``raw`` is its text (``raw_base64``
    its bytes, where these are not UTF-8). Both files appear when both are complete; memory is bounded.

    Args:
        data: Anything `resolve` takes, or a `Reading`.
        out: A new ``.jsonl`` file.
        format: See `read`.
        columns: See `read`.
        tokenizer: A fast tokenizer of transformers, to put aside also what it cannot encode; or None.
        template: Jinja text of the chat template; the tokenizer's own when None.
        supervise: What is learned of a conversation, see `ChatEncoder`.

    Returns:
        The numbers of good and of quarantined rows.

    Raises:
        ConfigError: ``out`` is no ``.jsonl`` file, or one of the files that are read; several readings.
        DataError: Nothing can be read or recognised at all.
    """
    readings, out = readings_of(data, format=format, columns=columns), Path(out)
    if len(readings) > 1:
        raise ConfigError("--fix", ["a mix is mended file by file; give one of its sources"])
    reading = readings[0]
    quarantine = out.with_name(f"{out.stem}.quarantine.jsonl")
    if out.suffix != ".jsonl" or {out.resolve(), quarantine.resolve()} & {
        file.resolve() for file in reading.source.files
    }:
        raise ConfigError("--fix", [f"got {str(out)!r}, expected the name of a new .jsonl file"])
    encoder = None
    if tokenizer is not None and reading.format.trainable:
        encoder = ChatEncoder(tokenizer, template, supervise=supervise)
    good = bad = 0
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (out, quarantine)}
    try:
        with open(parts[out], "wb") as kept, open(parts[quarantine], "wb") as rejected:
            for row, problems in _judged(reading, encoder):
                if isinstance(row, SourceRow) and not problems:
                    good += 1
                    kept.write(_json_line(row) + b"\n")
                else:
                    bad += 1
                    _quarantine(rejected, row, problems)
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return good, bad


def _judged(reading: Reading, encoder: ChatEncoder | None) -> Iterator[tuple[SourceRow | Problem, list[Problem]]]:
    """Every row in order with all that is wrong with it."""
    rows = iter(reading.source)
    while batch := list(islice(rows, _BATCH_ROWS)):
        results = [[row] if isinstance(row, Problem) else reading.convert(row) for row in batch]
        records = [result for result in results if isinstance(result, (Conversation, Document))]
        encoded = iter(encoder.encode_batch(records) if encoder is not None else records)
        for row, result in zip(batch, results, strict=True):
            if isinstance(result, list):
                yield row, result
            else:
                refused = next(encoded) if isinstance(result, (Conversation, Document)) else None
                yield row, [refused] if isinstance(refused, Problem) else []


def _json_line(row: SourceRow) -> bytes:
    """The row on one line, as it was written where it was JSON (numbers beyond 64 bits stay what they are)."""
    if row.raw is not None:
        # Line ends stand only between the parts of a row, never in its texts.
        return row.raw.strip().replace(b"\r", b" ").replace(b"\n", b" ")
    return _dumps(row.value)


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # integers beyond 64 bits and lone surrogates, which JSON can escape
        return json.dumps(value, default=str).encode()


def _quarantine(file: BinaryIO, row: SourceRow | Problem, problems: list[Problem]) -> None:
    reasons = [{"field": problem.field, "problem": problem.problem, "hint": problem.hint} for problem in problems]
    place = _dumps({"file": row.file, "line": row.line, "problems": reasons})[:-1]
    if isinstance(row, SourceRow):
        file.write(place + b',"row":' + _json_line(row) + b"}\n")
        return
    file.write(place + b',"row":null')
    if row.span is not None:
        with open(row.file, "rb") as damaged:
            _write_raw(file, damaged, *row.span)
    file.write(b"}\n")


def _write_raw(file: BinaryIO, damaged: BinaryIO, start: int, end: int) -> None:
    """The bytes of a row as text, and as base64 where they are not UTF-8; block by block, however many they are."""
    damaged.seek(max(start, end - 2))
    tail = damaged.read(end - damaged.tell())
    end -= len(tail) - len(tail.rstrip(b"\r\n"))
    text, strict = (codecs.getincrementaldecoder("utf-8")(errors) for errors in ("replace", "strict"))
    valid = True
    file.write(b',"raw":"')
    for block in chain(_blocks(damaged, start, end), (b"",)):
        file.write(_dumps(text.decode(block, not block))[1:-1])
        try:
            strict.decode(block, not block)
        except UnicodeDecodeError:
            valid = False
    file.write(b'"')
    if not valid:
        file.write(b',"raw_base64":"')
        for block in _blocks(damaged, start, end):
            file.write(b64encode(block))
        file.write(b'"')


def _blocks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end and (block := file.read(min(_BLOCK_BYTES, end - start))):
        yield block
        start += len(block)
