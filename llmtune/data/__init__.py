"""Data path: find the rows, recognise and check them, encode them with a proven mask, split and batch them."""

from __future__ import annotations

from llmtune.data.batches import collate, epoch_order, micro_batches, padded, shard_rows
from llmtune.data.check import DataReport, check, write_fixed
from llmtune.data.encode import encode, estimate_stats
from llmtune.data.encoded import EncodedDataset
from llmtune.data.formats import FORMAT_NAMES, FORMATS, Format
from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.reading import Reading, read
from llmtune.data.records import (
    Conversation,
    DataStats,
    Document,
    Message,
    PreferencePair,
    Problem,
    Record,
    SourceRow,
)
from llmtune.data.source import Source, resolve
from llmtune.data.split import split

__all__ = [
    "FORMATS",
    "FORMAT_NAMES",
    "ChatEncoder",
    "Conversation",
    "DataReport",
    "DataStats",
    "Document",
    "Encoded",
    "EncodedDataset",
    "Format",
    "Message",
    "PreferencePair",
    "Problem",
    "Reading",
    "Record",
    "Source",
    "SourceRow",
    "check",
    "collate",
    "encode",
    "epoch_order",
    "estimate_stats",
    "micro_batches",
    "padded",
    "read",
    "resolve",
    "shard_rows",
    "split",
    "write_fixed",
]
