"""From data to encoded rows: streamed chunk by chunk, proven, written once, found again by what went in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from llmtune.data.duplicates import SIGNATURE_BYTES, content_digest, signature
from llmtune.data.encoded import EncodedDataset, EncodedRows, EncodedWriter, TableFacts, is_intact
from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.reading import Reading, bad_rows_error, chunks_of, readings_of, require_trainable
from llmtune.data.records import Chunk, Conversation, Document, Problem, Record, record_text
from llmtune.data.spans import Supervise
from llmtune.data.supervision import SupervisionTally
from llmtune.data.truncation import TooLong, left_out, shorten
from llmtune.data.unread import UnusedTally
from llmtune.data.workers import ordered_map, worker_count
from llmtune.errors import DataError

# Part of the cache's key: raise it when the same input would give other tokens, masks or facts.
ENCODER_VERSION = 4
# Rows that are rendered, tokenised and proven in one call.
_BATCH_RECORDS = 256
# Text of one chunk; about half a second of tokenising on one core.
_CHUNK_BYTES = 1 << 20
# Below this, workers cost more (they import transformers) than they save.
_PARALLEL_BYTES = 32 << 20
# Rows are handed on after so many tokens, 5 MB of ids and masks.
_PIECE_TOKENS = 1 << 20
_KEPT_PROBLEMS = 10_000
_KEPT_TOO_LONG = 10

OnBadRow = Literal["error", "skip", "report"]


def encode(
    data: Any,
    tokenizer: Any,
    *,
    cache_dir: str | Path,
    template: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    vocab_size: int | None = None,
    too_long: TooLong = "refuse",
    supervise: Supervise = "all",
    on_bad_row: OnBadRow = "error",
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> EncodedDataset:
    """Token ids and proven masks of every row, from the cache where the same was encoded before.

    Args:
        data: Anything `resolve` takes, a `Reading`, or several `Reading`s: the parts of a mix.
        tokenizer: A fast tokenizer of transformers.
        cache_dir: Where encoded rows are kept.
        template: Jinja text of the chat template; the tokenizer's own when None.
        format: See `read`.
        columns: See `read`.
        max_length: Longest row in tokens; any length when None.
        vocab_size: How many embeddings the model has, to compare ids with.
        too_long: What to do with longer rows: refuse them all, drop them, cut the oldest tokens (``left``) or
            whole oldest turns (``turns``).
        supervise: Which tokens are learned, see `ChatEncoder`.
        on_bad_row: What to do with rows that cannot be read or encoded: an ``error``, ``skip`` them as long as others
            are left, or only ``report`` them and rows too long, in ``facts``.
        processes: Worker processes; as many as the machine has cores when None and there is much data.
        progress: Called with the number of rows done so far.

    Raises:
        DataError: Bad rows, rows too long, no rows left, or data that is not for supervised training.
        ConfigError: No chat template, an unknown format, a tokenizer without offsets.
    """
    from filelock import FileLock

    readings = readings_of(data, format=format, columns=columns)
    for reading in readings:
        require_trainable(reading)
    encoder = ChatEncoder(tokenizer, template, supervise=supervise)
    nothing = SupervisionTally.of(encoder, vocab_size=vocab_size)
    job = _Job(readings=readings, encoder=encoder, max_length=max_length, too_long=too_long, nothing=nothing)
    directory = Path(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{job.cache_key()}.arrow"
    with FileLock(path.with_suffix(".lock")):
        if not is_intact(path):
            _write(path, job, processes or job.worker_count(), progress)
    files = [label for reading in readings for label in reading.source.labels]
    dataset = EncodedDataset(path, files, weights=[reading.weight for reading in readings])
    _require_rows(dataset.facts, len(dataset), max_length, too_long, on_bad_row)
    return dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Encodes one chunk of one part; sent to worker processes."""

    readings: tuple[Reading, ...]
    encoder: ChatEncoder
    max_length: int | None
    too_long: TooLong
    nothing: SupervisionTally

    def start(self) -> _Tally:
        """A tally of nothing."""
        return _Tally(supervision=self.nothing.another())

    def worker_count(self) -> int:
        """Processes that the data is worth."""
        if not all(reading.source.divisible for reading in self.readings):
            return 1
        num_bytes = sum(reading.source.num_bytes for reading in self.readings)
        return worker_count(num_bytes, least_bytes=_PARALLEL_BYTES)

    def cache_key(self) -> str:
        """The same for jobs that give the same rows and facts."""
        parts = [
            ENCODER_VERSION,
            [_read_as(each) for each in self.readings],
            tokenizer_fingerprint(self.encoder.tokenizer),
            self.encoder.template,
            self.encoder.supervise,
            self.max_length,
            self.nothing.vocab_size,
            # Refused and dropped rows are the same rows.
            "drop" if self.too_long == "refuse" else self.too_long,
        ]
        return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]

    def __call__(self, item: tuple[int, Chunk]) -> list[_Piece]:
        return list(self.pieces(*item))

    def pieces(self, part: int, chunk: Chunk) -> Iterator[_Piece]:
        """The rows of one chunk, some at a time: a chunk may be a whole file."""
        tally, num_tokens = self.start(), 0
        rows: list[tuple[Encoded, int, int, bytes]] = []
        reading = self.readings[part]
        for record, result in encode_stream(reading.read(chunk), self.encoder):
            if num_tokens >= _PIECE_TOKENS:
                yield _Piece(part=part, file=chunk.file, tally=tally, rows=_columns(rows))
                tally, num_tokens, rows = self.start(), 0, []
            tally.rows += 1
            if record is None or not isinstance(result, Encoded):
                problems = result if isinstance(result, list) else []
                tally.bad([_placed(problem, reading, chunk) for problem in problems])
                continue
            if record.unused or result.unwritten:
                tally.unused.add(record.unused, result.unwritten)
            encoded = self._fit(record, result, tally)
            if encoded is not None:
                text = record_text(record)
                own_text = record_text(record, instructions=False)
                rows.append((encoded, record.line, content_digest(text), signature(own_text)))
                num_tokens += len(encoded.input_ids)
        yield _Piece(part=part, file=chunk.file, tally=tally, rows=_columns(rows))

    def _fit(self, record: Conversation | Document, encoded: Encoded, tally: _Tally) -> Encoded | None:
        """The row as it will be trained on, None where it is left out."""
        length, limit = len(encoded.input_ids), self.max_length
        tally.longest = max(tally.longest, length)
        if limit is None or length <= limit:
            tally.supervision.add(record, encoded)
            return encoded
        if self.too_long == "left" or self.too_long == "turns":
            cut = shorten(self.encoder, record, encoded, max_length=limit, policy=self.too_long)
        else:
            cut = left_out(encoded)
        tally.supervision.add(record, encoded, cut)
        if cut.encoded is None:
            tally.too_long += 1
            if len(tally.too_long_at) < _KEPT_TOO_LONG:
                tally.too_long_at.append(f"{record.file}:{record.line} ({length:,} tokens)")
        return cut.encoded


