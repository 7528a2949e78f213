"""The accelerators that torch can use here: CUDA, ROCm, XPU, MPS. A broken driver is a sentence, not a crash."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.hardware import nvidia
from llmtune.hardware.cpu import apple_chip
from llmtune.hardware.facts import Accelerator
from llmtune.hardware.presence import kinds_built, kinds_present

if TYPE_CHECKING:
    from types import ModuleType


def find_accelerators(root: Path = Path("/")) -> tuple[Accelerator, ...]:
    """The accelerators torch can use; torch itself is asked only where nothing else can tell.

    Args:
        root: Where ``dev``, ``proc`` and ``sys`` are looked for.
    """
    if "torch" in sys.modules:  # its own answer costs nothing more, and is the one that counts
        return ask_torch()[0]
    present = kinds_present(root, f"{sys.platform}-{platform.machine()}")
    built = kinds_built()
    kinds = present & (built.keys() | {"mps"})
    if not kinds:
        return ()
    if kinds == {"cuda"} and (cards := nvidia.read_cards()) is not None and nvidia.driver_serves(cards, built["cuda"]):
        known = nvidia.as_torch_numbers(cards, os.environ)
        if known is not None:
            return tuple(known)
    return ask_torch()[0]


def ask_torch() -> tuple[tuple[Accelerator, ...], tuple[str, ...]]:
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


def _cuda(torch: Any) -> list[Accelerator]:
    """NVIDIA and AMD devices; both are ``cuda`` to torch."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    if torch.version.hip is None and (cards := nvidia.read_cards()) is not None:
        known = nvidia.as_torch_numbers(cards, os.environ)
        if known is not None and len(known) == count:
            return known
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)  # creates a context: some hundred MiB, kept until exit
        name = torch.cuda.get_device_name(index)
        if torch.version.hip is None:
            found.append(nvidia.accelerator(index, name, free, total, torch.cuda.get_device_capability(index)))
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
            name=f"{apple_chip() or 'Apple'} GPU",
            kind="mps",
            total_bytes=total,
            free_bytes=max(0, free),
            compute_capability=None,
            bf16=bool(torch.backends.mps.is_macos_or_newer(14, 0)),  # Metal has bfloat from macOS 14
            fp16=True,
            tf32=False,
        )
    ]
