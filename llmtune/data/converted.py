"""Readable copies of compressed files and of text that is not UTF-8.

A copy lies in the cache folder under the digest of the original's content, so that it is made once. It appears whole or
not at all. Everything that reads data (chunks, worker processes, the quarantine) works on the copy.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from llmtune.errors import DataError, OutputError
from llmtune.units import format_bytes

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_BLOCK_BYTES = 1 << 20
# A copy leaves so much of the disk free, or this share of a small disk.
_RESERVE_BYTES, _RESERVE_SHARE = 256 << 20, 0.02


def unpacked(path: Path) -> Path:
    """A copy of what the compressed file holds; made now if it is not in the cache folder.

    Raises:
        DataError: The archive is damaged or cut off.
        OutputError: The disk has no room for the copy, or the cache folder cannot be written.
    """
    method = COMPRESSIONS[path.suffix.lower()]

    def blocks() -> Iterator[bytes]:
        try:
            with _decompressor(path, method) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    yield block
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
            raise DataError(
                f"{path}: the {method} archive is damaged or cut off ({error}). Write or download it again."
            ) from error

    return _copy(path, "unpacked", blocks)


def as_utf8(path: Path, encoding: str, name: str) -> Path:
    """A copy of a text file in UTF-8; made now if it is not in the cache folder.

    Args:
        path: The file.
        encoding: Its encoding, as Python names it.
        name: What messages call the file.

    Raises:
        DataError: The file holds bytes that are not of this encoding.
        OutputError: See `unpacked`.
    """

    def blocks() -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with open(path, "rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    yield decoder.decode(block).encode()
                yield decoder.decode(b"", final=True).encode()
        except UnicodeError as error:
            raise DataError(f"{name}: damaged {encoding.upper()} text ({error}). Save the file as UTF-8.") from error

    return _copy(path, encoding, blocks)


def _decompressor(path: Path, method: str) -> IO[bytes]:
    if method == "gzip":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if method == "bzip2":
        return cast("IO[bytes]", bz2.open(path, "rb"))
    if method == "xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    return cast("IO[bytes]", _zstd(path))


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


def _copy(path: Path, what: str, blocks: Callable[[], Iterator[bytes]]) -> Path:
    from filelock import FileLock

    from llmtune.config import cache_dir

    stat = path.stat()
    digest = file_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino).hex()
    folder = cache_dir() / "converted"
    copy = folder / f"{digest}.{what}"
    if copy.exists():
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.exists():
                _write(copy, blocks(), path)
    except OSError as error:
        raise OutputError(_no_room(path, folder, error.strerror or str(error))) from error
    return copy


def _write(copy: Path, blocks: Iterator[bytes], original: Path) -> None:
    staged = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "wb") as file:
            for block in blocks:
                usage = shutil.disk_usage(copy.parent)
                if usage.free - len(block) < min(_RESERVE_BYTES, int(usage.total * _RESERVE_SHARE)):
                    raise OSError(errno.ENOSPC, f"{format_bytes(file.tell())} were written, and the disk is full")
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, copy)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def _no_room(original: Path, folder: Path, reason: str) -> str:
    return (
        f"{original}: its readable copy cannot be written to {folder}: {reason}. Free room there, or set LLMTUNE_CACHE "
        "to a folder on another disk."
    )


@lru_cache(maxsize=1 << 17)
def file_digest(path: str, size: int, mtime_ns: int, inode: int) -> bytes:
    """SHA-256 of a file's content; the other arguments are its facts of now, and make the key of the cache."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
