"""The files that a path, glob or directory names, and how to read them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.data.converted import as_utf8, unpacked
from llmtune.data.encodings import WINDOWS, Encoding, encoding_of
from llmtune.data.kinds import (
    SUPPORTED,
    TextRows,
    container_of,
    inner_suffix,
    is_compressed,
    is_text,
    kind_of,
)
from llmtune.data.listing import listed, of_saved_data_sets, pattern_of, without_descriptions
from llmtune.data.splits import Layout, layout_of, roles_in
from llmtune.data.tables import DELIMITERS, dialect_of
from llmtune.errors import DataError, nearest

# The text that stands for a file in a Git repository, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
_POINTER, _MOST_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_MOST_SKIPPED = 10  # files that are named
_DEFAULT_DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesFound:
    """What a path names: its files by what they are for, and what to say about them."""

    layout: Layout
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadableFiles:
    """Files of one container. ``labels``: the originals; ``paths``: what to read, copies where they had to be made."""

    container: str
    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    notices: tuple[str, ...]
    warnings: tuple[str, ...]


def files_at(given: str | Path) -> FilesFound:
    """The files of a path, glob or directory.

    Raises:
        DataError: Nothing is there, nothing of it is data, or a folder holds several data sets.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        layout = layout_of(path)
        return FilesFound(layout=layout, notices=_skipped(given, layout.skipped, path))
    if path.exists():
        return FilesFound(layout=Layout(train=(path,)))
    if glob.has_magic(str(path)):
        return _files_of_glob(str(path))
    raise DataError(_missing(path))


def readable(files: Sequence[Path], given: str, text_rows: TextRows) -> ReadableFiles:
    """The files as one container, with copies of those that cannot be read as they are.

    Raises:
        DataError: A file that is not supported, empty or damaged; files of different kinds.
        OutputError: A copy cannot be written.
    """
    unknown = [file for file in files if kind_of(file) is None]
    if unknown:
        raise DataError(_unsupported(unknown[0]))
    kinds = {str(kind_of(file)): _of_kind(files, file) for file in files}
    if len(kinds) > 2 or "text" not in kinds:  # a text file may turn out to be JSON
        _require_one_kind(kinds, given)
    paths, remarks = [], _Remarks()
    for file in files:
        paths.append(_readable(file, remarks))
    empty = [str(file) for file, path in zip(files, paths, strict=True) if path.stat().st_size == 0]
    if empty:
        raise DataError(f"{', '.join(empty)}: the file is empty; expected at least one row.")
    by_container: dict[str, list[Path]] = {}
    for file, path in zip(files, paths, strict=True):
        container = container_of(path, file, text_rows)
        by_container.setdefault(container, []).append(file)
        if kind_of(file) == "text" and container in ("json", "jsonl"):
            remarks.json.setdefault(container, []).append(file)
        elif container in _DEFAULT_DELIMITERS:
            remarks.note_delimiter(file, path, _DEFAULT_DELIMITERS[container])
    _require_one_kind(by_container, given)
    return ReadableFiles(
        container=next(iter(by_container)),
        paths=tuple(paths),
        labels=tuple(map(str, files)),
        notices=remarks.notices(),
        warnings=remarks.warnings(),
    )


@dataclass(slots=True)
class _Remarks:
    """What to say about files: encodings, delimiters, text files that hold JSON."""

    encodings: dict[str, list[tuple[Path, Encoding]]] = field(default_factory=dict)
    delimiters: dict[str, list[Path]] = field(default_factory=dict)
    json: dict[str, list[Path]] = field(default_factory=dict)

    def note_delimiter(self, file: Path, path: Path, default: str) -> None:
        delimiter = dialect_of(path, default).delimiter
        if delimiter != default:
            self.delimiters.setdefault(delimiter, []).append(file)

    def notices(self) -> tuple[str, ...]:
        told = [
            f"{listed(files)}: read with the {DELIMITERS.get(delimiter, repr(delimiter))} as delimiter."
            for delimiter, files in self.delimiters.items()
        ]
        named = {"jsonl": "JSON Lines, because the lines are JSON objects", "json": "a JSON array of objects"}
        told += [f"{listed(files)}: read as {named[kind]}." for kind, files in self.json.items()]
        return tuple(told)

    def warnings(self) -> tuple[str, ...]:
        told = []
        for name, found in self.encodings.items():
            (first, encoding), *more = found
            also = f" (also {listed([file for file, _ in more])})" if more else ""
            title = "Windows-1252" if name == WINDOWS else name.upper()
            told.append(
                f"{first}: read as {title}, because the file is not UTF-8{also}; line {encoding.line:,} reads "
                f"{encoding.guessed_from!r}. If that is wrong, save the file as UTF-8."
            )
        return tuple(told)


