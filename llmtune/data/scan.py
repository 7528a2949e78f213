"""One pass over the data, chunk by chunk and on several processes: what is wrong, and counts that can be added up."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from llmtune.data.duplicates import content_digest, signature
from llmtune.data.reading import Reading, chunks_of
from llmtune.data.records import Chunk, Problem, record_text
from llmtune.data.statistics import TextTally
from llmtune.data.unread import UnusedTally
from llmtune.data.workers import ordered_map, worker_count

MOST_PROBLEMS = 10_000  # that are kept; all are counted
_MOST_CHUNK_BYTES = 32 << 20
_LEAST_CHUNK_BYTES = 1 << 20
_CHUNKS_PER_PROCESS = 8  # so that all end at about the same time
# Starting workers takes about as long as one process needs for so much.
_LEAST_BYTES = 48 << 20


@dataclass(slots=True, kw_only=True)
class ScanTally:
    """What was met in some chunks; takes a few machine integers for each good row.

    ``digests``, ``signatures``, ``lines``: one for each good row, in order; ``unused``: what no good row is read for;
    ``chunks``: reading, file and number of good rows of each.
    """

    rows: int = 0
    bad_rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    text: TextTally = field(default_factory=TextTally)
    digests: array[int] = field(default_factory=lambda: array("Q"))
    signatures: bytearray = field(default_factory=bytearray)
    lines: array[int] = field(default_factory=lambda: array("I"))
    unused: UnusedTally = field(default_factory=UnusedTally)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)

    def bad(self, problems: list[Problem]) -> None:
        """Count one row that cannot be used."""
        self.bad_rows += 1
        self.num_problems += len(problems)
        self.problems += problems[: MOST_PROBLEMS - len(self.problems)]

    def merge(self, other: ScanTally) -> None:
        """Count what ``other`` has met in the chunks that follow."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.num_problems += other.num_problems
        self.problems += other.problems[: MOST_PROBLEMS - len(self.problems)]
        self.text.merge(other.text)
        self.digests.extend(other.digests)
        self.signatures += other.signatures
        self.lines.extend(other.lines)
        self.unused.merge(other.unused)
        self.chunks += other.chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanner:
    """Scans one chunk of one of the readings; can be sent to other processes where the data is in files.

    ``signatures``: also compute what near duplicates need.
    """

    readings: tuple[Reading, ...]
    signatures: bool = False

    def __call__(self, item: tuple[int, Chunk]) -> ScanTally:
        """What is in a chunk of the reading of that number."""
        number, chunk = item
        tally = ScanTally()
        for record in self.readings[number].read(chunk):
            tally.rows += 1
            if isinstance(record, list):
                tally.bad(record)
                continue
            if record.unused or record.extra_keys:
                tally.unused.add(record.unused, record.extra_keys)
            text = record_text(record)
            digest = content_digest(text)
            tally.text.add(record, digest)
            tally.digests.append(digest)
            tally.lines.append(record.line)
            if self.signatures:
                tally.signatures += signature(record_text(record, instructions=False))
        tally.chunks.append((number, chunk.file, len(tally.lines)))
        return tally


def scan(
    scanner: Scanner,
    *,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
    chunk_bytes: int | None = None,
) -> ScanTally:
    """All chunks in order; the result does not depend on how many processes and chunks there are.

    Args:
        scanner: What to do with a chunk.
        processes: How many share the work; as many as pay off when None.
        progress: Called with the number of rows done so far.
        chunk_bytes: About how much a chunk holds; what suits the data when None.

    Raises:
        DataError: A file as a whole cannot be read.
    """
    in_memory = any(reading.source.in_memory for reading in scanner.readings)
    num_bytes = 0 if in_memory else sum(reading.source.num_bytes for reading in scanner.readings)
    processes = 1 if in_memory else processes or worker_count(num_bytes, least_bytes=_LEAST_BYTES)
    if chunk_bytes is None:
        chunk_bytes = min(max(num_bytes // (processes * _CHUNKS_PER_PROCESS), _LEAST_CHUNK_BYTES), _MOST_CHUNK_BYTES)
    total = ScanTally()
    for tally in ordered_map(scanner, chunks_of(scanner.readings, chunk_bytes), processes=processes):
        total.merge(tally)
        if progress is not None:
            progress(total.rows)
    return total
