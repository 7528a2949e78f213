"""What ``llmtune doctor`` knows: machine, versions, what is usable, what is wrong and the command that mends it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from llmtune.hardware.accelerators import find_accelerators
from llmtune.hardware.detection import detect
from llmtune.hardware.facts import Hardware
from llmtune.hardware.probes import Usable, probe_all
from llmtune.units import GIB, format_bytes

# A 1B model in bf16 is 2.2 GB, its download cache as much again, and a few checkpoints follow.
_LITTLE_DISK_BYTES = 5 * GIB
# The interpreter with torch and transformers loaded is 0.6 GiB; a 1B model in bf16 is 2.1 GiB.
_LITTLE_RAM_BYTES = 4 * GIB

# Installed by extras or by hand; reported when there.
_OPTIONAL = ("flash-attn", "triton", "deepspeed", "sentencepiece", "tensorboard", "nvidia-ml-py", "psycopg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that is wrong or limits this machine, and what mends it."""

    problem: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that doctor found."""

    hardware: Hardware
    versions: Mapping[str, str]
    usable: Mapping[str, Usable]
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of ``llmtune doctor --json``."""
        return {
            "hardware": self.hardware.to_json(),
            "versions": dict(self.versions),
            "usable": {name: asdict(usable) for name, usable in self.usable.items()},
            "problems": [asdict(problem) for problem in self.problems],
        }


def diagnose(hardware: Hardware | None = None, *, disk_path: Path | str = ".", root: Path = Path("/")) -> Diagnosis:
    """Look at everything a run depends on; takes a few seconds, changes nothing.

    Args:
        hardware: What the machine is; detected when None.
        disk_path: Where runs will be written.
        root: Where ``proc`` and ``sys`` are looked for.
    """
    accelerators, failures = find_accelerators()
    hardware = hardware or detect(disk_path, root=root, accelerators=accelerators)
    requirements = _requirements()
    versions = installed_versions(requirements)
    problems = (
        *version_problems(requirements, versions),
        *(Problem(problem=f, fix=_driver_fix(f)) for f in failures),
        *_torch_build_problems(root),
        *machine_problems(hardware, swap_bytes=_swap_bytes()),
    )
    return Diagnosis(hardware=hardware, versions=versions, usable=probe_all(hardware), problems=problems)


def _requirements() -> tuple[str, ...] | None:
    """What the installed llmtune requires, without extras, as ``name<bounds>``; None when it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = requires("llmtune") or []
    except PackageNotFoundError:
        return None
    markers = ((line, Requirement(line).marker) for line in lines)
    return tuple(line for line, marker in markers if marker is None or marker.evaluate({"extra": ""}))


def installed_versions(requirements: Sequence[str] | None) -> dict[str, str]:
    """Versions of python, llmtune, what it requires, and optional packages that are there."""
    from packaging.requirements import Requirement

    versions = {"python": platform.python_version(), "llmtune": _version("llmtune") or "not installed"}
    for name in (Requirement(line).name for line in requirements or ("torch", "transformers", "accelerate", "peft")):
        versions[name] = _version(name) or "missing"
    for name in _OPTIONAL:
        if (found := _version(name)) is not None:
            versions[name] = found
    return versions


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def version_problems(requirements: Sequence[str] | None, versions: Mapping[str, str]) -> Iterator[Problem]:
    """Packages that are missing or outside the bounds that llmtune is tested with."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion

    if requirements is None:
        yield Problem(problem="llmtune runs from a folder and is not installed", fix="pip install -e . in that folder")
    for requirement in map(Requirement, requirements or ()):
        found = versions.get(requirement.name, "missing")
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        if found == "missing":
            yield Problem(problem=f"{requirement.name} is not installed", fix=fix)
            continue
        try:
            inside = requirement.specifier.contains(found, prereleases=True)
        except InvalidVersion:
            inside = False
        if not inside:
            problem = f"{requirement.name} {found} is outside what llmtune is tested with ({requirement.specifier})"
            yield Problem(problem=problem, fix=fix)


def _driver_fix(failure: str) -> str:
    if failure.startswith("torch cannot be imported"):
        return "pip install --force-reinstall torch"
    if failure.startswith("CUDA"):
        return (
            "run nvidia-smi; if it fails too, reinstall the NVIDIA driver; else install a torch built for its version"
        )
    return "update the operating system and the driver of the device"


def _torch_build_problems(root: Path) -> Iterator[Problem]:
    """A torch without CUDA on a machine with an NVIDIA driver trains on the CPU and says nothing."""
    driver = (root / "proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not driver:
        return
    try:
        import torch
    except (ImportError, OSError):  # already told by the search for accelerators
        return
    if torch.version.cuda is None:
        yield Problem(
            problem=f"this machine has an NVIDIA driver, but torch {torch.__version__} is built without CUDA",
            fix="pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130 "
            "(the CUDA version that fits the driver: https://pytorch.org/get-started/locally)",
        )


def _swap_bytes() -> int:
    import psutil

    return int(psutil.swap_memory().total)


def machine_problems(hardware: Hardware, *, swap_bytes: int) -> Iterator[Problem]:
    """What limits training on this machine whatever is installed."""
    limit = hardware.cgroup_limit_bytes
    if hardware.disk_free_bytes < _LITTLE_DISK_BYTES:
        yield Problem(
            problem=f"only {format_bytes(hardware.disk_free_bytes)} of disk are free; models and checkpoints need more",
            fix="free some space (hf cache prune; old runs), or write elsewhere: --output DIR and HF_HOME=DIR",
        )
    if limit is not None and limit < hardware.ram_total_bytes:
        yield Problem(
            problem=f"a cgroup limits this process to {format_bytes(limit)} of the machine's "
            f"{format_bytes(hardware.ram_total_bytes)} RAM; beyond it the kernel kills",
            fix="start the container with more (docker run --memory, resources.limits.memory); plans respect the limit",
        )
    if hardware.usable_ram_bytes < _LITTLE_RAM_BYTES and swap_bytes == 0:
        yield Problem(
            problem=f"only {format_bytes(hardware.usable_ram_bytes)} of RAM are usable and there is no swap; "
            "a peak ends the process",
            fix="close other programs, or add swap: fallocate -l 8G /swapfile && chmod 600 /swapfile && "
            "mkswap /swapfile && swapon /swapfile (as root)",
        )
    if "bf16" not in hardware.precision_support:
        used = "fp16" if "fp16" in hardware.precision_support else "fp32"
        yield Problem(
            problem="no bf16 in hardware: training is slower or needs more memory than on newer devices",
            fix=f"nothing to install; plans take {used}. bf16 needs an NVIDIA GPU of compute capability 8.0 "
            "or more, or a CPU with AMX or AVX512-BF16",
        )
