"""What is known of the rows before there is a tokenizer: sizes of every row, and how varied the text is.

One pass over the data; what came out is kept, so that planning on the same files again reads none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import orjson

from llmtune.data.batches import Part, epoch_rows
from llmtune.data.duplicates import content_digest
from llmtune.data.reading import Reading, chunks_of, require_trainable
from llmtune.data.records import Chunk, Conversation, DataStats, Document, Record, percentile, record_text
from llmtune.data.statistics import TextTally
from llmtune.data.unread import UnusedTally
from llmtune.data.workers import ordered_map, worker_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Part of the name of what is kept: raise it when the same rows would give other numbers.
_VERSION = 2
# <|im_start|>, role, newline, <|im_end|>, newline: what ChatML, the most common template, adds to a message.
_TEMPLATE_TOKENS_PER_MESSAGE = 5
_CHUNK_BYTES = 8 << 20
_LEAST_BYTES = 48 << 20  # starting workers takes about as long as one process needs for so much
_COLUMNS = ("text_bytes", "fixed_tokens", "learned_bytes", "learned_fixed_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Sizes of the good rows of a data set, one entry a row, in order.

    Attributes:
        text_bytes: UTF-8 bytes of all that is written in a row, tool calls and tools as JSON, uint32 [rows].
        fixed_tokens: Tokens that are there whatever is written, uint32 [rows].
        learned_bytes: Of ``text_bytes``, those of the answers, uint32 [rows].
        learned_fixed_tokens: Of ``fixed_tokens``, those that end an answer, uint32 [rows].
        parts: Rows and weight of each part of the mix.
        bad_rows: Rows that cannot be used.
        unused: Names of columns and parts that hold something and are not read.
        complexity: The score of `llmtune.data.statistics`, 0 to 1.
    """

    text_bytes: NDArray[np.uint32]
    fixed_tokens: NDArray[np.uint32]
    learned_bytes: NDArray[np.uint32]
    learned_fixed_tokens: NDArray[np.uint32]
    parts: tuple[Part, ...]
    bad_rows: int
    unused: tuple[str, ...]
    complexity: float

    def stats(self, *, bytes_per_token: float, max_length: int | None = None) -> DataStats:
        """Token counts of one epoch for a tokenizer with so many bytes per token; rows above ``max_length`` dropped."""
        lengths = _tokens(self.text_bytes, self.fixed_tokens, bytes_per_token)
        learned = _tokens(self.learned_bytes, self.learned_fixed_tokens, bytes_per_token)
        kept = lengths <= (np.iinfo(np.int64).max if max_length is None else max_length)
        ends = np.cumsum([part.num_rows for part in self.parts])[:-1]
        by_part = list(zip(*(np.split(each, ends) for each in (lengths, learned, kept)), strict=True))
        weights = [part.weight for part in self.parts]
        parts = [Part(num_rows=int(k.sum()), weight=w) for (_, _, k), w in zip(by_part, weights, strict=True)]
        ordered = np.sort(lengths[kept])
        return DataStats(
            rows=epoch_rows(parts),
            tokens=round(sum(w * int(n[k].sum()) for (n, _, k), w in zip(by_part, weights, strict=True))),
            supervised_tokens=round(sum(w * int(s[k].sum()) for (_, s, k), w in zip(by_part, weights, strict=True))),
            length_p50=percentile(ordered, 0.50),
            length_p95=percentile(ordered, 0.95),
            length_p99=percentile(ordered, 0.99),
            length_max=int(ordered[-1]) if len(ordered) else 0,
            dropped_too_long=int(len(lengths) - kept.sum()),
            skipped_bad=self.bad_rows,
            estimated=True,
        )


def survey(
    readings: Sequence[Reading], *, cache_dir: Path | None = None, progress: Callable[[int], None] | None = None
) -> Survey:
    """Read every row once, on several processes where that pays off; files seen before are not read again.

    Args:
        readings: The parts of the data.
        cache_dir: Where surveys are kept; None keeps none.
        progress: Called with the number of rows done so far.

    Raises:
        DataError: Data that is not for supervised training, or a file that cannot be read.
    """
    for reading in readings:
        require_trainable(reading)
    in_memory = any(reading.source.in_memory for reading in readings)
    kept = None if in_memory or cache_dir is None else cache_dir / f"{_key(readings)}.npz"
    known = None if kept is None else _load(kept, readings)
    if known is not None:
        return known
    num_bytes = 0 if in_memory else sum(reading.source.num_bytes for reading in readings)
    processes = 1 if in_memory else worker_count(num_bytes, least_bytes=_LEAST_BYTES)
    total = _Tally(parts=[0] * len(readings))
    surveyor = _Surveyor(readings=tuple(readings))
    for tally in ordered_map(surveyor, chunks_of(readings, _CHUNK_BYTES), processes=processes):
        total.merge(tally)
        if progress is not None:
            progress(total.rows)
    made = total.survey(readings)
    if kept is not None:
        _keep(made, kept)
    return made


