"""NVIDIA devices without torch and without a context: through nvidia-ml-py where it is installed, else nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.hardware.facts import Accelerator
from llmtune.units import MIB

# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities: bf16 and TF32 tensor cores
# come with 8.0 (Ampere), half-precision arithmetic with 5.3.
_CAPABILITY_BF16_TF32 = (8, 0)
_CAPABILITY_FP16 = (5, 3)
# Oldest driver for each major version of CUDA (https://docs.nvidia.com/deploy/cuda-compatibility, minor version
# compatibility). With an older one torch sees no device.
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_ASKED = "name,uuid,memory.total,memory.free,compute_cap,mig.mode.current,driver_version"
_SMI_SECONDS = 10.0  # a driver that answers at all does so within seconds, even one that has to wake its devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One device as the driver lists it, in bus order; ``driver`` is the driver's version, e.g. ``580.65.06``."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    mig: bool
    driver: str


def accelerator(index: int, name: str, free: int, total: int, capability: tuple[int, int]) -> Accelerator:
    """The facts of an NVIDIA device; its compute capability says what it can do."""
    return Accelerator(
        index=index,
        name=name,
        kind="cuda",
        total_bytes=total,
        free_bytes=free,
        compute_capability=capability,
        bf16=capability >= _CAPABILITY_BF16_TF32,
        fp16=capability >= _CAPABILITY_FP16,
        tf32=capability >= _CAPABILITY_BF16_TF32,
    )


def read_cards() -> list[Card] | None:
    """All devices of the driver; None where neither nvidia-ml-py nor nvidia-smi answers."""
    try:
        import pynvml
    except ImportError:
        return _ask_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return nvml_cards(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def nvml_cards(nvml: Any) -> list[Card]:
    """What NVIDIA's management library tells."""
    driver = nvml.nvmlSystemGetDriverVersion()
    found = []
    for place in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(place)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        found.append(
            Card(
                name=nvml.nvmlDeviceGetName(handle),
                uuid=nvml.nvmlDeviceGetUUID(handle),
                total_bytes=int(memory.total),
                free_bytes=int(memory.free),
                capability=(major, minor),
                mig=_is_mig(nvml, handle),
                driver=driver,
            )
        )
    return found


def _is_mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # not supported: no device of this kind can be sliced
        return False
    return bool(current)


def _ask_smi() -> list[Card] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return smi_cards(answer.stdout) if answer.returncode == 0 else None


def smi_cards(answer: str) -> list[Card] | None:
    """The lines of ``nvidia-smi --query-gpu``; None where a number is ``[N/A]``, as on devices that share RAM."""
    found = []
    for line in filter(str.strip, answer.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        try:
            name, uuid, total, free, capability, mig, driver = fields
            major, minor = (int(part) for part in capability.split("."))
            total_bytes, free_bytes = int(total) * MIB, int(free) * MIB
        except ValueError:
            return None
        found.append(
            Card(
                name=name,
                uuid=uuid,
                total_bytes=total_bytes,
                free_bytes=free_bytes,
                capability=(major, minor),
                mig=mig == "Enabled",
                driver=driver,
            )
        )
    return found


def as_torch_numbers(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Accelerator] | None:
    """The cards that torch will see, numbered as it numbers them; None where only torch can tell.

    The driver knows every device in bus order and no ``CUDA_VISIBLE_DEVICES``; CUDA orders the fastest first. They
    agree when all devices are of one model, or when ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. A MIG slice is left to torch.
    """
    if len({card.name for card in cards}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    if any(card.mig for card in cards):
        return None
    order = visible_devices(environ.get("CUDA_VISIBLE_DEVICES"), [card.uuid for card in cards])
    if order is None:
        return None
    chosen = [cards[place] for place in order]
    return [accelerator(i, c.name, c.free_bytes, c.total_bytes, c.capability) for i, c in enumerate(chosen)]


def visible_devices(value: str | None, uuids: Sequence[str]) -> list[int] | None:
    """Positions in ``uuids`` that ``CUDA_VISIBLE_DEVICES`` names, by number or by start of a UUID; None if unclear."""
    if value is None:
        return list(range(len(uuids)))
    order = []
    for entry in filter(None, (part.strip() for part in value.split(","))):
        matches = [int(entry)] if entry.isdigit() else [i for i, u in enumerate(uuids) if u.startswith(entry)]
        if len(matches) != 1 or matches[0] >= len(uuids):
            return None
        order += matches
    return order


def driver_serves(cards: Sequence[Card], toolkit: str) -> bool:
    """Whether the driver is new enough for a torch built with this version of CUDA, e.g. ``13.0``."""
    oldest = _OLDEST_DRIVER.get(toolkit.partition(".")[0])
    versions = [card.driver.partition(".")[0] for card in cards]
    return oldest is not None and all(version.isdigit() and int(version) >= oldest for version in versions)
