"""Encoded rows in an Arrow file: written once, memory-mapped by every process that reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from llmtune.data.batches import Part, epoch_rows
from llmtune.data.masks import Encoded
from llmtune.data.records import DataStats, Problem, percentile
from llmtune.data.supervision import Supervision

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """What one pass over the data met; written beside the rows.

    Attributes:
        part_rows: Rows of each part of a mix, in order; one number where the data is no mix.
        rows: Rows read, bad ones included.
        bad_rows: Rows with a problem, none of them encoded.
        num_problems: All problems; ``problems`` holds the first of them.
        too_long: Rows left out for their length.
        too_long_at: Where the first of them are.
        longest: Tokens of the longest row, left out or not.
        unused: Names of columns and parts that hold something and are not in the encoded rows.
        supervision: What is learned, counted over the encoded rows.
    """

    part_rows: tuple[int, ...]
    rows: int
    bad_rows: int
    num_problems: int
    problems: tuple[Problem, ...]
    too_long: int
    too_long_at: tuple[str, ...]
    longest: int
    unused: tuple[str, ...]
    supervision: Supervision

    @classmethod
    def from_json(cls, document: dict[str, Any], renamed: Mapping[str, str]) -> TableFacts:
        """The facts that `to_json` gave, with places in the files as they are called now."""

        def now(place: str) -> str:
            file, colon, rest = place.rpartition(":")
            return f"{renamed.get(file, file)}{colon}{rest}"

        problems = (Problem(**problem | {"file": renamed[problem["file"]]}) for problem in document["problems"])
        return cls(
            **{
                **document,
                "part_rows": tuple(document["part_rows"]),
                "problems": tuple(problems),
                "too_long_at": tuple(map(now, document["too_long_at"])),
                "unused": tuple(document["unused"]),
                "supervision": Supervision.from_fields(document["supervision"], now),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRows:
    """Encoded rows as columns, cheap to send between processes. Flat ``input_ids`` and ``supervised``: all tokens."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    num_supervised: NDArray[np.int32]
    lines: NDArray[np.int64]
    digests: NDArray[np.uint64]
    signatures: NDArray[np.uint8]


