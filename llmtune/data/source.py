"""Find the data: a path, a glob, a directory, a ``datasets.Dataset`` or a list, resolved to files in a fixed order."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.data.containers import CONTAINERS, DIVISIBLE
from llmtune.data.converted import file_digest
from llmtune.data.files import ReadableFiles, files_at, readable
from llmtune.data.kinds import TextRows, stem_of
from llmtune.data.listing import listed
from llmtune.data.records import Chunk, Problem, SourceRow
from llmtune.data.reporter import plain_row
from llmtune.data.splits import Choice, Split, choose, role_of
from llmtune.errors import DataError

_ROWS_FILE = "rows"
# What a row in memory is taken for when they are counted out into chunks.
_MEMORY_ROW_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Data that exists and can be read: files of one container in order, or rows in memory.

    Attributes:
        name: What a run on this data is called after.
        container: A name of `CONTAINERS`, or ``rows``.
        files: What is read; of a compressed file, and of text that is not UTF-8, a readable copy.
        rows: Rows in memory, instead of files.
        labels: What messages call each file: the path of the original. Rows in memory are one file called ``rows``.
        notices: What a person should know about how the data is read; whole sentences.
        warnings: The same where it is likely a mistake.
    """

    name: str
    container: str
    files: tuple[Path, ...] = ()
    rows: Sequence[object] | None = None
    labels: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", tuple(map(str, self.files)) or (_ROWS_FILE,))

    @property
    def all_notices(self) -> tuple[str, ...]:
        """Warnings and notices together."""
        return (*self.warnings, *self.notices)

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
                digest.update(file_digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
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
            for start, end, first_line in CONTAINERS[self.container].parts(file, chunk_bytes, self.labels[number]):
                yield Chunk(file=number, start=start, end=end, first_line=first_line)

    def read(self, chunk: Chunk) -> Iterator[SourceRow | Problem]:
        """The rows of one chunk in order, in bounded memory; a row that cannot be read comes as its `Problem`.

        Raises:
            DataError: The file as a whole cannot be read.
        """
        if self.rows is None:
            read = CONTAINERS[self.container].read
            file, label = self.files[chunk.file], self.labels[chunk.file]
            return read(file, chunk.start, chunk.end, chunk.first_line, label)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Data that was found, with its splits.

    Attributes:
        train: What to learn from.
        evaluation: The split to judge on; None where the data has none.
        split: Its name: ``validation`` or ``test``.
        place: What messages call the data.
        unused: Files or splits that are neither.
        train_names, evaluation_names: Files or splits of ``train`` and ``evaluation``.
    """

    train: Source
    evaluation: Source | None = None
    split: str = ""
    place: str = ""
    unused: tuple[str, ...] = ()
    train_names: tuple[str, ...] = ()
    evaluation_names: tuple[str, ...] = ()

    def notices(self, *, with_evaluation: bool) -> tuple[str, ...]:
        """Say which splits are read; nothing where there is only one.

        Args:
            with_evaluation: ``evaluation`` is used; else it is one of the splits that are not read.
        """
        if self.evaluation is None and not self.unused:
            return ()
        unread = self.unused if with_evaluation else (*self.evaluation_names, *self.unused)
        parts = [f"training data: {_names(self.train_names)}"]
        if with_evaluation and self.evaluation is not None:
            parts.append(f"evaluation data: {_names(self.evaluation_names)} ({self.split} split)")
        if unread:
            parts.append(f"not read: {_names(unread)}")
        return (f"{self.place}: {'; '.join(parts)}.",)


def find(data: Any, *, text_rows: TextRows = "documents") -> Found:
    """The data behind ``data`` with its splits; see `resolve`.

    Raises:
        DataError: See `resolve`.
        OutputError: A readable copy of a file cannot be written.
    """
    if isinstance(data, Source):
        return Found(train=data)
    if isinstance(data, (str, Path)):
        return _found_files(data, text_rows)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.DatasetDict):
        return _found_splits(data)
    if datasets is not None and isinstance(data, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        which = "list(data['train'])" if isinstance(data, datasets.IterableDatasetDict) else "list(data)"
        raise DataError(
            f"a stream of rows ({type(data).__name__}) was given; the data is read more than once. Pass {which}."
        )
    if isinstance(data, (list, tuple)) or (datasets is not None and isinstance(data, datasets.Dataset)):
        return Found(train=_from_rows(data, "the data"))
    raise DataError(
        f"data of type {type(data).__name__} cannot be read; expected a path, a glob, a directory, "
        "a datasets.Dataset or DatasetDict, or a list of dicts."
    )


def resolve(data: Any, *, text_rows: TextRows = "documents") -> Source:
    """The `Source` behind ``data``: the training split where it has splits.

    Args:
        data: A path, glob or directory (str or Path), a ``datasets.Dataset`` or ``DatasetDict``, a list of dicts.
        text_rows: What is a row of a ``.txt`` or ``.md`` file.

    Raises:
        DataError: Nothing is there, a file is empty, containers are mixed, or the kind is not supported.
        OutputError: A readable copy of a file cannot be written.
    """
    found = find(data, text_rows=text_rows)
    return _with_notices(found.train, found.notices(with_evaluation=False))


def resolve_evaluation(data: Any, *, text_rows: TextRows = "documents") -> Source:
    """The `Source` of evaluation data that was named: the validation split, else the test split, else all of it.

    Raises:
        DataError: See `resolve`.
        OutputError: See `resolve`.
    """
    found = find(data, text_rows=text_rows)
    if found.evaluation is None:
        return _with_notices(found.train, found.notices(with_evaluation=False))
    unread = _names((*found.train_names, *found.unused))
    told = (
        f"{found.place}: evaluation data: {_names(found.evaluation_names)} ({found.split} split); not read: {unread}."
    )
    return _with_notices(found.evaluation, (told,))


def _with_notices(source: Source, notices: tuple[str, ...]) -> Source:
    return replace(source, notices=(*notices, *source.notices)) if notices else source


def _found_files(given: str | Path, text_rows: TextRows) -> Found:
    at = files_at(given)
    path = Path(given).expanduser()
    layout = at.layout

    def source(files: Sequence[Path], name: str) -> Source:
        return _from_files(readable(files, str(given), text_rows), name)

    train = source(layout.train, path.name or path.resolve().name if path.is_dir() else stem_of(layout.train[0]))
    train = replace(train, notices=(*at.notices, *train.notices), warnings=(*at.warnings, *train.warnings))
    evaluation = source(layout.evaluation, f"{train.name}-{layout.split}") if layout.evaluation else None
    names = {kind: tuple(listed([file], path) for file in getattr(layout, kind)) for kind in _KINDS_OF_FILES}
    return Found(
        train=train,
        evaluation=evaluation,
        split=layout.split,
        place=str(given),
        unused=names["unused"],
        train_names=names["train"],
        evaluation_names=names["evaluation"],
    )


_KINDS_OF_FILES = ("train", "evaluation", "unused")


def _from_files(files: ReadableFiles, name: str) -> Source:
    return Source(
        name=name,
        container=files.container,
        files=files.paths,
        labels=files.labels,
        notices=files.notices,
        warnings=files.warnings,
    )


def _found_splits(data: Mapping[str, Sequence[object]]) -> Found:
    """The splits of a ``DatasetDict``, chosen as those of its folder."""
    names = tuple(data)
    choice = choose([Split(role=role_of(name), name=name) for name in names])
    learned, judged, unused = _picked(choice, names)
    if len(learned) != 1:
        raise DataError(
            f"a DatasetDict with the splits {', '.join(names) or '(none)'} was given, and its names leave open which "
            f"to learn from. Pass one split, for instance data[{(learned or names or ('train',))[0]!r}]."
        )
    return Found(
        train=_from_rows(data[learned[0]], f"the split {learned[0]!r}"),
        evaluation=_from_rows(data[judged[0]], f"the split {judged[0]!r}") if judged else None,
        split=choice.split,
        place="DatasetDict",
        unused=unused,
        train_names=learned,
        evaluation_names=judged,
    )


def _picked(choice: Choice, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[place] for place in places) for places in (choice.train, choice.evaluation, choice.unused))


def _from_rows(rows: Sequence[object], what: str) -> Source:
    if len(rows) == 0:
        raise DataError(f"{what} holds no rows; expected at least one example.")
    return Source(name=_ROWS_FILE, container="rows", rows=rows)


def _names(names: Sequence[str]) -> str:
    return listed([Path(name) for name in names])


def _row_bytes(row: object) -> bytes:
    import orjson

    try:
        return orjson.dumps(row, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # integers beyond 64 bits and lone surrogates
        return repr(row).encode(errors="surrogatepass")
