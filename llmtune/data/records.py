"""What flows through the data path: rows, problems, conversations, documents and the facts counted about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with one row: where it is, what it is, how to mend it."""

    file: str
    line: int
    field: str | None
    problem: str
    hint: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.field}" if self.field else f"{self.file}:{self.line}"
        return f"{where}: {self.problem}"

    def to_json(self) -> dict[str, Any]:
        """The keys of ``check --json``."""
        return {
            "file": self.file,
            "line": self.line,
            "field": self.field,
            "problem": self.problem,
            "hint": self.hint,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One row as it was read. ``line``: 1-based physical line (jsonl, csv, tsv, txt) or row number (the others)."""

    file: str
    line: int
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages that end with the assistant's, and the tools it was offered."""

    messages: tuple[Message, ...]
    file: str
    line: int
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Plain text, all of it to be learned."""

    text: str
    file: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt (``rejected`` given), or one answer with a verdict (``label`` given)."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    file: str
    line: int
    rejected: tuple[Message, ...] | None = None
    label: bool | None = None


Record = Conversation | Document | PreferencePair


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
    """The nearest-rank percentile of values sorted upwards; 0 where there are none."""
    if len(sorted_values) == 0:
        return 0
    return int(sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))])