def _read_as(reading: Reading) -> list[Any]:
    """Return what decides how the rows of a reading are read."""
    read_as = [reading.source.fingerprint, reading.format.title, list(reading.format.required), reading.forced]
    return [*read_as, sorted(reading.columns.items()), sorted(reading.ignored)]


def _placed(problem: Problem, reading: Reading, chunk: Chunk) -> Problem:
    # An encoder knows a record's file and line alone; a chunk of Parquet is one row group.
    if reading.source.container != "parquet" or problem.row_group is not None:
        return problem
    return replace(problem, row_group=chunk.start)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What was met on the way; tallies of chunks are merged in order."""

    supervision: SupervisionTally
    rows: int = 0
    bad_rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    too_long: int = 0
    too_long_at: list[str] = field(default_factory=list)
    longest: int = 0
    unused: UnusedTally = field(default_factory=UnusedTally)

    def bad(self, problems: list[Problem]) -> None:
        self.bad_rows += 1
        self.num_problems += len(problems)
        self.problems += problems[: _KEPT_PROBLEMS - len(self.problems)]

    def merge(self, other: _Tally) -> None:
        self.supervision.merge(other.supervision)
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.num_problems += other.num_problems
        self.problems += other.problems[: _KEPT_PROBLEMS - len(self.problems)]
        self.too_long += other.too_long
        self.too_long_at += other.too_long_at[: _KEPT_TOO_LONG - len(self.too_long_at)]
        self.longest = max(self.longest, other.longest)
        self.unused.merge(other.unused)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Encoded rows of one file of one part, and what was met on the way."""

    part: int
    file: int
    tally: _Tally
    rows: EncodedRows


