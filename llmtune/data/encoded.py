"""Encoded rows in an Arrow file: written once, memory-mapped by every process that reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from llmtune.data.masks import Encoded
from llmtune.data.records import DataStats, Problem, percentile

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLUSH_TOKENS = 1 << 20


class EncodedDataset:
    """Rows of token ids and masks, memory-mapped. Made by `encode`; safe to pickle and to fork.

    ``problems`` lists the first rows that ``on_bad_row="skip"`` left out.
    """

    def __init__(self, path: Path, files: Sequence[str], *, rows: NDArray[np.int64] | None = None) -> None:
        self._path = path
        self._files = tuple(files)
        self._rows = rows
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        facts = orjson.loads(facts_path(self._path).read_bytes())
        self.dropped_too_long: int = facts["dropped_too_long"]
        self.skipped_bad: int = facts["skipped_bad"]
        self.problems = tuple(Problem(**problem) for problem in facts["problems"])
        self._mapped = pa.memory_map(str(self._path))
        reader = pa.ipc.open_file(self._mapped)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._columns = [_Columns(batch) for batch in batches]
        self._starts = np.cumsum([0, *(len(columns.line) for columns in self._columns)])
        lengths = [np.diff(columns.offsets) for columns in self._columns]
        counts = [columns.num_supervised for columns in self._columns]
        every = slice(None) if self._rows is None else self._rows
        self.lengths: NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *lengths]).astype(np.int32)[every]
        self.supervised_counts: NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *counts])[every]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "files": self._files, "rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["files"], rows=state["rows"])  # type: ignore[misc]

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

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> EncodedDataset:
        """The rows at ``indices``, in that order, without copying them.

        What was dropped or skipped stays an account of the data set as a whole, see `stats`.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        rows = chosen if self._rows is None else self._rows[chosen]
        return EncodedDataset(self._path, self._files, rows=rows)

    @property
    def stats(self) -> DataStats:
        """Counts and length percentiles of these rows; of a selection, dropped and skipped count 0."""
        ordered = np.sort(self.lengths)
        whole = self._rows is None
        return DataStats(
            rows=len(self),
            tokens=int(self.lengths.sum(dtype=np.int64)),
            supervised_tokens=int(self.supervised_counts.sum(dtype=np.int64)),
            length_p50=percentile(ordered, 0.50),
            length_p95=percentile(ordered, 0.95),
            length_p99=percentile(ordered, 0.99),
            length_max=int(ordered[-1]) if len(ordered) else 0,
            dropped_too_long=self.dropped_too_long if whole else 0,
            skipped_bad=self.skipped_bad if whole else 0,
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
        ids, mask = batch.column("input_ids"), batch.column("supervised")
        self.offsets: NDArray[np.int32] = ids.offsets.to_numpy()
        self.input_ids: NDArray[np.int32] = ids.values.to_numpy()
        self.supervised: NDArray[np.bool_] = mask.values.to_numpy().view(np.bool_)
        self.num_supervised: NDArray[np.int32] = batch.column("num_supervised").to_numpy()
        self.file: NDArray[np.int32] = batch.column("file").to_numpy()
        self.line: NDArray[np.int64] = batch.column("line").to_numpy()


class EncodedWriter:
    """Writes encoded rows to ``path``, which appears, complete, when `commit` is called."""

    def __init__(self, path: Path) -> None:
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
            }
        )
        self._writer = pa.ipc.new_file(str(self._temporary), self._schema)
        self._rows: list[tuple[Encoded, int, int]] = []
        self._tokens = 0
        self.num_rows = 0

    def add(self, encoded: Encoded, file: int, line: int) -> None:
        """One row, and where it came from."""
        self._rows.append((encoded, file, line))
        self._tokens += len(encoded.input_ids)
        self.num_rows += 1
        if self._tokens >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        rows = [encoded for encoded, *_ in self._rows]
        offsets = pa.array(np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32))
        ids = pa.array(np.concatenate([row.input_ids for row in rows]))
        mask = pa.array(np.concatenate([row.supervised for row in rows]).view(np.uint8))
        columns = [
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, mask),
            pa.array([int(row.supervised.sum()) for row in rows], pa.int32()),
            pa.array([file for _, file, _ in self._rows], pa.int32()),
            pa.array([line for *_, line in self._rows], pa.int64()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows, self._tokens = [], 0

    def commit(self, *, dropped_too_long: int, skipped_bad: int, problems: Sequence[Problem]) -> None:
        """Make the rows visible under their name, with the digest by which `is_intact` knows them."""
        self._flush()
        self._writer.close()
        facts = {
            "sha256": _digest(self._temporary),
            "dropped_too_long": dropped_too_long,
            "skipped_bad": skipped_bad,
            "problems": [problem.to_json() for problem in problems],
        }
        os.replace(self._temporary, self._path)
        temporary = self._temporary.with_suffix(".facts")
        temporary.write_bytes(orjson.dumps(facts))
        os.replace(temporary, facts_path(self._path))

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


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
