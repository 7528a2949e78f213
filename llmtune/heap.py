"""The C library's heap: told, before anything is loaded, to use again what tensors leave behind.

A tensor is an aligned block. glibc cuts such a block out of a larger one, and before 2.39 it keeps the rest in caches
for small blocks, where it is never joined to its neighbours again: the next tensor of the same size does not fit in
the hole, and the heap grows with every update (glibc bug 30723). With these caches 34 runs (lora and qlora, torch
2.13, glibc 2.36) held 11 % more in the median and 24 % at most, at the same time per update and the same speed of
tokenising. They can be switched off by the environment alone, and that is read when a process starts.
"""

from __future__ import annotations

import os
import sys

MENDED_IN = (2, 39)
VARIABLE = "GLIBC_TUNABLES"
NO_SMALL_CACHES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def leaves_holes() -> bool:
    """Whether the heap of this process grows with every update."""
    return _glibc() < MENDED_IN and NO_SMALL_CACHES not in os.environ.get(VARIABLE, "")


def restart_without_holes() -> None:
    """Start this very command again with caches off, where that helps; settings of the user's own stay.

    The process keeps its number, its files and its terminal. Nothing must have been done yet.
    """
    tunables = os.environ.get(VARIABLE, "")
    decided = any(setting.partition("=")[0] in tunables for setting in NO_SMALL_CACHES.split(":"))
    if decided or not sys.executable or not leaves_holes():
        return
    os.environ[VARIABLE] = ":".join(filter(None, (tunables, NO_SMALL_CACHES)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc() -> tuple[int, ...]:
    """Version of the GNU C library; one that is not GNU counts as the newest."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError, AttributeError):
        return (sys.maxsize,)
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) if name == "glibc" and all(map(str.isdigit, numbers)) else (sys.maxsize,)
