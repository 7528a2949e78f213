"""Work side by side: in order, errors at their place, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from operator import mul, truediv

import psutil
import pytest

from llmtune.data.workers import ordered_map, worker_count

SCRIPT = """
import time
from llmtune.data.workers import ordered_map
for result in ordered_map(time.sleep, [0.01] * 2 + [60] * 8, processes=2):
    print("one", flush=True)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_errors_at_their_place(processes: int) -> None:
    assert list(ordered_map(partial(mul, 3), range(50), processes=processes)) == [3 * n for n in range(50)]
    results = ordered_map(partial(truediv, 6), [1, 2, 0, 3], processes=processes)
    assert [next(results), next(results)] == [6.0, 3.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_items_are_drawn_as_workers_become_free() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    results = ordered_map(partial(mul, 1), items(), processes=2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 6


def test_little_work_stays_in_this_process() -> None:
    assert worker_count(1_000, least_bytes=1_001) == 1
    assert 1 <= worker_count(1_001, least_bytes=1_001) <= (os.cpu_count() or 1)


# After the first result, an interrupt where a lock of Python's own has just been taken: when the next item is handed
# over, or when the next result is waited for. Where no such lock is taken it comes after a second.
INTERRUPTED = """
import os, signal, sys, threading, time
from llmtune.data.workers import ordered_map

armed, waiting, enter = False, sys.argv[1] == "waiting", threading.Condition.__enter__

def interrupted(condition):
    global armed
    taken = enter(condition)
    here = not waiting or signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if armed and here and threading.current_thread() is threading.main_thread():
        armed = False
        signal.raise_signal(signal.SIGINT)
    return taken

threading.Condition.__enter__ = interrupted
try:
    for result in ordered_map(time.sleep, [0.01] + [600] * 8, processes=2):
        late = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        late.daemon = True
        late.start()
        armed = True
except KeyboardInterrupt:
    armed = False
    late.cancel()
    print("interrupted")
"""


@pytest.mark.fault
@pytest.mark.parametrize("when", ["handing over", "waiting"])
def test_an_interrupt_leaves_no_lock_taken(when: str) -> None:
    """One of the executor's or of a pending future's would let it wait for ever when it is shut down."""
    command = [sys.executable, "-c", INTERRUPTED, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "interrupted\n"


@pytest.mark.fault
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(sent: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT]
    with psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout.readline() == b"one\n"
        children = parent.children(recursive=True)
        assert len(children) >= 2
        parent.send_signal(sent)
        parent.wait(20)
    deadline = time.monotonic() + 20
    while any(_lives(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [child for child in children if _lives(child)] == []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
