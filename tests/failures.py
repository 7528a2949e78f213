"""What machines say when they fail, and disks that are small enough to fill."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1 GiB is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call.",
    "HIP out of memory. Tried to allocate 512.00 MiB (GPU 0; 15.98 GiB total capacity)",
    "XPU out of memory. Tried to allocate 1.00 GiB.",
    "NPU out of memory. Tried to allocate 1.00 GiB.",
    "MPS backend out of memory (MPS allocated: 17.00 GiB, other allocations: 1 GiB, max allowed: 18.13 GiB).",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830, please report a bug.',
    "NCCL error in: ../torch/csrc/ncclUtils.hpp:219, unhandled cuda error, ncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "std::bad_alloc",
]


@contextmanager
def small_disk(tmp_path: Path, size: str, inodes: int = 0) -> Iterator[Path]:
    """A file system of a given size; skips where it cannot be mounted."""
    place = tmp_path / f"disk-{time.monotonic_ns()}"
    place.mkdir()
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def asked(place: Path, needed: int | None = None) -> dict[str, Any]:
    return {
        "free_disk_bytes": lambda: os.statvfs(place).f_bavail * os.statvfs(place).f_frsize,
        "free_inodes": lambda: os.statvfs(place).f_favail,
        "needed_disk_bytes": needed,
    }
