"""What Linux control groups leave to this process, version 1 and version 2, in and outside containers.

The kernel's rules: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Version 1 writes "no limit" as the largest multiple of the page size below 2**63.
_V1_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """The limits that bind this process; None where there is none. ``cpu_quota`` is in CPUs, e.g. 1.5."""

    memory_limit_bytes: int | None = None
    memory_used_bytes: int | None = None
    cpu_quota: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    version: int
    controllers: frozenset[str]
    shown: PurePosixPath  # the group that is seen at the mount point; a container sees its own
    point: str


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """The limits of this process's group and all groups above it; no limits where there are no cgroups."""
    memory = [
        (limit, used)
        for version, group in _groups(root, "memory")
        if (limit := _memory_limit(group, version)) is not None and (used := _memory_used(group, version)) is not None
    ]
    quotas = [quota for version, group in _groups(root, "cpu") if (quota := _cpu_quota(group, version)) is not None]
    # A group far above can be fuller than ours: the kernel stops us at the one that leaves least.
    limit, used = min(memory, key=lambda pair: pair[0] - pair[1], default=(None, None))
    return CgroupLimits(memory_limit_bytes=limit, memory_used_bytes=used, cpu_quota=min(quotas, default=None))


def _groups(root: Path, controller: str) -> list[tuple[int, Path]]:
    """(version, directory) of the group of this process for one controller, then of each group above it."""
    own = _own_groups(root)
    mounts = _mounts(root)
    # On a hybrid system a controller is bound to one version only: version 1 wherever it is mounted there.
    mount = next((m for m in mounts if controller in m.controllers), None) or next(
        (m for m in mounts if m.version == 2), None
    )
    if mount is None:
        return []
    top = root / mount.point.lstrip("/")
    path = PurePosixPath(own.get(controller if mount.version == 1 else "", "/"))
    below = path.relative_to(mount.shown) if path.is_relative_to(mount.shown) else PurePosixPath()
    # Outside our namespace ("/../x"), or hidden by the container: the mount point is all there is to see.
    group = top if ".." in below.parts or not (top / below).is_dir() else top / below
    return [(mount.version, group), *((mount.version, g) for g in group.parents if g.is_relative_to(top))]


def _own_groups(root: Path) -> dict[str, str]:
    """Group path of this process by controller; version 2 is the one named ``""``."""
    own: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    return own


def _mounts(root: Path) -> list[_Mount]:
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            shown, point = left.split(" ")[3:5]
            version = 2 if kind == "cgroup2" else 1
            controllers = frozenset(options.split(",")) if version == 1 else frozenset[str]()
            mounts.append(_Mount(version=version, controllers=controllers, shown=PurePosixPath(shown), point=point))
    return mounts


def _memory_limit(group: Path, version: int) -> int | None:
    limit = _number(group / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
    return None if limit is None or limit >= _V1_UNLIMITED else limit


def _memory_used(group: Path, version: int) -> int | None:
    """Bytes in use, less the inactive file cache: the kernel drops that before it kills (kubelet's working set)."""
    used = _number(group / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    if used is None:
        return None
    name = "inactive_file" if version == 2 else "total_inactive_file"
    cache = next((line.split()[1] for line in _lines(group / "memory.stat") if line.split()[0] == name), "0")
    return max(0, used - int(cache))


def _cpu_quota(group: Path, version: int) -> float | None:
    if version == 2:
        quota, period = (*" ".join(_lines(group / "cpu.max")).split(), "max", "max")[:2]
        return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us is not None and quota_us > 0 and period_us else None


def _number(path: Path) -> int | None:
    """The integer in a one-line file; None for ``max``, or where there is no such file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _lines(path: Path) -> list[str]:
    """Lines of a kernel file; none where it is absent or may not be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []
