"""From data to encoded rows: streamed, checked, written once, found again by what went in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from llmtune.data.encoded import EncodedDataset, EncodedWriter, is_intact
from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.reading import Reading, bad_rows_error, read, require_trainable
from llmtune.data.records import Conversation, DataStats, Document, Problem, Record, percentile
from llmtune.errors import DataError

# Part of the cache's key: raise it when the same input would give other tokens or masks.
ENCODER_VERSION = 1
_BATCH_RECORDS = 256
_KEPT_PROBLEMS = 100
# <|im_start|>, role, newline, <|im_end|>, newline: what ChatML, the most common template, adds to a message.
_TEMPLATE_TOKENS_PER_MESSAGE = 5

TooLong = Literal["refuse", "drop"]
OnBadRow = Literal["error", "skip"]


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What one pass over the data met."""

    rows: int = 0
    bad_rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    too_long: int = 0
    longest: int = 0
    too_long_at: list[str] = field(default_factory=list)

    def bad(self, problems: list[Problem]) -> None:
        self.bad_rows += 1
        self.num_problems += len(problems)
        self.problems += problems[: _KEPT_PROBLEMS - len(self.problems)]


def encode(
    data: Any,
    tokenizer: Any,
    *,
    cache_dir: str | Path,
    template: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    on_bad_row: OnBadRow = "error",
    progress: Callable[[int], None] | None = None,
) -> EncodedDataset:
    """Token ids and proven masks of every row, from the cache where the same was encoded before.

    Args:
        data: Anything `resolve` takes.
        tokenizer: A fast tokenizer of transformers.
        cache_dir: Where encoded rows are kept.
        template: Jinja text of the chat template; the tokenizer's own when None.
        format: See `read`.
        columns: See `read`.
        max_length: Longest row in tokens; any length when None.
        too_long: What to do with longer rows.
        on_bad_row: What to do with rows that cannot be read or encoded.
        progress: Called with the number of rows done so far.

    Raises:
        DataError: Bad rows, rows too long, no rows left, or data that is not for supervised training.
        ConfigError: No chat template, an unknown format, a tokenizer without offsets.
    """
    from filelock import FileLock

    reading = read(data, format=format, columns=columns)
    require_trainable(reading)
    encoder = ChatEncoder(tokenizer, template)
    key = _cache_key(reading, encoder, max_length=max_length, too_long=too_long, on_bad_row=on_bad_row)
    directory = Path(cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{key}.arrow"
    with FileLock(path.with_suffix(".lock")):
        if not is_intact(path):
            _write(path, reading, encoder, max_length, too_long, on_bad_row, progress)
    return EncodedDataset(path, reading.source.labels)


def _write(
    path: Path,
    reading: Reading,
    encoder: ChatEncoder,
    max_length: int | None,
    too_long: TooLong,
    on_bad_row: OnBadRow,
    progress: Callable[[int], None] | None,
) -> None:
    files = {label: number for number, label in enumerate(reading.source.labels)}
    tally = _Tally()
    writer = EncodedWriter(path)
    try:
        for record, result in encode_stream(reading, encoder):
            tally.rows += 1
            if progress is not None and tally.rows % _BATCH_RECORDS == 0:
                progress(tally.rows)
            if record is None or not isinstance(result, Encoded):
                tally.bad(result if isinstance(result, list) else [])
                continue
            length = len(result.input_ids)
            if max_length is not None and length > max_length:
                tally.too_long += 1
                tally.longest = max(tally.longest, length)
                if len(tally.too_long_at) < 10:
                    tally.too_long_at.append(f"{record.file}:{record.line} ({length:,} tokens)")
                continue
            writer.add(result, files[record.file], record.line)
        _raise_for(tally, writer.num_rows, max_length, too_long, on_bad_row)
        writer.commit(dropped_too_long=tally.too_long, skipped_bad=tally.bad_rows, problems=tally.problems)
    except BaseException:
        writer.abandon()
        raise
    if progress is not None:
        progress(tally.rows)


def encode_stream(
    reading: Iterable[Record | list[Problem]], encoder: ChatEncoder
) -> Iterator[tuple[Conversation | Document | None, Encoded | list[Problem]]]:
    """Every row in order with its encoding or its problems, encoded in batches."""
    batch: list[Record | list[Problem]] = []
    for item in reading:
        batch.append(item)
        if len(batch) == _BATCH_RECORDS:
            yield from _encode_batch(batch, encoder)
            batch = []
    yield from _encode_batch(batch, encoder)


def _encode_batch(
    batch: list[Record | list[Problem]], encoder: ChatEncoder
) -> Iterator[tuple[Conversation | Document | None, Encoded | list[Problem]]]:
    results = iter(encoder.encode_batch([item for item in batch if isinstance(item, (Conversation, Document))]))
    for item in batch:
        if isinstance(item, list):
            yield None, item
        elif isinstance(item, (Conversation, Document)):
            result = next(results)
            yield item, result if isinstance(result, Encoded) else [result]


def _raise_for(tally: _Tally, num_good: int, max_length: int | None, too_long: TooLong, on_bad_row: OnBadRow) -> None:
    messages = []
    if tally.bad_rows and (on_bad_row == "error" or (not num_good and not tally.too_long)):
        error = bad_rows_error(tally.problems, total=tally.num_problems, affected=tally.bad_rows, rows=tally.rows)
        messages.append(str(error))
    if tally.too_long and (too_long == "refuse" or not num_good):
        listed = " · ".join(tally.too_long_at)
        rest = tally.too_long - len(tally.too_long_at)
        messages.append(
            f"{tally.too_long:,} of {tally.rows:,} rows are longer than data.max_length={max_length} tokens: {listed}"
            f"{f' · and {rest:,} more' if rest else ''}. Pass --set data.max_length={tally.longest}, or "
            "--set data.too_long=drop to leave them out."
        )
    if messages:
        raise DataError(" ".join(messages))


def _cache_key(
    reading: Reading,
    encoder: ChatEncoder,
    *,
    max_length: int | None,
    too_long: TooLong,
    on_bad_row: OnBadRow,
) -> str:
    parts = [
        ENCODER_VERSION,
        reading.source.fingerprint,
        reading.format.title,
        sorted(reading.columns.items()),
        tokenizer_fingerprint(encoder.tokenizer),
        encoder.template,
        max_length,
        too_long,
        on_bad_row,
    ]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]


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


