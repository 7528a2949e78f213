"""Look at every row before anything is trained: what it is, what is wrong with it, how much of it there is."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from llmtune.data.encode import OnBadRow, encode_stream
from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.reading import Reading, bad_rows_error, read
from llmtune.data.records import Conversation, Document, Problem, Record, SourceRow, percentile
from llmtune.data.source import resolve
from llmtune.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What would be learned, counted over all good rows with the model's tokenizer. Lengths in tokens."""

    tokens: int
    supervised_tokens: int
    length_p50: int
    length_p95: int
    length_max: int
    stop_token_supervised: bool
    rows_without_supervision: int
    rows_too_long: int
    rows_truncated: int = 0

    def to_json(self) -> dict[str, Any]:
        """The ``supervision`` object of ``check --json``."""
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        counted = {name: getattr(self, name) for name in self.__slots__ if name not in ("tokens", "supervised_tokens")}
        return counted | {"supervised_share": share}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """Everything `check` found. ``rows`` counts all rows, ``bad_rows`` those with a problem."""

    format: str
    reason: str
    rows: int
    bad_rows: int
    bytes: int
    problems: tuple[Problem, ...]
    statistics: Mapping[str, Any]
    supervision: Supervision | None = None

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.problems

    def raise_if_bad(self, on_bad_row: OnBadRow = "error") -> None:
        """Raise unless the data can be used under this policy.

        Raises:
            DataError: There are bad rows and they are not to be skipped, or no row is good.
        """
        if self.problems and (on_bad_row == "error" or self.bad_rows == self.rows):
            raise bad_rows_error(self.problems, total=len(self.problems), affected=self.bad_rows, rows=self.rows)

    def to_json(self) -> dict[str, Any]:
        """The document of ``check --json`` and of ``data_report.json``."""
        document: dict[str, Any] = {
            "format": self.format,
            "reason": self.reason,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "bytes": self.bytes,
            "problems": [problem.to_json() for problem in self.problems],
            "statistics": dict(self.statistics),
        }
        if self.supervision is not None:
            document["tokens"] = self.supervision.tokens
            document["supervised_tokens"] = self.supervision.supervised_tokens
            document["supervision"] = self.supervision.to_json()
        return document


def check(
    data: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    template: str | None = None,
    max_length: int | None = None,
) -> DataReport:
    """Read every row and report every problem; with a tokenizer also encode every row and prove its mask.

    Args:
        data: Anything `resolve` takes.
        format: See `read`.
        columns: See `read`.
        tokenizer: A fast tokenizer of transformers, or None to look at the text alone.
        template: Jinja text of the chat template; the tokenizer's own when None.
        max_length: Longest row in tokens, to count longer ones.

    Raises:
        DataError: Nothing can be read or recognised at all.
        ConfigError: An unknown format or field, no chat template.
    """
    reading = read(data, format=format, columns=columns)
    text = _TextTally()
    problems: list[Problem] = []
    tokens = None
    records = _counted(reading, text, problems)
    if tokenizer is not None and reading.format.trainable:
        encoder = ChatEncoder(tokenizer, template)
        tokens = _TokenTally(stop_ids=encoder.stop_ids)
        for record, result in encode_stream(records, encoder):
            if isinstance(record, (Conversation, Document)):
                if isinstance(result, Encoded):
                    tokens.add(record, result, max_length)
                else:
                    text.bad_rows += 1
                    problems += result
    else:
        for _ in records:
            pass
    order = {label: number for number, label in enumerate(reading.source.labels)}
    problems.sort(key=lambda problem: (order[problem.file], problem.line))
    return DataReport(
        format=reading.format.name,
        reason=reading.reason,
        rows=text.rows,
        bad_rows=text.bad_rows,
        bytes=reading.source.num_bytes,
        problems=tuple(problems),
        statistics=text.statistics(),
        supervision=tokens.supervision() if tokens is not None else None,
    )


def _counted(reading: Reading, text: _TextTally, problems: list[Problem]) -> Iterator[Record | list[Problem]]:
    for item in reading:
        text.rows += 1
        if isinstance(item, list):
            text.bad_rows += 1
            problems += item
        else:
            text.add(item)
            yield item


