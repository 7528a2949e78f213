"""What survives a power failure: files and directories forced to disk, in an order that a crash cannot undo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Force one file or directory to disk.

    Raises:
        OSError: As the system says. What the file holds on disk is unknown then, so write it anew elsewhere.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(path: Path) -> None:
    """Have a file that is on disk read from there again, where the system knows how."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Force everything below ``root`` to disk, each directory after what is in it."""
    files, directories = tree(root)
    for path in [*files, *reversed(directories)]:
        sync(path)


def tree(root: Path) -> tuple[list[Path], list[Path]]:
    """Regular files below ``root``, and its directories from the top; symbolic links are neither."""
    files, directories = [], []
    for folder, _, names in os.walk(root):
        directories.append(Path(folder))
        files += [path for name in sorted(names) if not (path := Path(folder, name)).is_symlink()]
    return files, directories


def write(path: Path, content: bytes) -> None:
    """Write a new file and force it to disk; flushed first, or nothing would be there to force."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """Make ``path``, or what is there already, stay there after a power failure; its parent must exist.

    Raises:
        FileNotFoundError: The parent is gone.
    """
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise
    for folder in _upwards(path.parent):
        sync(folder)


def _upwards(path: Path) -> Iterator[Path]:
    """The run directory and what holds it: they were made by others who may not have synced them."""
    yield path
    yield path.parent


def remove(path: Path) -> None:
    """Delete a file or a whole directory; a symbolic link itself, never what it points to. Gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
