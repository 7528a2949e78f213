"""Take data apart into rows that can be used and rows that cannot, with the reasons, and lose nothing."""

from __future__ import annotations

import codecs
import json
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llmtune.data.files import files_at
from llmtune.data.masks import ChatEncoder
from llmtune.data.reading import Reading, readings_of
from llmtune.data.records import Conversation, Document, Problem, SourceRow
from llmtune.data.spans import Supervise
from llmtune.errors import ConfigError, DataError, OutputError
from llmtune.hardware import undisturbed

_EXPECTED = "the name of a new .jsonl file"
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
    overwrite: bool = False,
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
        overwrite: Replace both files where they exist.

    Returns:
        The numbers of good and of quarantined rows.

    Raises:
        ConfigError: ``out`` is no ``.jsonl`` file, or one of the files that are read; several readings.
        OutputError: One of the files exists, or cannot be written.
        DataError: Nothing can be read or recognised at all.
    """
    out = Path(out)
    require_place(out, data, overwrite=overwrite)
    readings = readings_of(data, format=format, columns=columns)
    if len(readings) > 1:
        places = ", ".join(reading.source.labels[0] for reading in readings[:3])
        raise ConfigError("--fix", [f"a mix is fixed source by source; give one of its sources as DATA: {places}"])
    reading = readings[0]
    _require_other_files(out, (*reading.source.files, *map(Path, reading.source.labels)))
    encoder = None
    if tokenizer is not None and reading.format.trainable:
        encoder = ChatEncoder(tokenizer, template, supervise=supervise)
    good = bad = 0
    originals = dict(zip(reading.source.labels, reading.source.files, strict=False))
    with _together(out, quarantine_of(out), overwrite=overwrite) as (kept, rejected):
        for row, problems in _judged(reading, encoder):
            if isinstance(row, SourceRow) and not problems:
                good += 1
                kept.write(_json_line(row) + b"\n")
            else:
                bad += 1
                _quarantine(rejected, row, problems, originals)
    return good, bad


def quarantine_of(out: Path) -> Path:
    """The file of the rows that cannot be used, beside that of the good ones."""
    return out.with_name(f"{out.stem}.quarantine.jsonl")


def require_place(out: Path, data: Any = None, *, overwrite: bool) -> None:
    """Refuse a place where the two files cannot go, before anything is read.

    Args:
        out: The file of the good rows.
        data: The data, as it was given.
        overwrite: Replace both files where they exist.

    Raises:
        ConfigError: ``out`` does not end in ``.jsonl``, or one of the files is data.
        OutputError: One of the files exists and is not to be replaced, or there is no folder for them.
    """
    if out.suffix != ".jsonl":
        raise ConfigError("--fix", [f"got {str(out)!r}, expected {_EXPECTED}"])
    if isinstance(data, (str, Path)):
        with suppress(DataError):  # told when it is read
            layout = files_at(data).layout
            _require_other_files(out, (*layout.train, *layout.evaluation, *layout.unused))
    if not out.parent.is_dir():
        raise OutputError(
            f"cannot write {out}: there is no directory {out.parent}. Create it, or choose another --fix."
        )
    for path in (out, quarantine_of(out)):
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a directory. Choose another --fix.")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists. Pass --force to overwrite it, or choose another --fix.")


def _require_other_files(out: Path, files: Iterable[Path]) -> None:
    """Refuse to write over data.

    Raises:
        ConfigError: One of the two files is data.
    """
    if {out.resolve(), quarantine_of(out).resolve()} & {file.resolve() for file in files}:
        raise ConfigError("--fix", [f"got {str(out)!r}, which would overwrite the data; expected {_EXPECTED}"])


@contextmanager
def _together(*paths: Path, overwrite: bool) -> Iterator[tuple[BinaryIO, ...]]:
    """Files to write that appear under their names when all are complete, or not at all.

    Raises:
        OutputError: They cannot be written.
    """
    staged = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths}
    try:
        with ExitStack() as stack:
            files = tuple(stack.enter_context(open(part, "wb")) for part in staged.values())
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        require_place(paths[0], overwrite=overwrite)  # what came to be there in the meantime stays
        with undisturbed():
            _put_in_place(staged)
    except OSError as error:
        raise OutputError(
            f"cannot write {' and '.join(map(str, paths))}: {error.strerror or error}. Nothing was left behind; free "
            "room, or choose another --fix."
        ) from error
    finally:
        for part in staged.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _put_in_place(staged: Mapping[Path, Path]) -> None:
    """Rename all files; where one cannot be renamed, those before it are what they were."""
    replaced: dict[Path, Path | None] = {}
    try:
        for path, part in staged.items():
            before = path.with_name(f"{path.name}.{os.getpid()}.before") if path.exists() else None
            if before is not None:
                os.replace(path, before)
            replaced[path] = before
            os.replace(part, path)
    except OSError:
        for path, before in replaced.items():
            path.unlink(missing_ok=True)
            if before is not None:
                os.replace(before, path)
        raise
    for before in replaced.values():
        if before is not None:
            before.unlink()


def _judged(reading: Reading, encoder: ChatEncoder | None) -> Iterator[tuple[SourceRow | Problem, list[Problem]]]:
    """Every row in order with all that is wrong with it."""
    rows = _rows(reading)
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


def _rows(reading: Reading) -> Iterator[SourceRow | Problem]:
    try:
        yield from reading.source
    except OSError as error:  # of the data, not of what is written
        raise DataError(f"{', '.join(reading.source.labels[:3])}: cannot be read ({error.strerror}).") from error


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


def _quarantine(
    file: BinaryIO, row: SourceRow | Problem, problems: list[Problem], originals: Mapping[str, Path]
) -> None:
    reasons = [{"field": problem.field, "problem": problem.problem, "hint": problem.hint} for problem in problems]
    place = _dumps({"file": row.file, "line": row.line, "problems": reasons})[:-1]
    if isinstance(row, SourceRow):
        file.write(place + b',"row":' + _json_line(row) + b"}\n")
        return
    file.write(place + b',"row":null')
    if row.span is not None:
        with open(originals[row.file], "rb") as damaged:
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