def estimate_stats(
    data: Any,
    *,
    bytes_per_token: float,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> DataStats:
    """Token counts by size, for a plan without a tokenizer: UTF-8 bytes by ``bytes_per_token``, and the template's.

    Rows longer than ``max_length`` count as dropped; bad rows as skipped.

    Raises:
        DataError: As `encode`, apart from single bad rows.
    """
    reading = read(data, format=format, columns=columns)
    require_trainable(reading)
    lengths: list[int] = []
    supervised = dropped = bad = 0
    for record in reading:
        if isinstance(record, list):
            bad += 1
            continue
        length, learned = _estimate(record, bytes_per_token)
        if max_length is not None and length > max_length:
            dropped += 1
            continue
        lengths.append(length)
        supervised += learned
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    return DataStats(
        rows=len(lengths),
        tokens=int(ordered.sum()),
        supervised_tokens=supervised,
        length_p50=percentile(ordered, 0.50),
        length_p95=percentile(ordered, 0.95),
        length_p99=percentile(ordered, 0.99),
        length_max=int(ordered[-1]) if len(ordered) else 0,
        dropped_too_long=dropped,
        skipped_bad=bad,
        estimated=True,
    )


def _estimate(record: Record, bytes_per_token: float) -> tuple[int, int]:
    """Tokens and supervised tokens of one record."""
    if isinstance(record, Document):
        tokens = round(len(record.text.encode()) / bytes_per_token) + 1
        return tokens, tokens
    if not isinstance(record, Conversation):
        return 0, 0
    total = learned = 0
    for message in record.messages:
        calls = orjson.dumps(message.tool_calls, default=str) if message.tool_calls else b""
        tokens = round((len(message.content.encode()) + len(calls)) / bytes_per_token)
        total += tokens + _TEMPLATE_TOKENS_PER_MESSAGE
        if message.role == "assistant" and message.supervised:
            learned += tokens + 1
    if record.tools:
        total += round(len(orjson.dumps(record.tools, default=str)) / bytes_per_token)
    return total, learned