@dataclass(slots=True)
class _TextTally:
    """Counts over text; one machine integer per row."""

    rows: int = 0
    bad_rows: int = 0
    chars: array[int] = field(default_factory=lambda: array("q"))
    answer_chars: array[int] = field(default_factory=lambda: array("q"))
    turns: array[int] = field(default_factory=lambda: array("q"))
    roles: Counter[str] = field(default_factory=Counter)
    with_system: int = 0
    with_tools: int = 0

    def add(self, record: Record) -> None:
        if isinstance(record, Document):
            self.chars.append(len(record.text))
            return
        if isinstance(record, Conversation):
            messages = record.messages
            self.with_tools += record.tools is not None or any(message.tool_calls for message in messages)
        else:
            messages = (*record.prompt, *record.chosen)
        self.chars.append(sum(len(message.content) for message in messages))
        self.answer_chars.append(sum(len(message.content) for message in messages if message.role == "assistant"))
        self.turns.append(sum(message.role == "assistant" for message in messages))
        self.roles.update(message.role for message in messages)
        self.with_system += messages[0].role in ("system", "developer")

    def statistics(self) -> dict[str, Any]:
        statistics: dict[str, Any] = {"good_rows": self.rows - self.bad_rows, "chars": _spread(self.chars)}
        if self.turns:
            statistics |= {
                "answer_chars": _spread(self.answer_chars),
                "turns": _spread(self.turns),
                "roles": dict(sorted(self.roles.items())),
                "rows_with_system": self.with_system,
                "rows_with_tools": self.with_tools,
            }
        return statistics


@dataclass(slots=True, kw_only=True)
class _TokenTally:
    """Counts over tokens."""

    stop_ids: frozenset[int]
    lengths: array[int] = field(default_factory=lambda: array("q"))
    supervised: int = 0
    without: int = 0
    stopped: int = 0
    too_long: int = 0

    def add(self, record: Conversation | Document, encoded: Encoded, max_length: int | None) -> None:
        learned = encoded.input_ids[encoded.supervised]
        self.lengths.append(len(encoded.input_ids))
        self.supervised += len(learned)
        self.without += len(learned) == 0
        self.stopped += len(learned) > 0 and int(learned[-1]) in self.stop_ids
        self.too_long += max_length is not None and len(encoded.input_ids) > max_length

    def supervision(self) -> Supervision:
        spread = _spread(self.lengths)
        return Supervision(
            tokens=sum(self.lengths),
            supervised_tokens=self.supervised,
            length_p50=spread["p50"],
            length_p95=spread["p95"],
            length_max=spread["max"],
            stop_token_supervised=len(self.lengths) > 0 and self.stopped == len(self.lengths),
            rows_without_supervision=self.without,
            rows_too_long=self.too_long,
        )


def _spread(values: array[int]) -> dict[str, int]:
    ordered = np.sort(np.frombuffer(values, dtype=np.int64)) if values else np.zeros(0, np.int64)
    return {
        "total": int(ordered.sum()),
        "p50": percentile(ordered, 0.50),
        "p95": percentile(ordered, 0.95),
        "max": int(ordered[-1]) if len(ordered) else 0,
    }


def write_fixed(
    data: Any,
    out: str | Path,
    *,
    report: DataReport | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Write the good rows to ``out`` (jsonl) and the others, with the reasons, to ``STEM.quarantine.jsonl`` beside it.

    Args:
        data: Anything `resolve` takes.
        out: A new ``.jsonl`` file.
        report: What `check` said about the same data; checked anew when None.
        format: See `read`.
        columns: See `read`.

    Returns:
        The numbers of good and of quarantined rows.

    Raises:
        ConfigError: ``out`` is no ``.jsonl`` file, or one of the files that are read.
    """
    source = resolve(data)
    out = Path(out)
    if out.suffix != ".jsonl" or out.resolve() in {file.resolve() for file in source.files}:
        raise ConfigError("--fix", [f"got {str(out)!r}, expected the name of a new .jsonl file"])
    report = report or check(source, format=format, columns=columns)
    reasons: dict[tuple[str, int], list[Problem]] = {}
    for problem in report.problems:
        reasons.setdefault((problem.file, problem.line), []).append(problem)
    quarantine = out.with_name(f"{out.stem}.quarantine.jsonl")
    good = bad = 0
    parts = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (out, quarantine)}
    try:
        with open(parts[out], "wb") as kept, open(parts[quarantine], "wb") as rejected:
            for row in source:
                found = reasons.get((row.file, row.line))
                if isinstance(row, SourceRow) and found is None:
                    good += 1
                    _write_line(kept, row.value)
                else:
                    bad += 1
                    problems = found or ([row] if isinstance(row, Problem) else [])
                    _write_line(rejected, _quarantined(row, problems))
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return good, bad


def _quarantined(row: SourceRow | Problem, problems: list[Problem]) -> dict[str, Any]:
    return {
        "file": row.file,
        "line": row.line,
        "problems": [
            {"field": problem.field, "problem": problem.problem, "hint": problem.hint} for problem in problems
        ],
        "row": row.value if isinstance(row, SourceRow) else None,
    }


def _write_line(file: BinaryIO, value: Any) -> None:
    file.write(orjson.dumps(value, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS))
