"""Which device a run takes, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtune.errors import HardwareError, did_you_mean
from llmtune.hardware.facts import Accelerator, Hardware

_TYPES = ("auto", "cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """The device of a run. ``str(choice)`` is torch's name for it; ``index`` is None for the CPU."""

    type: str
    index: int | None
    name: str
    total_bytes: int
    free_bytes: int
    reason: str

    def __str__(self) -> str:
        return self.type if self.index is None or self.type == "mps" else f"{self.type}:{self.index}"


def choose_device(hardware: Hardware, requested: str = "auto") -> DeviceChoice:
    """The device that ``requested`` means on this machine.

    Args:
        hardware: What the machine is.
        requested: ``auto``, ``cpu``, ``cuda`` (ROCm too), ``mps``, ``xpu``, or one device: ``cuda:1``. Of several
            that qualify the first is taken, as torch and transformers do.

    Raises:
        HardwareError: No such device name, or no such device here.
    """
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", requested.strip().lower())
    kind, index = (match[1], None if match[2] is None else int(match[2])) if match else (requested, None)
    if kind not in _TYPES or (index is not None and kind in ("auto", "cpu")):
        raise HardwareError(f"device '{requested}': no such device{did_you_mean(kind, _TYPES)}")
    if kind == "cpu" or (kind == "auto" and not hardware.accelerators):
        return _cpu(hardware, "asked for" if kind == "cpu" else "no accelerator found")
    candidates = [a for a in hardware.accelerators if kind in ("auto", torch_type(a)) and index in (None, a.index)]
    if not candidates:
        raise HardwareError(
            f"device '{requested}' was asked for and is not there; found: {_found(hardware)}. "
            "Take one of these or 'auto'; 'llmtune doctor' says what keeps a device from being seen."
        )
    best = min(candidates, key=lambda a: a.index)
    reason = "asked for" if kind != "auto" else "the accelerator found"
    if len(candidates) > 1:
        reason = f"the first of {len(candidates)}; CUDA_VISIBLE_DEVICES=N picks another, accelerate launch uses all"
    return DeviceChoice(
        type=torch_type(best),
        index=best.index,
        name=best.name,
        total_bytes=best.total_bytes,
        free_bytes=best.free_bytes,
        reason=reason,
    )


def torch_type(accelerator: Accelerator) -> str:
    """What torch calls the type: ROCm devices are ``cuda`` there."""
    return "cuda" if accelerator.kind == "rocm" else accelerator.kind


def _cpu(hardware: Hardware, reason: str) -> DeviceChoice:
    total = min(hardware.ram_total_bytes, hardware.cgroup_limit_bytes or hardware.ram_total_bytes)
    return DeviceChoice(
        type="cpu",
        index=None,
        name=hardware.cpu.model,
        total_bytes=total,
        free_bytes=hardware.usable_ram_bytes,
        reason=reason,
    )


def _found(hardware: Hardware) -> str:
    names = [f"{torch_type(a)}:{a.index} ({a.name})" for a in hardware.accelerators]
    return ", ".join([*names, f"cpu ({hardware.cpu.model})"])
