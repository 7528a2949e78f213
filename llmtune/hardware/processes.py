"""How a process is tied to the one that started it."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Linux prctl(2): the signal a process gets when its parent dies


def follow_parent() -> None:
    """Ask the kernel to end this process when its parent dies, so that none works on unnoticed; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
