"""Find the data: a path, a glob, a directory, a ``datasets.Dataset`` or a list, resolved to files in a fixed order."""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llmtune.data.containers import CONTAINERS, DIVISIBLE
from llmtune.data.records import Chunk, Problem, SourceRow
from llmtune.data.reporter import plain_row
from llmtune.errors import DataError, nearest

EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
}
SUPPORTED = ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, or a directory or glob of one of these"
# Files that lie beside data without being data: read-mes, and the metadata of Dataset.save_to_disk.
_COMPANION_NAMES = {"dataset_info.json", "state.json", "dataset_dict.json"}
_COMPANION_SUFFIXES = {"", ".md", ".lock"}
_ROWS_FILE = "rows"
# What a row in memory is taken for when they are counted out into chunks.
_MEMORY_ROW_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data that exists and can be read: files of one container in order, or rows in memory."""

    name: str
    container: str
    files: tuple[Path, ...] = ()
    rows: Sequence[object] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """What messages call each file; rows in memory are one file called ``rows``."""
        return tuple(str(file) for file in self.files) or (_ROWS_FILE,)

    @property
    def num_bytes(self) -> int:
        """Size of the files, or of the rows written as JSON."""
        if self.rows is None:
            return sum(file.stat().st_size for file in self.files)
        return sum(len(_row_bytes(row)) for row in self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over content and order; file names do not enter."""
        digest = hashlib.sha256(self.container.encode())
        if self.rows is None:
            for file in self.files:
                stat = file.stat()
                digest.update(_file_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        else:
            for row in self.rows:
                digest.update(hashlib.sha256(_row_bytes(row)).digest())
        return digest.hexdigest()

    @property
    def in_memory(self) -> bool:
        """Whether these are rows of this process, which others cannot read."""
        return self.rows is not None

    @property
    def divisible(self) -> bool:
        """Whether its files come in parts of bounded size, which several processes can read."""
        return not self.in_memory and self.container in DIVISIBLE

    def chunks(self, chunk_bytes: int = 8 << 20) -> Iterator[Chunk]:
        """Parts of about ``chunk_bytes`` that can be read alone, found as they are asked for; every row is in one.

        Raises:
            DataError: A file as a whole cannot be read.
        """
        if self.rows is not None:
            step = max(1, chunk_bytes // _MEMORY_ROW_BYTES)
            for start in range(0, len(self.rows), step):
                yield Chunk(file=0, start=start, end=min(start + step, len(self.rows)), first_line=start + 1)
            return
        for number, file in enumerate(self.files):
            for start, end, first_line in CONTAINERS[self.container].parts(file, chunk_bytes):
                yield Chunk(file=number, start=start, end=end, first_line=first_line)

    def read(self, chunk: Chunk) -> Iterator[SourceRow | Problem]:
        """The rows of one chunk in order, in bounded memory; a row that cannot be read comes as its `Problem`.

        Raises:
            DataError: The file as a whole cannot be read.
        """
        if self.rows is None:
            read = CONTAINERS[self.container].read
            return read(self.files[chunk.file], chunk.start, chunk.end, chunk.first_line)
        return _read_memory(self.rows, chunk)

    def __iter__(self) -> Iterator[SourceRow | Problem]:
        """Every row in order, in bounded memory; see `read`."""
        for chunk in self.chunks():
            yield from self.read(chunk)


def _read_memory(rows: Sequence[object], chunk: Chunk) -> Iterator[SourceRow | Problem]:
    for index in range(chunk.start, chunk.end):
        row = rows[index]
        if isinstance(row, Mapping):
            yield SourceRow(file=_ROWS_FILE, line=index + 1, value=plain_row(row))
        else:
            yield Problem(
                file=_ROWS_FILE,
                line=index + 1,
                field=None,
                problem=f"the row is a {type(row).__name__}, expected a dict",
                hint="pass a list of dicts, one per example",
            )


def resolve(data: Any) -> Source:
    """The `Source` behind ``data``: a path, glob or directory (str or Path), a ``datasets.Dataset``, a list of dicts.

    Raises:
        DataError: Nothing is there, a file is empty, containers are mixed, or the kind is not supported.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, Path)):
        return _from_path(data)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset):
        return _from_rows(data)
    if datasets is not None and isinstance(data, datasets.DatasetDict):
        raise DataError(
            f"a DatasetDict with the splits {', '.join(data)} was given, expected one Dataset. "
            f"Pass one split, for instance data[{next(iter(data), 'train')!r}]."
        )
    if isinstance(data, (list, tuple)):
        return _from_rows(data)
    raise DataError(
        f"data of type {type(data).__name__} cannot be read; expected a path, a glob, a directory, "
        "a datasets.Dataset or a list of dicts."
    )


def _from_rows(rows: Sequence[object]) -> Source:
    if len(rows) == 0:
        raise DataError("the data holds no rows; expected at least one example.")
    return Source(name=_ROWS_FILE, container="rows", rows=rows)


def _from_path(given: str | Path) -> Source:
    path = Path(given).expanduser()
    if path.is_dir():
        files = _directory_files(path)
    elif path.exists():
        files = [path]
    elif any(mark in str(given) for mark in "*?["):
        files = _glob_files(str(path))
    else:
        raise DataError(_missing(path))
    kinds: dict[str, Path] = {}
    for file in files:
        kind = EXTENSIONS.get(file.suffix.lower())
        if kind is None:
            raise DataError(f"{file}: the extension '{file.suffix}' is not supported; expected {SUPPORTED}.")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({file.name})" for kind, file in sorted(kinds.items()))
        raise DataError(
            f"{given}: files of different kinds lie together: {found}. Name one kind, e.g. '{path}/*.jsonl'."
        )
    empty = [str(file) for file in files if file.stat().st_size == 0]
    if empty:
        raise DataError(f"{', '.join(empty)}: the file is empty; expected at least one row.")
    name = path.name if path.is_dir() else files[0].stem
    return Source(name=name or path.resolve().name, container=next(iter(kinds)), files=tuple(files))


def _directory_files(directory: Path) -> list[Path]:
    files = [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
        and file.name not in _COMPANION_NAMES
        and file.suffix.lower() not in _COMPANION_SUFFIXES
    ]
    if not files:
        raise DataError(f"{directory}: no data files in this directory; expected {SUPPORTED}.")
    return files


def _glob_files(pattern: str) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise DataError(f"{pattern}: no file matches this pattern.")
    return files


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file; the directory {parent} does not exist either."
    match = nearest(path.name, (sibling.name for sibling in parent.iterdir()))
    hint = f" Did you mean '{parent / match}'?" if match else f" Look at what is in {parent.resolve()}."
    return f"{path}: no such file.{hint}"


def _row_bytes(row: object) -> bytes:
    import orjson

    try:
        return orjson.dumps(row, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # integers beyond 64 bits and lone surrogates
        return repr(row).encode(errors="surrogatepass")


@lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, mtime_ns: int, inode: int) -> bytes:
    # size, time and inode are only here to be part of the cache's key: the content was read once for them.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
