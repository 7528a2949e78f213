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


def detect(
    disk_path: Path | str = ".",
    *,
    root: Path = Path("/"),
    accelerators: Sequence[Accelerator] | None = None,
) -> Hardware:
    """What this machine is now.

    Args:
        disk_path: Where the run will write; the free bytes of its disk are reported. Need not exist yet.
        root: Where ``proc`` and ``sys`` are looked for.
        accelerators: Those already found; looked for with torch when None.
    """
    import psutil

    limits = read_limits(root)
    memory = psutil.virtual_memory()
    return Hardware(
        accelerators=tuple(find_accelerators()[0] if accelerators is None else accelerators),
        cpu=read_cpu(root, cpu_quota=limits.cpu_quota),
        ram_total_bytes=memory.total,
        ram_available_bytes=memory.available,
        cgroup_limit_bytes=limits.memory_limit_bytes,
        cgroup_used_bytes=limits.memory_used_bytes,
        disk_free_bytes=free_disk_bytes(disk_path),
        platform=f"{sys.platform}-{platform.machine()}",
    )


def free_disk_bytes(path: Path | str) -> int:
    """Bytes an ordinary user may still write on the disk of ``path``, or of its nearest parent that exists."""
    path = Path(path).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    return shutil.disk_usage(existing).free
