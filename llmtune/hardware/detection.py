"""Looks at the machine once and returns the facts."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtune.hardware.accelerators import find_accelerators
from llmtune.hardware.cgroup import read_limits
from llmtune.hardware.cpu import read_cpu
from llmtune.hardware.facts import Accelerator, Hardware
from llmtune.hardware.probes import can_compile
from llmtune.heap import leaves_holes


def detect(
    disk_path: Path | str = ".",
    *,
    root: Path = Path("/"),
    accelerators: Sequence[Accelerator] | None = None,
) -> Hardware:
    """What this machine is now, and what of it a run may take.

    What this process holds itself counts as free: predictions of a run's memory hold the interpreter, and a plan should
    be the same before and after its libraries are loaded.

    Args:
        disk_path: Where the run will write; the free bytes of its disk are reported. Need not exist yet.
        root: Where ``dev``, ``proc`` and ``sys`` are looked for.
        accelerators: Those already found; looked for when None.
    """
    import psutil

    limits = read_limits(root)
    memory = psutil.virtual_memory()
    own = _own_bytes()
    found = tuple(find_accelerators(root) if accelerators is None else accelerators)
    return Hardware(
        accelerators=found,
        cpu=read_cpu(root, cpu_quota=limits.cpu_quota),
        ram_total_bytes=memory.total,
        ram_available_bytes=min(memory.total, memory.available + own),
        cgroup_limit_bytes=limits.memory_limit_bytes,
        cgroup_used_bytes=None if limits.memory_used_bytes is None else max(0, limits.memory_used_bytes - own),
        disk_free_bytes=free_disk_bytes(disk_path),
        platform=f"{sys.platform}-{platform.machine()}",
        can_compile=can_compile(found),
        heap_leaves_holes=leaves_holes(),
    )


def _own_bytes() -> int:
    """Memory of this process that nobody shares: resident, less what is mapped from files (known on Linux alone)."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def free_disk_bytes(path: Path | str) -> int:
    """Bytes an ordinary user may still write on the disk of ``path``."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path | str) -> Path:
    """``path``, or its nearest parent that exists."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if p.exists())
