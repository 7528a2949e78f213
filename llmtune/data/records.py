"""What flows through the data path: rows, problems, conversations, documents and the facts counted about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as field_
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of one file that can be read alone, cheap to send to another process.

    ``start`` and ``end`` (exclusive, -1: to the end) count bytes (jsonl, txt), row groups (parquet), record batches
    (arrow) or rows (memory); the other containers are one chunk per file. ``file``: index into `Source.files`.
    ``first_line``: number of the first line or row in it, from 1.
    """

    file: int
    start: int
    end: int
    first_line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with one row: where it is, what it is, how to mend it.

    ``line``: 1-based physical line (jsonl, csv, tsv, txt) or row number in the file (the others).
    ``row_group``: number of the row group, from 0, for Parquet. ``span``: the bytes of the file that could not be
    parsed, where it is that.
    """

    file: str
    line: int
    field: str | None
    problem: str
    hint: str
    row_group: int | None = None
    span: tuple[int, int] | None = field_(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        separator = ":" if self.row_group is None else ", "
        return f"{self.place}{f'{separator}{self.field}' if self.field else ''}: {self.problem}"

    @property
    def place(self) -> str:
        """File and line, or row group and row."""
        if self.row_group is None:
            return f"{self.file}:{self.line}"
        return f"{self.file}: row group {self.row_group:,}, row {self.line:,}"

    def to_json(self) -> dict[str, Any]:
        """The keys of ``check --json``; ``row_group`` only where there is one."""
        document = {
            "file": self.file,
            "line": self.line,
            "field": self.field,
            "problem": self.problem,
            "hint": self.hint,
        }
        return document if self.row_group is None else document | {"row_group": self.row_group}


# Rows, messages and conversations are made by the million: frozen, each would take more than twice as long to make.


@dataclass(slots=True, kw_only=True)
class SourceRow:
    """One row as it was read. ``line``, ``row_group``: see `Problem`.

    ``raw``: the bytes it was parsed from, where it was JSON. ``clean``: those bytes rule out control characters.
    """

    file: str
    line: int
    value: Mapping[str, Any]
    raw: bytes | None = None
    row_group: int | None = None
    clean: bool = False


@dataclass(slots=True, kw_only=True)
class Message:
    """One turn. ``extra`` holds further keys that a template may read (``reasoning_content``, ``tool_call_id``).

    ``supervised``: whether an assistant's turn is learned; turns of a given prompt and of weight 0 are not.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    name: str | None = None
    extra: Mapping[str, Any] | None = None
    supervised: bool = True

    def to_template(self) -> dict[str, Any]:
        """The dictionary that a chat template reads."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls is not None:
            message["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            message["name"] = self.name
        if self.extra:
            message.update(self.extra)
        return message


@dataclass(slots=True, kw_only=True)
class Conversation:
    """Messages that end with the assistant's, and the tools it was offered.

    ``unused``: names of columns and parts that hold something and are not read. ``extra_keys``: names of message keys
    that only some chat templates read.
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] | None = None
    unused: tuple[str, ...] = ()
    extra_keys: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Document:
    """Plain text, all of it to be learned. ``unused``, ``extra_keys``: see `Conversation`."""

    text: str
    file: str
    line: int
    unused: tuple[str, ...] = ()
    extra_keys: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt (``rejected`` given), or one answer with a verdict (``label`` given).

    ``unused``, ``extra_keys``: see `Conversation`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    file: str
    line: int
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None
    unused: tuple[str, ...] = ()
    extra_keys: tuple[str, ...] = ()


Record = Conversation | Document | PreferencePair


def record_text(record: Record, *, instructions: bool = True) -> str:
    """All that a record says as one string: of every turn its role, text, tool calls and further keys, one per line.

    Equal records give equal texts, whatever file and line they come from.

    Args:
        record: The row.
        instructions: With system prompts and tools. A long one that many rows share would make them all look alike.
    """
    if isinstance(record, Document):
        return record.text
    parts: list[str] = []
    if isinstance(record, Conversation):
        messages: tuple[Message, ...] = record.messages
        if record.tools is not None and instructions:
            parts.append(_json_text(record.tools))
    else:
        messages = (*record.prompt, *record.chosen, *(record.rejected or ()))
        if record.label is not None:
            parts.append(str(record.label))
    for message in messages:
        if not instructions and message.role in ("system", "developer"):
            continue
        parts.append(message.role)
        parts.append(message.content)
        if message.tool_calls is not None:
            parts.append(_json_text(message.tool_calls))
        if message.extra is not None:
            parts += [_json_text(value) for key, value in message.extra.items() if key != "tool_call_id"]
    return "\n".join(parts)


def _json_text(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)  # orjson refuses integers beyond 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class DataStats:
    """What the planner knows about a data set; lengths in tokens per row.

    ``estimated``: counted in bytes and divided by the model's bytes per token, no tokenizer was at hand.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    length_p50: int
    length_p95: int
    length_p99: int
    length_max: int
    dropped_too_long: int = 0
    skipped_bad: int = 0
    estimated: bool = False

    @property
    def supervised_share(self) -> float:
        """Supervised tokens by all tokens, 0 to 1."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields and ``supervised_share``."""
        return {name: getattr(self, name) for name in self.__slots__} | {"supervised_share": self.supervised_share}


def percentile(sorted_values: Any, share: float) -> int:
    """The nearest-rank percentile of counts sorted upwards; 0 where there are none."""
    return int(nearest_rank(sorted_values, share))


def nearest_rank(sorted_values: Any, share: float) -> float:
    """The nearest-rank percentile of values sorted upwards; 0 where there are none."""
    if len(sorted_values) == 0:
        return 0.0
    return float(sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))])
