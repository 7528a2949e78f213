"""How much memory this process uses and at most has used."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.training.recovery import is_out_of_memory

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.002
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class MemoryMeter:
    """Bytes of one device: what the allocator took from it, or on a CPU the resident set of this process.

    Args:
        device: What is measured.
        context_bytes: What the driver takes beside the allocator, which does not know of it.
    """

    def __init__(self, device: torch.device, context_bytes: int = 0) -> None:
        self._device, self._context = device, context_bytes
        self._sampled: int | None = None

    def used(self) -> int:
        """Bytes taken now."""
        if self._device.type in ("cuda", "xpu"):
            return int(self._allocator().memory_reserved(self._device)) + self._context
        if self._device.type == "mps":
            import torch

            return int(torch.mps.driver_allocated_memory())
        return resident_bytes()

    def peak(self) -> int:
        """Most bytes taken since `restart`."""
        if self._device.type in ("cuda", "xpu"):
            return int(self._allocator().max_memory_reserved(self._device)) + self._context
        if self._device.type == "mps":  # its cache is not given back, so that what is taken is what was
            return self.used()
        if self._sampled is not None:
            return self._sampled
        return _mark.peak()

    def used_by_tensors(self) -> int:
        """Bytes of tensors now; on a CPU, where nobody tells them apart, of everything."""
        if self._device.type in ("cuda", "xpu"):
            return int(self._allocator().memory_allocated(self._device))
        return self.used()

    def peak_of_tensors(self) -> int:
        """Most bytes of tensors since `restart`; on a CPU, where nobody tells them apart, of everything."""
        if self._device.type in ("cuda", "xpu"):
            return int(self._allocator().max_memory_allocated(self._device))
        return self.peak()

    def restart(self) -> None:
        """Let peaks count from here; where the system cannot, they go on counting from the start of the process."""
        if self._device.type in ("cuda", "xpu"):
            self._allocator().empty_cache()
            self._allocator().reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu":
            self._sampled = None
            _mark.restart()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A block whose peak is counted by itself until the next `restart`.

        It is sampled where the system keeps no peak that can be reset.
        """
        self.restart()
        if self._device.type != "cpu" or _mark.restart():
            yield
            return
        done = threading.Event()
        self._sampled = resident_bytes()

        def sample() -> None:
            while not done.wait(SAMPLE_SECONDS):
                self._sampled = max(self._sampled or 0, resident_bytes())

        watch = threading.Thread(target=sample, daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()

    def _allocator(self) -> Any:
        import torch

        return getattr(torch, self._device.type)


def resident_bytes() -> int:
    """Bytes of this process that are in memory now; about 15 microseconds where there is a /proc (an estimate)."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def peak_since_last_asked() -> int | None:
    """Most bytes resident since this was last asked, or since a `MemoryMeter` began to count; None where not known.

    Peaks that a `MemoryMeter` counts do not change by it.
    """
    return _mark.lap()


def free_caches(device: torch.device) -> None:
    """Let go of what only cycles of dead objects hold, and give back to the system what allocators keep for later."""
    gc.collect()
    if device.type == "cpu":
        trim_heap()
    else:
        import torch

        getattr(torch, device.type).empty_cache()


def trim_heap() -> None:
    """Give the unused pages of the C library's heap back to the system; only glibc has a way to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _Mark:
    """The kernel's high water mark of this process, which several may count from without losing each other's peaks."""

    def __init__(self) -> None:
        self._before = 0  # the most before the mark was last reset by a lap

    def restart(self) -> bool:
        """Count from here; whether the system can."""
        self._before = 0
        return _reset_high_water()

    def peak(self) -> int:
        """Most bytes since `restart`."""
        return max(self._before, _high_water() or _lifetime_peak())

    def lap(self) -> int | None:
        """Most bytes since the last lap or restart; None where the mark cannot be reset."""
        peak = _high_water()
        if peak is None or not _reset_high_water():
            return None
        self._before = max(self._before, peak)
        return peak


_mark = _Mark()


def _high_water() -> int | None:
    """``VmHWM`` of Linux; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def _reset_high_water() -> bool:
    """Whether ``VmHWM`` counts from now on (proc(5): 5 written to clear_refs); sandboxes may refuse it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _high_water() is not None


def _lifetime_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


__all__ = ["MemoryMeter", "free_caches", "is_out_of_memory", "peak_since_last_asked", "resident_bytes", "trim_heap"]
