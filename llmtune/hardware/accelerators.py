"""The accelerators that torch can use here: CUDA, ROCm, XPU, MPS. A broken driver is a sentence, not a crash."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.hardware.facts import Accelerator

if TYPE_CHECKING:
    from types import ModuleType

# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities: bf16 and TF32 tensor cores
# come with 8.0 (Ampere), half-precision arithmetic with 5.3.
_CAPABILITY_BF16_TF32 = (8, 0)
_CAPABILITY_FP16 = (5, 3)


def find_accelerators() -> tuple[tuple[Accelerator, ...], tuple[str, ...]]:
    """The accelerators torch can use, and one sentence per kind that is there but fails (doctor tells them)."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch cannot be loaded
        return (), (f"torch cannot be imported: {_first_line(error)}",)
    found: list[Accelerator] = []
    failures: list[str] = []
    probes: Mapping[str, Callable[[ModuleType], list[Accelerator]]] = {"CUDA": _cuda, "XPU": _xpu, "MPS": _mps}
    for name, probe in probes.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                devices = probe(torch)
            except (RuntimeError, AssertionError, OSError) as error:  # what torch raises for a driver it cannot use
                failures.append(f"{name} is there but does not work: {_first_line(error)}")
                continue
        found += devices
        if not devices:  # torch only warns of a driver it cannot use
            failures += [f"{name} is there but does not work: {_first_line(w.message)}" for w in caught]
    return tuple(found), tuple(failures)


def _first_line(error: Warning | BaseException | str) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _nvidia(index: int, name: str, free: int, total: int, capability: tuple[int, int]) -> Accelerator:
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


def _cuda(torch: Any) -> list[Accelerator]:
    """NVIDIA and AMD devices; both are ``cuda`` to torch."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    if torch.version.hip is None and (known := _ask_nvml(count)) is not None:
        return known
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)  # creates a context: some hundred MiB, kept until exit
        name = torch.cuda.get_device_name(index)
        if torch.version.hip is None:
            found.append(_nvidia(index, name, free, total, torch.cuda.get_device_capability(index)))
        else:
            found.append(
                Accelerator(
                    index=index,
                    name=name,
                    kind="rocm",
                    total_bytes=total,
                    free_bytes=free,
                    compute_capability=None,
                    bf16=bool(torch.cuda.is_bf16_supported()),
                    fp16=True,
                    tf32=False,
                )
            )
    return found


def _ask_nvml(count: int) -> list[Accelerator] | None:
    """NVIDIA devices through nvidia-ml-py; None where it is not installed or could mean other devices than torch."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return nvml_devices(pynvml, count, os.environ)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def nvml_devices(nvml: Any, count: int, environ: Mapping[str, str]) -> list[Accelerator] | None:
    """The ``count`` devices that torch sees, described by NVML; None when the two might number them differently.

    NVML knows every device in bus order and no ``CUDA_VISIBLE_DEVICES``; CUDA orders the fastest first. They agree
    when all devices are of one model, or when ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. A MIG slice is left to torch.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    names = [nvml.nvmlDeviceGetName(handle) for handle in handles]
    if len(set(names)) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    if any(_is_mig(nvml, handle) for handle in handles):
        return None
    order = visible_devices(environ.get("CUDA_VISIBLE_DEVICES"), [nvml.nvmlDeviceGetUUID(h) for h in handles])
    if order is None or len(order) != count:
        return None
    found = []
    for index, place in enumerate(order):
        memory = nvml.nvmlDeviceGetMemoryInfo(handles[place])
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handles[place])
        found.append(_nvidia(index, names[place], int(memory.free), int(memory.total), (major, minor)))
    return found


def _is_mig(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # not supported: no device of this kind can be sliced
        return False
    return bool(current)


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


def _xpu(torch: Any) -> list[Accelerator]:
    """Intel GPUs."""
    if not torch.xpu.is_available():
        return []
    found = []
    for index in range(torch.xpu.device_count()):
        properties = torch.xpu.get_device_properties(index)
        try:
            free, total = torch.xpu.mem_get_info(index)
        except RuntimeError:  # some drivers do not tell what other processes took
            total = properties.total_memory
            free = total - torch.xpu.memory_reserved(index)
        found.append(
            Accelerator(
                index=index,
                name=properties.name,
                kind="xpu",
                total_bytes=total,
                free_bytes=free,
                compute_capability=None,
                bf16=bool(torch.xpu.is_bf16_supported()),
                fp16=bool(properties.has_fp16),
                tf32=False,
            )
        )
    return found


def _mps(torch: Any) -> list[Accelerator]:
    """The GPU of an Apple chip. It shares the RAM: total is Metal's recommended working set."""
    if not torch.backends.mps.is_available():
        return []
    import psutil

    total = torch.mps.recommended_max_memory()
    free = min(total - torch.mps.driver_allocated_memory(), psutil.virtual_memory().available)
    return [
        Accelerator(
            index=0,
            name="Apple GPU",
            kind="mps",
            total_bytes=total,
            free_bytes=max(0, free),
            compute_capability=None,
            bf16=bool(torch.backends.mps.is_macos_or_newer(14, 0)),  # Metal has bfloat from macOS 14
            fp16=True,
            tf32=False,
        )
    ]