def _tokens(num_bytes: NDArray[np.uint32], fixed: NDArray[np.uint32], bytes_per_token: float) -> NDArray[np.int64]:
    return np.rint(num_bytes / bytes_per_token).astype(np.int64) + fixed


@dataclass(slots=True, kw_only=True)
class _Tally:
    """Counts over some chunks; ``parts``: good rows of each reading."""

    parts: list[int]
    rows: int = 0
    bad_rows: int = 0
    columns: tuple[array[int], ...] = field(default_factory=lambda: tuple(array("I") for _ in _COLUMNS))
    unused: UnusedTally = field(default_factory=UnusedTally)
    text: TextTally = field(default_factory=TextTally)

    def merge(self, other: _Tally) -> None:
        self.parts = [mine + its for mine, its in zip(self.parts, other.parts, strict=True)]
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        for mine, its in zip(self.columns, other.columns, strict=True):
            mine.extend(its)
        self.unused.merge(other.unused)
        self.text.merge(other.text)

    def survey(self, readings: Sequence[Reading]) -> Survey:
        columns = {name: np.array(column, np.uint32) for name, column in zip(_COLUMNS, self.columns, strict=True)}
        return Survey(
            **columns,
            parts=_parts(self.parts, readings),
            bad_rows=self.bad_rows,
            unused=self.unused.names(),
            complexity=float(self.text.statistics()["complexity"]["score"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surveyor:
    """Looks at one chunk of one of the readings; can be sent to other processes where the data is in files."""

    readings: tuple[Reading, ...]

    def __call__(self, item: tuple[int, Chunk]) -> _Tally:
        number, chunk = item
        tally = _Tally(parts=[0] * len(self.readings))
        for record in self.readings[number].read(chunk):
            tally.rows += 1
            if isinstance(record, list):
                tally.bad_rows += 1
                continue
            tally.parts[number] += 1
            for column, value in zip(tally.columns, _sizes(record), strict=True):
                column.append(value)
            if record.unused or record.extra_keys:
                tally.unused.add(record.unused, record.extra_keys)
            tally.text.add(record, content_digest(record_text(record)))
        return tally


def _sizes(record: Record) -> Iterator[int]:
    """The columns of a `Survey` for one record."""
    if isinstance(record, Document):
        num_bytes = _num_bytes(record.text)
        return iter((num_bytes, 1, num_bytes, 1))
    assert isinstance(record, Conversation), "judgements of answers are refused before they are read"
    written = _num_json_bytes(record.tools)
    learned = answers = 0
    for message in record.messages:
        size = _num_bytes(message.content) + _num_json_bytes(message.tool_calls)
        written += size
        if message.role == "assistant" and message.supervised:
            learned += size
            answers += 1
    return iter((written, _TEMPLATE_TOKENS_PER_MESSAGE * len(record.messages), learned, answers))


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _num_json_bytes(value: Any) -> int:
    return len(orjson.dumps(value, default=str)) if value else 0


def _parts(rows: Sequence[int], readings: Sequence[Reading]) -> tuple[Part, ...]:
    return tuple(
        Part(num_rows=int(count), weight=reading.weight) for count, reading in zip(rows, readings, strict=True)
    )


def _key(readings: Sequence[Reading]) -> str:
    digest = hashlib.sha256(f"survey {_VERSION}".encode())
    for reading in readings:
        meant: list[Any] = [reading.source.fingerprint, reading.format.title, list(reading.format.required)]
        meant += [reading.forced, sorted(reading.columns.items()), sorted(reading.ignored)]
        digest.update(orjson.dumps([*meant, sorted(reading.texts)]))
    return digest.hexdigest()


def _keep(made: Survey, path: Path) -> None:
    """Write it beside its place and move it there; where that is not possible nothing is kept and nothing lost."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    columns: dict[str, Any] = {name: getattr(made, name) for name in _COLUMNS}
    columns |= {"rows": [part.num_rows for part in made.parts], "bad": made.bad_rows, "complexity": made.complexity}
    columns["unused"] = np.array(made.unused, dtype=np.str_)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            np.savez(file, **columns)
        staged.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink()


def _load(path: Path, readings: Sequence[Reading]) -> Survey | None:
    """What was kept, unless there is nothing or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            columns = {name: kept[name] for name in _COLUMNS}
            rows, bad, complexity = kept["rows"].tolist(), int(kept["bad"]), float(kept["complexity"])
            unused = tuple(kept["unused"].tolist())
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return Survey(**columns, parts=_parts(rows, readings), bad_rows=bad, unused=unused, complexity=complexity)
