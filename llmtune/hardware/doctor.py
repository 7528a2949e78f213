"""What ``llmtune doctor`` knows: machine, versions, what is usable, what is wrong and the command that mends it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from llmtune.hardware.accelerators import ask_torch
from llmtune.hardware.datasheet import nominal_rates
from llmtune.hardware.detection import detect, existing_parent
from llmtune.hardware.device import choose_device
from llmtune.hardware.facts import Hardware
from llmtune.hardware.probes import Usable, probe_all
from llmtune.hardware.rates import BUSY_SHARE, measure_rates, note_rates
from llmtune.units import GIB, format_bytes

# A 1B model in bf16 is 2.2 GB, its download cache as much again, and a few checkpoints follow.
_LITTLE_DISK_BYTES = 5 * GIB
# The interpreter with torch and transformers loaded is 0.6 GiB; a 1B model in bf16 is 2.1 GiB.
_LITTLE_RAM_BYTES = 4 * GIB

# Shares below which a measured rate needs an explanation, and a disk that makes saves noticeable. llmtune: chosen.
_FAR_BELOW, _SLOW_DISK = 0.4, 30e6
_NO_TORCH = "torch cannot be imported"

# Installed by extras or by hand; reported when there.
_OPTIONAL = ("liger-kernel", "triton", "deepspeed", "sentencepiece", "tensorboard", "nvidia-ml-py", "psycopg")


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


def diagnose(
    hardware: Hardware | None = None,
    *,
    disk_path: Path | str = ".",
    root: Path = Path("/"),
    cache: Path | None = None,
) -> Diagnosis:
    """Look at everything a run depends on and measure the device that would train; takes a few seconds.

    Args:
        hardware: What the machine is; detected and measured when None.
        disk_path: Where runs will be written.
        root: Where ``proc`` and ``sys`` are looked for.
        cache: Folder of rebuildable things; what was measured is noted there for later plans.
    """
    accelerators, failures = ask_torch()
    if hardware is None:
        hardware = detect(disk_path, root=root, accelerators=accelerators)
        if not any(failure.startswith(_NO_TORCH) for failure in failures):
            hardware = _measured(hardware, disk_path, cache)
    requirements = _requirements()
    versions = installed_versions(requirements)
    problems = (
        *version_problems(requirements, versions),
        *(Problem(problem=f, fix=_driver_fix(f)) for f in failures),
        *_torch_build_problems(root),
        *machine_problems(hardware, swap_bytes=_swap_bytes()),
        *rate_problems(hardware, disk_path),
    )
    return Diagnosis(hardware=hardware, versions=versions, usable=probe_all(hardware), problems=problems)


def _measured(hardware: Hardware, disk_path: Path | str, cache: Path | None) -> Hardware:
    device = choose_device(hardware)
    rates = measure_rates(hardware, device, disk_path=disk_path)
    if cache is not None:
        note_rates(hardware, device, rates, cache)
    return replace(hardware, rates=rates)


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
    if failure.startswith(_NO_TORCH):
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


def rate_problems(hardware: Hardware, disk_path: Path | str) -> Iterator[Problem]:
    """What was measured and is far below what the device should do."""
    rates = hardware.rates
    if rates is None:
        return
    if rates.busy_share > BUSY_SHARE:
        yield Problem(
            problem=f"other programs took {100 * rates.busy_share:.0f} % of the usable cores during the measurement; "
            "these rates are too low, and a training now would be slowed down as much",
            fix="see which they are (top) and stop them, then run llmtune doctor again",
        )
    promised = nominal_rates(hardware, choose_device(hardware)).best.matmul
    for precision, rate in rates.best.matmul.items():
        if rate < _FAR_BELOW * promised[precision] and rates.busy_share <= BUSY_SHARE:
            yield Problem(
                problem=f"{precision} matrix products reach {rate / 1e12:.2g} TFLOP/s; "
                f"{promised[precision] / 1e12:.2g} are usual for {rates.device}",
                fix=_slow_fix(hardware),
            )
    disk = rates.disk_write_bytes_per_second
    place = existing_parent(disk_path)
    if disk is None:
        yield Problem(problem=f"nothing can be written to {place}", fix="write elsewhere: --output DIR")
    elif disk < _SLOW_DISK:
        yield Problem(
            problem=f"the disk of {place} writes {format_bytes(disk)} per second; a checkpoint of 1 GB takes "
            f"{1e9 / disk:.0f} s",
            fix="write to another disk: --output DIR; or save less often: --set save.every_steps=N",
        )


def _slow_fix(hardware: Hardware) -> str:
    if hardware.accelerators:
        return "see its clocks, temperature and power limit: nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE"
    return (
        "see what holds the cores back: a power-saving governor (cpupower frequency-set -g performance), a limit of "
        "the container (docker run --cpus), or OMP_THREAD_LIMIT"
    )