def _readable(file: Path, remarks: _Remarks) -> Path:
    kind = kind_of(file)
    assert kind is not None, "files that hold no data were left out before"
    _require_content(file)
    path = unpacked(file) if is_compressed(file) else file
    if not is_text(kind):
        return path
    try:
        # JSON is UTF-8 by definition and is read fast; all other text is looked at as a whole.
        encoding = encoding_of(path, whole=kind not in ("json", "jsonl"))
    except OSError as error:
        raise DataError(f"{file}: cannot be opened ({error.strerror}).") from error
    if encoding is None:
        return path
    if encoding.guessed_from:
        remarks.encodings.setdefault(encoding.name, []).append((file, encoding))
    return as_utf8(path, encoding.name, str(file))


def _require_content(file: Path) -> None:
    """Refuse what `git clone` leaves in the place of a large file where Git LFS is not installed.

    Raises:
        DataError: Names the command that fetches the content.
    """
    if file.stat().st_size > _MOST_POINTER_BYTES:
        return
    try:
        is_pointer = file.read_bytes().startswith(_POINTER)
    except OSError as error:
        raise DataError(f"{file}: cannot be opened ({error.strerror}).") from error
    if is_pointer:
        raise DataError(f"{file}: a pointer of Git LFS, not the data. Fetch the data with `git lfs pull` in the clone.")


def _of_kind(files: Sequence[Path], like: Path) -> list[Path]:
    return [file for file in files if kind_of(file) == kind_of(like)]


def _require_one_kind(kinds: dict[str, list[Path]], given: str) -> None:
    if len(kinds) > 1:
        titles = {"document": "text", "lines": "text"}
        found = ", ".join(f"{titles.get(kind, kind)} ({files[0].name})" for kind, files in sorted(kinds.items()))
        most = max(kinds.values(), key=len)
        raise DataError(
            f"{given}: files of different kinds lie together: {found}. Name one kind, e.g. {pattern_of(most)}."
        )


def _unsupported(file: Path) -> str:
    if is_compressed(file):
        inner = inner_suffix(file)
        if inner in ("", ".tar"):
            said = "an archive of several files; unpack it" if inner else "no extension before it says what it holds"
            return f"{file}: '{file.suffix}' is supported around {SUPPORTED.partition(' (')[0]}: {said}."
        return f"{file}: the extension '{inner}' is not supported; expected {SUPPORTED}."
    return f"{file}: the extension '{file.suffix}' is not supported; expected {SUPPORTED}."


def _files_of_glob(pattern: str) -> FilesFound:
    matched = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    matched = [file for file in matched if file.is_file() and not file.name.startswith(".")]
    if not matched:
        raise DataError(f"{pattern}: no file matches this pattern.{_other_pattern(pattern)}")
    data = of_saved_data_sets([file for file in matched if kind_of(file)])
    if not data:
        raise DataError(_unsupported(matched[0]))
    base = Path(os.path.commonpath([file.parent for file in matched]))
    files, _ = without_descriptions(data, base)
    notices = _skipped(pattern, [file for file in matched if file not in set(files)], base)
    roles = roles_in(files)
    warnings: tuple[str, ...] = ()
    if "train" in roles and len(roles) > 1:
        learned = pattern_of([file for file in files if roles_in([file]) == {"train"}])
        said = f"files of the splits {' and '.join(sorted(roles))} are all read as one"
        warnings = (f"{pattern}: {said}. Name the training files alone: {learned}.",)
    return FilesFound(layout=Layout(train=tuple(files)), notices=notices, warnings=warnings)


def _skipped(given: str | Path, files: Sequence[Path], base: Path) -> tuple[str, ...]:
    return (f"{given}: skipped as no data: {listed(files, base, most=_MOST_SKIPPED)}.",) if files else ()


def _missing(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{path}: no such file; the directory {parent} does not exist either."
    match = nearest(path.name, (sibling.name for sibling in parent.iterdir() if _holds_data(sibling)))
    hint = f" Did you mean '{parent / match}'?" if match else f" Look at what is in {parent.resolve()}."
    return f"{path}: no such file.{hint}"


def _holds_data(path: Path) -> bool:
    """Whether a path, named instead of a wrong one, would be read."""
    try:
        files = layout_of(path).train if path.is_dir() else (path,)
    except DataError:
        return False
    return len({kind_of(file) for file in files} - {None}) == 1 and all(file.stat().st_size for file in files)


def _other_pattern(pattern: str) -> str:
    """A pattern that matches data beside what was looked for."""
    folder = Path(re.split(r"[*?[]", pattern, maxsplit=1)[0] + "*").parent
    if not folder.is_dir():
        return f" The directory {folder} does not exist."
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _holds_data(file)]
    if not files:
        return f" There are no data files in {folder.resolve()}."
    return f" There is data as {pattern_of(_of_kind(files, files[0]))}."