class EncodedDataset:
    """Rows of token ids and masks, memory-mapped. Made by `encode`; safe to pickle and to fork.

    Attributes:
        facts: What the pass over all of the data met, also where this is a selection of its rows.
        lengths: Tokens of each row, int32 [rows].
        supervised_counts: Supervised tokens of each row, int32 [rows].
        digests: Normalised content of each row, see `content_digest`, uint64 [rows].
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[str],
        *,
        weights: Sequence[float] = (1.0,),
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._path = path
        self._files = tuple(files)
        self._weights = tuple(weights)
        self._rows = rows
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        document = orjson.loads(facts_path(self._path).read_bytes())
        del document["sha256"]
        # The same rows may have been encoded from files of other names.
        renamed = dict(zip(document.pop("files"), self._files, strict=True))
        self.facts = TableFacts.from_json(document, renamed)
        self._mapped = pa.memory_map(str(self._path))
        reader = pa.ipc.open_file(self._mapped)
        self._signature_bytes: int = reader.schema.field("signature").type.byte_width
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._columns = [_Columns(batch) for batch in batches]
        self._starts = np.cumsum([0, *(len(columns.line) for columns in self._columns)])
        every = slice(None) if self._rows is None else self._rows
        self.lengths: NDArray[np.int32] = self._column("lengths", np.int32)[every]
        self.supervised_counts: NDArray[np.int32] = self._column("num_supervised", np.int32)[every]
        self.digests: NDArray[np.uint64] = self._column("digest", np.uint64)[every]

    def _column(self, name: str, kind: Any) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, kind), *(getattr(columns, name) for columns in self._columns)])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "files": self._files, "weights": self._weights, "rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["files"], weights=state["weights"], rows=state["rows"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        columns, row = self._find(index)
        start, end = columns.offsets[row], columns.offsets[row + 1]
        return Encoded(input_ids=columns.input_ids[start:end], supervised=columns.supervised[start:end])

    def location(self, index: int) -> tuple[str, int]:
        """File and line that row ``index`` came from."""
        columns, row = self._find(index)
        return self._files[columns.file[row]], int(columns.line[row])

    @property
    def places(self) -> tuple[tuple[str, ...], NDArray[np.int32], NDArray[np.int64]]:
        """The names of the files, and of each row the number of its file and its line: int32 and int64 [rows]."""
        every = slice(None) if self._rows is None else self._rows
        return self._files, self._column("file", np.int32)[every], self._column("line", np.int64)[every]

    @property
    def signatures(self) -> NDArray[np.uint8]:
        """MinHash of each row, see `signature`, uint8 [rows, bytes]."""
        parts = [np.zeros((0, self._signature_bytes), np.uint8), *(columns.signature for columns in self._columns)]
        signatures: NDArray[np.uint8] = np.concatenate(parts)
        return signatures if self._rows is None else signatures[self._rows]

    @property
    def parts(self) -> tuple[Part, ...]:
        """How many of these rows belong to each part of a mix, and how often an epoch shows them; in order."""
        ends = np.cumsum(self.facts.part_rows)
        if self._rows is None:
            counts = list(self.facts.part_rows)
        else:
            assert bool(np.all(np.diff(self._rows) > 0)) or len(ends) == 1, "rows of a mix stay in its order"
            counts = np.diff(np.searchsorted(self._rows, [0, *ends])).tolist() if len(ends) > 1 else [len(self)]
        return tuple(Part(num_rows=n, weight=w) for n, w in zip(counts, self._weights, strict=True))

    @property
    def rows_per_epoch(self) -> int:
        """Rows that one epoch shows: all of them once, unless parts of a mix have other weights."""
        return epoch_rows(self.parts)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> EncodedDataset:
        """The rows at ``indices``, in that order, without copying them."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = chosen if self._rows is None else self._rows[chosen]
        return EncodedDataset(self._path, self._files, weights=self._weights, rows=rows)

    @property
    def stats(self) -> DataStats:
        """What one epoch shows, and length percentiles of the rows; of a selection, dropped and skipped count 0."""
        ordered = np.sort(self.lengths)
        whole = self._rows is None
        weight = np.repeat([part.weight for part in self.parts], [part.num_rows for part in self.parts])
        return DataStats(
            rows=self.rows_per_epoch,
            tokens=round(float(self.lengths @ weight)),
            supervised_tokens=round(float(self.supervised_counts @ weight)),
            length_p50=percentile(ordered, 0.50),
            length_p95=percentile(ordered, 0.95),
            length_p99=percentile(ordered, 0.99),
            length_max=int(ordered[-1]) if len(ordered) else 0,
            dropped_too_long=self.facts.too_long if whole else 0,
            skipped_bad=self.facts.bad_rows if whole else 0,
        )

    def _find(self, index: int) -> tuple[_Columns, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = int(index) % len(self)
        row = index if self._rows is None else int(self._rows[index])
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._columns[batch], row - int(self._starts[batch])


class _Columns:
    """Numpy views (no copies) of one record batch."""

    def __init__(self, batch: Any) -> None:
        ids, mask, signature = batch.column("input_ids"), batch.column("supervised"), batch.column("signature")
        self.offsets: NDArray[np.int32] = _numbers(ids.offsets, np.int32)
        self.lengths: NDArray[np.int32] = np.diff(self.offsets)
        self.input_ids: NDArray[np.int32] = _numbers(ids.values, np.int32)
        self.supervised: NDArray[np.bool_] = _numbers(mask.values, np.bool_)
        self.num_supervised: NDArray[np.int32] = _numbers(batch.column("num_supervised"), np.int32)
        self.file: NDArray[np.int32] = _numbers(batch.column("file"), np.int32)
        self.line: NDArray[np.int64] = _numbers(batch.column("line"), np.int64)
        self.digest: NDArray[np.uint64] = _numbers(batch.column("digest"), np.uint64)
        flat: NDArray[np.uint8] = np.frombuffer(signature.buffers()[1], np.uint8)
        self.signature = flat.reshape(-1, signature.type.byte_width)[: batch.num_rows]


class EncodedWriter:
    """Writes encoded rows to ``path``, which appears, complete, when `commit` is called.

    Args:
        path: The Arrow file.
        signature_bytes: Width of every row's signature.
    """

    def __init__(self, path: Path, signature_bytes: int) -> None:
        import pyarrow as pa

        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._schema = pa.schema(
            {
                "input_ids": pa.list_(pa.int32()),
                "supervised": pa.list_(pa.uint8()),
                "num_supervised": pa.int32(),
                "file": pa.int32(),
                "line": pa.int64(),
                "digest": pa.uint64(),
                "signature": pa.binary(signature_bytes),
            }
        )
        self._writer = pa.ipc.new_file(str(self._temporary), self._schema)

    def add(self, rows: EncodedRows, file: int) -> None:
        """Rows that came from one file."""
        import pyarrow as pa

        count = len(rows.lengths)
        if count == 0:
            return
        offsets = _column(np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32))
        signature = self._schema.field("signature").type
        columns = [
            pa.ListArray.from_arrays(offsets, _column(rows.input_ids)),
            pa.ListArray.from_arrays(offsets, _column(rows.supervised.view(np.uint8))),
            _column(rows.num_supervised),
            _column(np.full(count, file, np.int32)),
            _column(rows.lines),
            _column(rows.digests),
            pa.FixedSizeBinaryArray.from_buffers(signature, count, [None, pa.py_buffer(rows.signatures.tobytes())]),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def commit(self, facts: TableFacts, files: Sequence[str]) -> None:
        """Make the rows visible under their name, with the digest by which `is_intact` knows them."""
        self._writer.close()
        document = {"sha256": _digest(self._temporary), "files": list(files), **facts.to_json()}
        os.replace(self._temporary, self._path)
        temporary = self._temporary.with_suffix(".facts")
        temporary.write_bytes(orjson.dumps(document))
        os.replace(temporary, facts_path(self._path))

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


# Both ways without a copy. Arrow's own ``pa.array`` and ``to_numpy`` import pandas first: half a second.


def _numbers(column: Any, kind: Any) -> NDArray[Any]:
    """Numpy's view of an Arrow column of numbers, none of them null."""
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _column(numbers: NDArray[Any]) -> Any:
    """Arrow's view of a numpy array of numbers."""
    import pyarrow as pa

    numbers = np.ascontiguousarray(numbers)
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def facts_path(path: Path) -> Path:
    """The file beside the rows that says what they are; written last."""
    return path.with_suffix(".json")


def is_intact(path: Path) -> bool:
    """Whether ``path`` was written completely and has not changed since."""
    try:
        expected = orjson.loads(facts_path(path).read_bytes())["sha256"]
        return bool(expected == _digest(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
