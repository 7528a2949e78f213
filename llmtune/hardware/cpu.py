"""The processor: model, cores and the instructions that make bf16 fast."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from llmtune.hardware.facts import Cpu


def read_cpu(root: Path = Path("/"), *, num_affinity: int | None = None, cpu_quota: float | None = None) -> Cpu:
    """The CPU from ``/proc/cpuinfo`` on Linux, from psutil and platform elsewhere.

    Args:
        root: Where ``proc`` is looked for.
        num_affinity: Logical CPUs this process may run on; asked of the system when None.
        cpu_quota: CPUs that the cgroup grants, e.g. 1.5; None for no limit.
    """
    import psutil

    entries = _cpuinfo(root / "proc/cpuinfo")
    if entries:
        first, flags = entries[0], _flags(entries[0])
        model = first.get("model name") or _arm_model(first) or platform.machine()
        physical = len({(e["physical id"], e["core id"]) for e in entries if "core id" in e and "physical id" in e})
        physical = physical or len(entries)
    else:
        model, flags = apple_chip() or platform.processor() or platform.machine() or "unknown", frozenset()
        physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    usable = num_affinity or _num_affinity()
    if cpu_quota is not None:
        # Rounded down: threads beyond the quota are throttled, all of them at once.
        usable = min(usable, int(cpu_quota))
    return Cpu(
        model=model,
        physical_cores=physical,
        usable_cores=max(1, usable),
        amx={"amx_tile", "amx_bf16"} <= flags,
        avx512_bf16="avx512_bf16" in flags,
    )


def apple_chip() -> str | None:
    """What macOS calls the processor, e.g. ``Apple M3 Max``; None on other systems."""
    if platform.system() != "Darwin":
        return None
    try:
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _num_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(path: Path) -> list[dict[str, str]]:
    """One mapping per logical CPU; empty where the file is missing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    entries = []
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        entry = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if "processor" in entry:
            entries.append(entry)
    return entries


def _flags(entry: dict[str, str]) -> frozenset[str]:
    return frozenset((entry.get("flags") or entry.get("Features") or "").split())


def _arm_model(entry: dict[str, str]) -> str | None:
    """Arm kernels name no model, only the numbers of who made it and which part it is."""
    if "CPU implementer" not in entry:
        return None
    return f"Arm CPU (implementer {entry['CPU implementer']}, part {entry.get('CPU part', 'unknown')})"
