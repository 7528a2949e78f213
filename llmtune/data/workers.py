"""Work on parts of a file side by side: in this process when there is little of it, else in worker processes."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from llmtune.hardware import follow_parent, undisturbed

Item = TypeVar("Item")
Result = TypeVar("Result")

# How many parts may be on their way per worker: one at work, one waiting.
_AHEAD = 2
# A worker is one of several that share the cores, so libraries inside it must not start a thread per core.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def worker_count(num_bytes: int, *, least_bytes: int) -> int:
    """Processes for ``num_bytes`` of work: 1 below ``least_bytes``, where starting others costs more than it saves."""
    if num_bytes < least_bytes:
        return 1
    from loky import cpu_count

    count: int = cpu_count()  # affinity and cgroup limits respected
    return count


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, processes: int) -> Iterator[Result]:
    """``map``, in order, on so many processes; results wait in memory only for a few items ahead.

    Args:
        function: A callable that can be pickled; it is sent to each worker once.
        items: What it is called with; drawn as workers become free.
        processes: 1 for this process alone.

    Raises:
        Exception: What ``function`` raised, at the place of its item.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    from loky import ProcessPoolExecutor

    # loky starts fresh interpreters that do not run the caller's script again, so a script needs no __main__ guard.
    pool = ProcessPoolExecutor(
        max_workers=processes, initializer=_install, initargs=(function, os.getpid()), env=_ENVIRONMENT
    )
    # Each gets its future when that is done. An interrupt that leaves a lock of the executor's or of a pending future's
    # taken lets shutdown wait for ever: handing over is not broken into, and waiting takes no such lock.
    waiting: deque[SimpleQueue[Any]] = deque()
    done = False
    try:
        for item in items:
            waiting.append(SimpleQueue())
            with undisturbed():
                pool.submit(_call, item).add_done_callback(waiting[-1].put)
            if len(waiting) >= processes * _AHEAD:
                yield waiting.popleft().get().result()
        while waiting:
            yield waiting.popleft().get().result()
        done = True
    finally:
        pool.shutdown(wait=True, kill_workers=not done)


_function: Callable[[Any], Any] | None = None


def _install(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    # Rows are trees: without cycles, the collector of cycles finds nothing and costs a tenth of the time.
    gc.set_threshold(100_000)
    follow_parent()  # else it would wait for ever for the next item of a parent that was killed
    if os.getppid() != parent:  # it was killed before the kernel could be asked
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None, "the worker was started without its function"
    return _function(item)
