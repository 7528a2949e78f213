"""Recognise files that are not UTF-8: UTF-16 and UTF-32 by their first bytes, Windows-1252 by all of them."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# In this order: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WINDOWS = "cp1252"
_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_UTF16_BYTES = 64  # of the beginning of a file, that tell UTF-16 without a mark
_MULTIBYTE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# Bytes beyond ASCII where Western text has them: letters in words, words of one letter, punctuation beside text.
_IN_PLACE = re.compile(
    rb"(?<=[A-Za-z])[\x9a\x9c\x9e\xdf-\xf6\xf8-\xff]"
    rb"|(?<=[A-Z])[\x8a\x8c\x8e\x9f\xc0-\xd6\xd8-\xde]"
    rb"|[\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xd6\xd8-\xf6\xf8-\xff](?=[A-Za-z])"
    rb"|(?<=[ ,;\t\n\"])[\xc0\xc1\xc5\xc8\xc9\xd2\xd3\xd6\xe0\xe1\xe5\xe8\xe9\xf2\xf3\xf6](?= )"
    rb"|(?<=[ -~\r\n])[\x80\x82\x84\x85\x91-\x97\xa0\xa1\xa3\xa7\xa9\xab\xad\xae\xb0\xb4\xb7\xbb\xbf](?=[ -~\r\n])"
)
# And where it never has them: an upper-case letter after a lower-case one, a symbol between two letters.
_MISPLACED = re.compile(rb"(?<=[a-z])[\x8a\x8c\x8e\x9f\xc0-\xd6\xd8-\xde]")
_SYMBOL_IN_WORD = re.compile(
    rb"(?<=[A-Za-z])[\x80\x82-\x84\x86-\x89\x8b\x93\x94\x98\x9b\xa1-\xac\xae-\xb3\xb5\xb6\xb8-\xbf](?=[A-Za-z])"
)
_HIGH = re.compile(rb"[\x80-\xff]")
_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # stand for nothing in Windows-1252
# Of all bytes beyond ASCII: this many must stand where Western text has them, at most so many where it never has them.
_LEAST_IN_PLACE, _MOST_OUT_OF_PLACE = 0.6, 0.02
_MOST_MULTIBYTE = 0.02  # that look like UTF-8 by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """An encoding other than UTF-8, as Python names it.

    ``guessed_from``: the first line that is not ASCII, decoded, and ``line``, its number; empty where a mark says it.
    """

    name: str
    guessed_from: str = ""
    line: int = 0


def encoding_of(path: Path, *, whole: bool) -> Encoding | None:
    """The encoding of a text file; None for UTF-8, and for damage that no encoding explains.

    Args:
        path: The file.
        whole: Look at every byte for Windows-1252, not only where the first MiB is not UTF-8.
    """
    stat = path.stat()
    return _encoding_of(str(path), whole, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=1 << 16)
def _encoding_of(path: str, whole: bool, size: int, mtime_ns: int, inode: int) -> Encoding | None:
    # Size, time and inode only make the key of the cache: the content was read once for them.
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return Encoding(name=name)
    if (unmarked := _unmarked_utf16(head[:_UTF16_BYTES])) is not None:
        return Encoding(name=unmarked, guessed_from=_first_line(head.decode(unmarked, "replace")), line=1)
    if head.startswith(codecs.BOM_UTF8) or not (whole or _is_damaged(head)) or not _is_damaged_file(path, head):
        return None
    return _windows(path)


def _unmarked_utf16(head: bytes) -> str | None:
    """UTF-16 without a mark: text whose every other byte is zero."""
    even, odd = head[::2], head[1::2]
    if len(head) < 4:
        return None
    if not any(odd) and all(even):
        return "utf-16-le"
    return "utf-16-be" if not any(even) and all(odd) else None


def _first_line(text: str) -> str:
    return next(iter(text.split("\n"))).strip()


def _is_damaged(head: bytes) -> bool:
    """Whether bytes are not UTF-8; they may end within a character."""
    if head.isascii():
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return False


def _is_damaged_file(path: str, head: bytes) -> bool:
    if len(head) < _HEAD_BYTES:
        return _is_damaged(head)
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return True
    return False


def _windows(path: str) -> Encoding | None:
    """Windows-1252, where nearly all bytes beyond ASCII stand as in Western text and hardly any make up UTF-8."""
    high = multibyte = in_place = out_of_place = line = 0
    first: tuple[int, bytes] | None = None
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if not block.isascii():
                if _UNDEFINED.search(block):
                    return None
                high += len(_HIGH.findall(block))
                multibyte += len(_MULTIBYTE.findall(block))
                in_place += len(_IN_PLACE.findall(block))
                out_of_place += len(_MISPLACED.findall(block)) + len(_SYMBOL_IN_WORD.findall(block))
                if first is None and (found := _HIGH.search(block)):
                    first = line + block.count(b"\n", 0, found.start()) + 1, _around(block, found.start())
            line += block.count(b"\n")
    if first is None or multibyte > _MOST_MULTIBYTE * high:
        return None
    if in_place < _LEAST_IN_PLACE * high or out_of_place > _MOST_OUT_OF_PLACE * high:
        return None
    return Encoding(name=WINDOWS, guessed_from=first[1].decode(WINDOWS), line=first[0])


def _around(block: bytes, at: int) -> bytes:
    """What a message shows of the line with this byte."""
    start = max(block.rfind(b"\n", 0, at) + 1, at - 20)
    return block[start : at + 20].splitlines()[0].strip()
