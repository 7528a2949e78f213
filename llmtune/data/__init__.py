"""Data path: find the rows, recognise and check them, encode them with a proven mask, split and batch them."""

from __future__ import annotations

from llmtune.data.advice import Advice, advise
from llmtune.data.batches import Part, collate, epoch_order, epoch_rows
from llmtune.data.check import DataReport, check
from llmtune.data.duplicates import Duplicates, Groups, Leakage, contamination, duplicate_groups
from llmtune.data.encode import encode
from llmtune.data.encoded import EncodedDataset
from llmtune.data.fix import write_fixed
from llmtune.data.formats import FORMAT_NAMES, FORMATS, Format
from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.packing import IGNORED, collate_packed, pack_rows
from llmtune.data.partition import micro_batches, padded, pass_tokens, pass_width, shard_rows
from llmtune.data.preview import preview
from llmtune.data.reading import Reading, ignored_names, read, summarise
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
from llmtune.data.source import Found, Source, find, resolve, resolve_evaluation
from llmtune.data.split import split
from llmtune.data.supervision import Supervision, require_supervised
from llmtune.data.survey import Survey, survey
from llmtune.data.unread import sentence as unused_sentence

__all__ = [
    "FORMATS",
    "FORMAT_NAMES",
    "IGNORED",
    "Advice",
    "ChatEncoder",
    "Conversation",
    "DataReport",
    "DataStats",
    "Document",
    "Duplicates",
    "Encoded",
    "EncodedDataset",
    "Format",
    "Found",
    "Groups",
    "Leakage",
    "Message",
    "Part",
    "PreferencePair",
    "Problem",
    "Reading",
    "Record",
    "Source",
    "SourceRow",
    "Supervision",
    "Survey",
    "advise",
    "check",
    "collate",
    "collate_packed",
    "contamination",
    "duplicate_groups",
    "encode",
    "epoch_order",
    "epoch_rows",
    "find",
    "ignored_names",
    "micro_batches",
    "pack_rows",
    "padded",
    "pass_tokens",
    "pass_width",
    "preview",
    "read",
    "require_supervised",
    "resolve",
    "resolve_evaluation",
    "shard_rows",
    "split",
    "summarise",
    "survey",
    "unused_sentence",
    "write_fixed",
]
