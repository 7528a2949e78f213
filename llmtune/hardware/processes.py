"""How a process is tied to the one that started it, and how it ends when it is asked to."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llmtune.errors import Preempted

_PR_SET_PDEATHSIG = 1  # Linux prctl(2): the signal a process gets when its parent dies

# Names the process that restarts this one. It is inherited by everything this process starts in turn, so it counts only
# where that process is the parent.
SUPERVISOR = "SUPERVISED_BY_LLMTUNE"


def follow_parent() -> None:
    """Ask the kernel to end this process when its parent dies, so that none works on unnoticed; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_supervised() -> bool:
    """Whether the parent of this process starts it again when it is killed or hangs."""
    return os.environ.get(SUPERVISOR) == str(os.getppid())


def is_launched() -> bool:
    """Whether a launcher (``accelerate launch``, ``torchrun``) has started this process as one of several."""
    return "LOCAL_RANK" in os.environ


class _StopNow(BaseException):
    """Carries the name of a signal out of whatever was going on; no ``except Exception`` on the way catches it."""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """A block in which SIGTERM and SIGINT go to ``handler``; in the main thread, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


@contextmanager
def stoppable() -> Iterator[None]:
    """A block with nothing to save: SIGTERM and SIGINT leave it at once, a second one ends the process.

    Only the main thread can do that; elsewhere nothing changes.

    Raises:
        Preempted: A signal came.
    """
    received: list[str] = []

    def leave(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(Preempted.exit_code)
        received.append(signal.Signals(number).name)
        raise _StopNow(received[0])

    with handling(leave):
        try:
            yield
        except _StopNow as stop:
            told = f"stopped by {stop} outside of the updates; nothing is lost, and the same command goes on"
            raise Preempted(told) from None


@contextmanager
def undisturbed() -> Iterator[None]:
    """A short block that SIGTERM and SIGINT do not break into: what is sent meanwhile arrives at its end.

    Only the main thread is broken into; elsewhere nothing changes.
    """
    sent: list[int] = []
    try:
        with handling(lambda number, frame: sent.append(number)):
            yield
    finally:
        for number in sent:
            signal.raise_signal(number)


@contextmanager
def ending() -> Iterator[None]:
    """A block that writes down what has ended the process: SIGTERM and SIGINT, which would end it, change nothing.

    A launcher sends the first one to all ranks as soon as one of them is gone. Only the main thread can do that;
    elsewhere nothing changes.
    """
    with handling(signal.SIG_IGN):
        yield
