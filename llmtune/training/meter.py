"""How much memory this process uses, at most has used, and whether an error says that there was too little."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.002
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


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
        return _resident()

    def peak(self) -> int:
        """Most bytes taken since `restart`."""
        if self._device.type in ("cuda", "xpu"):
            return int(self._allocator().max_memory_reserved(self._device)) + self._context
        if self._device.type == "mps":  # its cache is not given back, so that what is taken is what was
            return self.used()
        if self._sampled is not None:
            return self._sampled
        return _high_water() or _lifetime_peak()

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
            _reset_high_water()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A block whose peak is counted by itself until the next `restart`.

        It is sampled where the system keeps no peak that can be reset.
        """
        self.restart()
        if self._device.type != "cpu" or _reset_high_water():
            yield
            return
        done = threading.Event()
        self._sampled = _resident()

        def sample() -> None:
            while not done.wait(SAMPLE_SECONDS):
                self._sampled = max(self._sampled or 0, _resident())

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


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


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
