"""Bytes, durations and counts, written the way people read them and read back the way people write them."""

from __future__ import annotations

import math
import re

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_BYTE_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTE_UNITS |= {f"{u}b": n for u, n in list(_BYTE_UNITS.items()) if len(u) == 1 and u != "b"}
_BYTE_UNITS |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4}


def format_bytes(num_bytes: float) -> str:
    """``13.1 GiB``: binary units, one decimal from MiB upwards."""
    for unit, size in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / KIB:.0f} KiB" if abs(num_bytes) >= KIB else f"{num_bytes:.0f} B"


def parse_bytes(text: str | int) -> int:
    """Bytes of ``24GiB``, ``24 GB`` or a plain number.

    Raises:
        ValueError: The text is no size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"got {text!r}, expected a size such as 24GiB or 500MB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 07 min`` or ``1 d 03 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_count(count: float) -> str:
    """``950``, ``12.3k``, ``1.1B``: three significant digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def format_rows_right(share: float, rows: int) -> str:
    """Return a share of rows as a count: ``61 of 64``."""
    return f"{round(share * rows):,} of {rows:,}" if math.isfinite(share) else f"{share} of {rows:,}"
