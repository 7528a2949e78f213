"""What a file holds, told by its name and, for text, by its beginning."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Literal

import orjson

from llmtune.data.containers import read_json
from llmtune.data.converted import COMPRESSIONS
from llmtune.data.lines import open_utf8
from llmtune.data.records import SourceRow
from llmtune.data.strict_json import MAX_ROW_BYTES

TextRows = Literal["documents", "lines"]

EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
SUPPORTED = (
    ".jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .md (each also as .gz, .zst, .bz2, .xz), "
    "or a directory or glob of one of these"
)
_JSON_LINES = 20  # of a .txt file, half of which must be objects for it to count as JSON Lines


def kind_of(path: Path) -> str | None:
    """The kind of data by the file's extension, below that of a compression; None for a file that holds no data."""
    return EXTENSIONS.get(inner_suffix(path))


def inner_suffix(path: Path) -> str:
    """``.jsonl`` of both ``d.jsonl`` and ``d.JSONL.gz``."""
    inner = Path(path.stem) if is_compressed(path) else path
    return inner.suffix.lower()


def stem_of(path: Path) -> str:
    """``train-00000-of-00002`` of ``train-00000-of-00002.jsonl.gz``."""
    return Path(path.stem).stem if is_compressed(path) else path.stem


def is_compressed(path: Path) -> bool:
    """Whether the extension is one of `COMPRESSIONS`."""
    return path.suffix.lower() in COMPRESSIONS


def is_text(kind: str) -> bool:
    """Whether files of this kind are text, in some encoding."""
    return kind not in ("parquet", "arrow")


def container_of(file: Path, original: Path, text_rows: TextRows) -> str:
    """The container that reads ``file``, the readable copy of ``original``.

    A ``.txt`` file of JSON objects is JSON Lines or a JSON array.
    """
    kind = kind_of(original)
    assert kind is not None, "files that hold no data were left out before"
    if kind != "text":
        return kind
    if inner_suffix(original) == ".txt" and (found := _json_kind(file)) is not None:
        return found
    return "document" if text_rows == "documents" else "lines"


def holds_json(path: Path) -> bool:
    """Whether a text file holds JSON objects; not told of compressed ones, which are not unpacked to look."""
    return not is_compressed(path) and _json_kind(path) is not None


def _json_kind(file: Path) -> str | None:
    with open_utf8(file) as opened:
        lines = (line.strip() for line in iter(lambda: opened.readline(MAX_ROW_BYTES), b"") if not line.isspace())
        first = next(lines, b"")
        if first.startswith(b"["):
            return "json" if isinstance(next(read_json(file), None), SourceRow) else None
        if not first.startswith(b"{"):
            return None
        beginning = [first, *islice(lines, _JSON_LINES - 1)]
    # Damaged lines among them are problems to report, and no reason to learn JSON as a text.
    return "jsonl" if 2 * sum(map(_is_object, beginning)) >= len(beginning) else None


def _is_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
