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
from typing import Any

import psutil
import pytest
from loky import ProcessPoolExecutor

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


def test_an_interrupt_does_not_break_into_the_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of the executor's that is never given back would let it wait for ever when it is shut down."""
    handed_over = []

    class Interrupted(ProcessPoolExecutor):
        def submit(self, *args: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            handed_over.append(args)
            return super().submit(*args)

    monkeypatch.setattr("loky.ProcessPoolExecutor", Interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(ordered_map(partial(mul, 1), range(8), processes=2))
    assert len(handed_over) == 1
    assert signal.getsignal(signal.SIGINT) is before


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