def _columns(rows: list[tuple[Encoded, int, int, bytes]]) -> EncodedRows:
    encoded = [row for row, *_ in rows]
    return EncodedRows(
        input_ids=np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in encoded)]),
        supervised=np.concatenate([np.zeros(0, np.bool_), *(row.supervised for row in encoded)]),
        lengths=np.array([len(row.input_ids) for row in encoded], np.int32),
        num_supervised=np.array([int(row.supervised.sum()) for row in encoded], np.int32),
        lines=np.array([line for _, line, *_ in rows], np.int64),
        digests=np.array([digest for *_, digest, _ in rows], np.uint64),
        signatures=np.frombuffer(b"".join(each for *_, each in rows), np.uint8).reshape(-1, SIGNATURE_BYTES),
    )


def _write(path: Path, job: _Job, processes: int, progress: Callable[[int], None] | None) -> None:
    first_file = np.cumsum([0, *(len(reading.source.labels) for reading in job.readings)])
    tally = job.start()
    part_rows = [0] * len(job.readings)
    writer = EncodedWriter(path, SIGNATURE_BYTES)
    try:
        for piece in _pieces(job, processes):
            tally.merge(piece.tally)
            writer.add(piece.rows, int(first_file[piece.part]) + piece.file)
            part_rows[piece.part] += len(piece.rows.lengths)
            if progress is not None:
                progress(tally.rows)
        facts = TableFacts(
            part_rows=tuple(part_rows),
            rows=tally.rows,
            bad_rows=tally.bad_rows,
            num_problems=tally.num_problems,
            problems=tuple(tally.problems),
            too_long=tally.too_long,
            too_long_at=tuple(tally.too_long_at),
            longest=tally.longest,
            unused=tally.unused.names(),
            supervision=tally.supervision.supervision(),
        )
        writer.commit(facts, [label for reading in job.readings for label in reading.source.labels])
    except BaseException:
        writer.abandon()
        raise


def _pieces(job: _Job, processes: int) -> Iterator[_Piece]:
    chunks = chunks_of(job.readings, _CHUNK_BYTES)
    if processes == 1:
        for part, chunk in chunks:
            yield from job.pieces(part, chunk)
    else:
        for pieces in ordered_map(job, chunks, processes=processes):
            yield from pieces


def encode_stream(
    reading: Iterator[Record | list[Problem]], encoder: ChatEncoder
) -> Iterator[tuple[Conversation | Document | None, Encoded | list[Problem]]]:
    """Every row in order with its encoding or its problems, encoded in batches."""
    while batch := list(islice(reading, _BATCH_RECORDS)):
        records = [item for item in batch if isinstance(item, (Conversation, Document))]
        results = iter(encoder.encode_batch(records))
        for item in batch:
            if isinstance(item, list):
                yield None, item
            elif isinstance(item, (Conversation, Document)):
                result = next(results)
                yield item, result if isinstance(result, Encoded) else [result]


def _require_rows(
    facts: TableFacts, num_good: int, max_length: int | None, too_long: TooLong, on_bad_row: OnBadRow
) -> None:
    if on_bad_row == "report":
        return
    messages = []
    if facts.bad_rows and (on_bad_row == "error" or (not num_good and not facts.too_long)):
        error = bad_rows_error(facts.problems, total=facts.num_problems, affected=facts.bad_rows, rows=facts.rows)
        messages.append(str(error))
    if facts.too_long and (too_long == "refuse" or not num_good):
        listed = " · ".join(facts.too_long_at)
        rest = facts.too_long - len(facts.too_long_at)
        messages.append(
            f"{facts.too_long:,} of {facts.rows:,} rows are longer than data.max_length={max_length} tokens: {listed}"
            f"{f' · and {rest:,} more' if rest else ''}. Pass --set data.max_length={facts.longest}, or "
            "--set data.too_long=drop to leave them out, =turns to drop their oldest turns, =left to cut their "
            "beginning."
        )
    if messages:
        raise DataError(" ".join(messages))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's output: its serialised form and its special tokens."""
    backend = orjson.loads(tokenizer.backend_tokenizer.to_str())
    # The last call's padding and truncation are left in there; every call of ours sets its own.
    backend.pop("padding", None)
    backend.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest = hashlib.sha256(orjson.dumps(backend))
    digest.update(orjson.dumps([special, tokenizer.chat_template], option=orjson.OPT_SORT_KEYS, default=str))
    return digest.hexdigest()
