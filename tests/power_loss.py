"""What a power failure leaves of a directory, worked out from the system calls that were made in it.

The strictest reading of POSIX: the content of a file is on disk once that file was synced after its last write, a name
is in a directory once that directory was synced after the change. Two outcomes are drawn for each moment. Either
nothing is on disk that was not forced there, or every name is and content that was not forced there reads as zeros
(which is what ext4 and xfs leave of files whose pages were lost).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
STRINGS = re.compile(r'"((?:[^"\\]|\\.)*)"')
AT = re.compile(r'(?:AT_FDCWD|\d+)<(.*?)>, "((?:[^"\\]|\\.)*)"')
FD = re.compile(r"^\d+<(.*?)>")


@dataclass(eq=False)
class File:
    """One inode that is a file.

    Attributes:
        source: A file with the bytes it has in the end; None where it is gone by then.
        synced: Whether its content is on disk.
        length: Bytes by now of a file that was there before and is only added to; None for all others.
        kept: How many of these are on disk.
    """

    source: Path | None = None
    synced: bool = True
    length: int | None = None
    kept: int = 0

    def content(self, *, lost: bool) -> bytes:
        """What is read after the power failure; ``lost``: only what was forced to disk, else zeros for the rest."""
        final = self.source.read_bytes() if self.source is not None else b""
        length = len(final) if self.length is None else self.length
        kept = length if self.synced else self.kept
        return final[:kept] if lost else final[:kept] + bytes(max(length - kept, 0))


@dataclass(eq=False)
class Folder:
    """One inode that is a directory: its names now, and those that are on disk."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    durable: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """Follows calls below ``root``, which was ``before``.

    Args:
        root: The directory, as it is called in the log.
        before: What it held.
        sources: The bytes in the end, by the number of the file among those that are made.
    """

    def __init__(self, root: Path, before: Path, sources: dict[int, Path] | None = None) -> None:
        self.root, self.top = root, _read(before)
        self.made: list[File] = []
        self._sources = sources or {}
        self._returned = 0

    def follow(self, line: str) -> bool:
        """Take in one call; False where it changes nothing here."""
        match = LINE.match(line)
        if match is None or int(match[3]) < 0 or str(self.root) not in line:
            return False
        act, self._returned = getattr(self, f"_{match[1]}", None), int(match[3])
        return act is not None and act(match[2]) is not False

    # ------------------------------------------------------------------ calls

    def _openat(self, arguments: str) -> bool:
        folder, name = self._at(arguments)
        if folder is None or ("O_CREAT" not in arguments and "O_TRUNC" not in arguments):
            return False
        file = folder.names.get(name)
        if not isinstance(file, File):
            folder.names[name] = File(source=self._sources.get(len(self.made)))
            self.made.append(folder.names[name])
        elif "O_TRUNC" in arguments:
            file.source, file.length, file.kept, file.synced = None, None, 0, False
        return True

    def _write(self, arguments: str) -> bool:
        file = self._opened(arguments)
        if not isinstance(file, File):
            return False
        file.synced = False
        if file.length is not None:
            file.length += self._returned
        return True

    _pwrite64 = _writev = _ftruncate = _fallocate = _copy_file_range = _sendfile = _write

    def _fsync(self, arguments: str) -> bool:
        found = self._opened(arguments)
        if isinstance(found, File):
            found.synced, found.kept = True, found.length or 0
        elif found is not None:
            found.durable = dict(found.names)
        return found is not None

    def _mkdir(self, arguments: str) -> None:
        folder, name = self._split(STRINGS.findall(arguments)[0])
        if folder is not None:
            folder.names[name] = Folder()

    def _rename(self, arguments: str) -> None:
        old, new = STRINGS.findall(arguments)[:2]
        (source, before), (target, after) = self._split(old), self._split(new)
        if source is not None and target is not None:
            target.names[after] = source.names.pop(before)

    _renameat2 = _renameat = _rename

    def _link(self, arguments: str) -> None:
        paths = STRINGS.findall(arguments)
        (source, before), (target, after) = self._split(paths[0]), self._split(paths[1])
        if source is not None and target is not None:
            target.names[after] = source.names[before]

    _linkat = _link

    def _unlink(self, arguments: str) -> None:
        folder, name = self._split(STRINGS.findall(arguments)[0])
        if folder is not None:
            folder.names.pop(name, None)

    _rmdir = _unlink

    def _unlinkat(self, arguments: str) -> None:
        folder, name = self._at(arguments)
        if folder is not None:
            folder.names.pop(name, None)

    # ------------------------------------------------------------------ paths

    def _at(self, arguments: str) -> tuple[Folder | None, str]:
        match = AT.search(arguments)
        if match is None:
            return None, ""
        return self._split(match[2] if match[2].startswith("/") else f"{match[1]}/{match[2]}")

    def _opened(self, arguments: str) -> File | Folder | None:
        match = FD.match(arguments)
        if match is None:
            return None
        if match[1] == str(self.root):
            return self.top
        folder, name = self._split(match[1])
        return None if folder is None else folder.names.get(name)

    def _split(self, path: str) -> tuple[Folder | None, str]:
        if not path.startswith(f"{self.root}/"):
            return None, ""
        *folders, name = Path(path).relative_to(self.root).parts
        here: File | Folder | None = self.top
        for part in folders:
            here = here.names.get(part) if isinstance(here, Folder) else None
        return (here if isinstance(here, Folder) else None), name


def crash_states(log: Path, root: Path, *, before: Path, after: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """After each call that changed something below ``root``: what was done, and the two trees it may leave."""
    lines = log.read_text(errors="replace").splitlines()
    first = Disk(root, before)
    for line in lines:
        first.follow(line)
    ends = {file: after / path for path, file in _where(first.top, Path())}
    sources = {number: ends[file] for number, file in enumerate(first.made) if file in ends}
    second = Disk(root, before, sources)
    for path, file in _where(second.top, Path()):
        if path.name == "events.jsonl":  # the one file that is added to
            file.source, file.kept = after / path, (before / path).stat().st_size
            file.length = file.kept
    for line in lines:
        if not second.follow(line):
            continue
        for lost in (True, False):
            if place.exists():
                shutil.rmtree(place)
            _write_tree(second.top, place, lost=lost)
            yield f"{'all that was not synced' if lost else 'content'} lost after {line[:140]}", place


def _where(folder: Folder, path: Path) -> Iterator[tuple[Path, File]]:
    for name, one in folder.names.items():
        if isinstance(one, File):
            yield path / name, one
        else:
            yield from _where(one, path / name)


def _read(directory: Path) -> Folder:
    folder = Folder()
    for path in sorted(directory.iterdir()):
        folder.names[path.name] = _read(path) if path.is_dir() else File(source=path)
    folder.durable = dict(folder.names)
    return folder


def _write_tree(folder: Folder, place: Path, *, lost: bool) -> None:
    place.mkdir(parents=True)
    for name, one in (folder.durable if lost else folder.names).items():
        if isinstance(one, Folder):
            _write_tree(one, place / name, lost=lost)
        else:
            (place / name).write_bytes(one.content(lost=lost))
