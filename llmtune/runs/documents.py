"""JSON on disk: valid whatever the numbers, free of secrets, and either the old file or the new one after a crash."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from llmtune.runs.redaction import own_redactor


def plain(value: Any, hide: Callable[[str], str]) -> Any:
    """``value`` as JSON types: non-finite numbers become ``"nan"``, ``"inf"``, ``"-inf"``, strings go through ``hide``.

    Raises:
        TypeError: A value that JSON has no form for.
    """
    if isinstance(value, str):
        return hide(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Mapping):
        return {str(key): plain(item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, hide) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), hide) for field in fields(value)}
    if isinstance(value, os.PathLike):
        return hide(os.fspath(value))
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def as_json(document: Any) -> Any:
    """``document`` as JSON types, fit for any JSON writer; dataclasses become objects."""
    return plain(document, own_redactor())


def encode(document: Any, *, indent: int | None = None) -> bytes:
    """``document`` as UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, is written as its JSON escape."""
    text = json.dumps(as_json(document), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")


def number(value: Any) -> float | None:
    """The number that a document holds, ``"nan"`` and ``"inf"`` read back; None where there is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` by ``content`` so that a crash at any moment leaves the old file or the new one.

    Args:
        path: The file; its directory exists.
        content: What it shall hold.
        durable: Also survive a power failure, at the price of waiting for the disk.

    Raises:
        OSError: As the system says; no temporary file stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power failure, where the system can open directories."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
