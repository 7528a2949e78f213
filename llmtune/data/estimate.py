"""Token counts by size alone, for a plan made before any tokenizer is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import orjson

from llmtune.data.batches import Part, epoch_rows
from llmtune.data.reading import Reading, require_trainable
from llmtune.data.records import Conversation, DataStats, Document, Record, percentile

# <|im_start|>, role, newline, <|im_end|>, newline: what ChatML, the most common template, adds to a message.
_TEMPLATE_TOKENS_PER_MESSAGE = 5


def estimate_stats(readings: Sequence[Reading], *, bytes_per_token: float, max_length: int | None = None) -> DataStats:
    """Token counts of one epoch: UTF-8 bytes by ``bytes_per_token``, and what a template adds.

    Rows longer than ``max_length`` count as dropped; bad rows as skipped.

    Raises:
        DataError: Data that is not for supervised training.
    """
    lengths: list[list[int]] = []
    tokens = supervised = 0.0
    dropped = bad = 0
    for reading in readings:
        require_trainable(reading)
        lengths.append([])
        for record in reading:
            if isinstance(record, list):
                bad += 1
                continue
            length, learned = _estimate(record, bytes_per_token)
            if max_length is not None and length > max_length:
                dropped += 1
                continue
            lengths[-1].append(length)
            tokens += reading.weight * length
            supervised += reading.weight * learned
    ordered = np.sort(np.fromiter(chain.from_iterable(lengths), np.int64))
    parts = [Part(num_rows=len(rows), weight=reading.weight) for rows, reading in zip(lengths, readings, strict=True)]
    return DataStats(
        rows=epoch_rows(parts),
        tokens=round(tokens),
        supervised_tokens=round(supervised),
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
