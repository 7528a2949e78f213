"""The texts by which libraries and drivers say what went wrong, and what to do about each.

Most come as a bare ``RuntimeError`` of torch, so that the text is all there is. Sources: torch 2.13 (``c10``, ``aten``,
``torch.utils.data``), the error strings of the CUDA runtime and of HIP, cuBLAS and NCCL as torch passes them on, and
issues in which users met them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.training.recovery.failure import FailureKind

DEVICE_MEMORY, HOST_MEMORY = "memory of the device ran out", "memory of the machine ran out"
DISK_FULL, NO_INODES, NOT_WRITTEN = "the disk is full", "the file system has no inodes left", "a file was not written"
UNREADABLE = "a file of the checkpoint cannot be read"
WORKER_MEMORY = "memory ran out in a worker of the data loader"
CAUGHT_IN_WORKER = re.compile(r"Caught \w+ in (?:DataLoader worker|pin memory thread)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One thing that texts of several libraries say.

    Attributes:
        texts: Regular expressions; one of them is found in the message.
        check: What a person can check or do.
    """

    kind: FailureKind
    cause: str
    texts: re.Pattern[str]
    check: str


def _any(*texts: str) -> re.Pattern[str]:
    return re.compile("|".join(texts))


# In a text of a failed collective it is memory that was the cause, so these are looked for first.
MEMORY = {
    HOST_MEMORY: _any(
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        r"std::bad_alloc",
        r"Cannot allocate memory",
        r"Could not allocate bytes object",  # torch.save without host memory; what follows it looks like a full disk
        r"[Cc]annot allocate \d+ bytes",
    ),
    DEVICE_MEMORY: _any(
        r"[Oo]ut of [Mm]emory",  # CUDA, HIP, XPU, MPS, NPU and Triton, as allocators and as error strings of drivers
        r"OUT_OF_MEMORY",
        r"(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS)_STATUS_ALLOC_FAILED",
        r"(?:CUFFT_ALLOC|CURAND_STATUS_ALLOCATION)_FAILED",
        r"_STATUS_NOT_INITIALIZED when calling `\w+Create",  # no room for the handle
        r"NVML_SUCCESS == .*INTERNAL ASSERT FAILED.*CachingAllocator",  # fails while it words an out-of-memory message
        r"PT_DEVMEM Allocation failed",  # Gaudi
    ),
}

_WORKER = r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\)"

WORKER_KILLED = Sign(
    kind="worker",
    cause="a worker of the data loader was killed",
    texts=_any(rf"{_WORKER} (?:is killed by|exited unexpectedly)", r"Pin memory thread exited unexpectedly"),
    check="Look into `dmesg` for the kernel's out-of-memory killer, or use --set train.num_workers=0.",
)

# Found before anything else: these surface wherever the main process happens to be, in a user's callback too.
ANYWHERE: tuple[Sign, ...] = (
    Sign(
        kind="worker",
        cause="shared memory of the data loader ran out",
        texts=_any(r"out of shared memory", rf"{_WORKER} is killed by signal: Bus error"),
        check="Enlarge /dev/shm (docker run --shm-size=8g), or use --set train.num_workers=0.",
    ),
    WORKER_KILLED,
    Sign(
        kind="worker",
        cause="too many open files",
        texts=_any(r"Too many open files\. Communication with the", r"received \d+ items of ancdata"),
        check="Raise the limit (`ulimit -n 65536`), or use --set train.num_workers=0.",
    ),
    Sign(
        kind="hung",
        cause="the data loader hangs",
        texts=_any(r"DataLoader timed out after"),
        check="Look at the disk or network mount that the data lie on.",
    ),
    Sign(
        kind="hardware",
        cause="uncorrectable ECC error",
        texts=_any(r"uncorrectable ECC error", r"cudaErrorECCUncorrectable", r"[Uu]ncorrectable NVLink error"),
        check="`nvidia-smi -q -d ECC,ROW_REMAPPER`: reset the GPU if rows are pending, replace it if errors come back.",
    ),
    Sign(
        kind="hardware",
        cause="Xid error of the driver",
        texts=_any(r"\bXid\b"),
        check="`dmesg | grep -i xid`, and look the number up: https://docs.nvidia.com/deploy/xid-errors/.",
    ),
    Sign(
        kind="hardware",
        cause="the device was lost",
        texts=_any(
            r"GPU is lost",
            r"fallen off the bus",
            r"no (?:CUDA|ROCm)-capable device is detected",
            r"CUDA-capable device\(s\) is/are busy or unavailable",
            r"DEVICE_LOST",
            r"CUDA error: unknown error",
            r"CUDA error: system not yet initialized",
            r"the launch timed out and was terminated",
        ),
        check="`nvidia-smi` (does it list the GPU?), `dmesg`, power supply and temperature; then restart the machine.",
    ),
    Sign(
        kind="hardware",
        cause="illegal memory access on the device",
        texts=_any(
            r"an illegal memory access was encountered",
            r"cudaErrorIllegalAddress|hipErrorIllegalAddress",
            r"CUDA error: misaligned address",
            r"an illegal instruction was encountered",
            r"unspecified launch failure",
            r"hardware stack error",
            r"invalid program counter",
            r"Memory access fault by GPU",
            r"MEMORY_APERTURE_VIOLATION",
        ),
        check="`dmesg | grep -i xid`: Xid 13 or 31 points to a kernel (update torch and driver), 48, 63, 64, 79, 94 or "
        "95 to the GPU. CUDA_LAUNCH_BLOCKING=1 names the kernel.",
    ),
    Sign(
        kind="hardware",
        cause="an operation on the device failed",
        texts=_any(r"(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"),
        check="`dmesg | grep -i xid`, heat and power (`nvidia-smi -q -d TEMPERATURE,POWER`), then driver and torch.",
    ),
    Sign(
        kind="hardware",
        cause="NCCL error",
        texts=_any(
            r"NCCL error",
            r"nccl(?:System|Internal|Remote|UnhandledCuda)Error",
            r"NCCL communicator was aborted",
            r"[Ww]atchdog caught collective operation timeout",
        ),
        check="Look for the rank that failed first; NCCL_DEBUG=INFO names the link. `nvidia-smi topo -m`, "
        "`nvidia-smi nvlink -s`, and the network between the nodes.",
    ),
    Sign(
        kind="killed",
        cause="another rank is gone",
        texts=_any(r"gloo/transport", r"Connection closed by peer", r"[Ww]ait timeout after \d+ms, keys:"),
        check="Look for the rank that ended first, and into `dmesg` for the kernel's out-of-memory killer.",
    ),
    Sign(
        kind="defect",
        cause="an assertion failed on the device",
        texts=_any(r"device-side assert triggered"),
        check="Most often an index out of range: `llmtune check DATA --model MODEL` finds token ids beyond the "
        "vocabulary. CUDA_LAUNCH_BLOCKING=1 names the line.",
    ),
)
# NCCL words wrong use of itself like a fault of the hardware.
NOT_HARDWARE = _any(r"ncclInvalidUsage", r"ncclInvalidArgument", r"Duplicate GPU detected")

# What a person can do where the operating system names its reason; the second says whether freeing space can help.
DISK_ERRORS: Mapping[int, tuple[str, bool, str]] = {
    errno.ENOSPC: (DISK_FULL, True, "Free space on the disk of the run directory"),
    errno.EDQUOT: ("the disk quota is reached", True, "Free space that your account takes, or have the quota raised"),
    errno.EIO: ("the disk reports an I/O error", True, "Look into `dmesg` and at the disk (`smartctl -a`)"),
    errno.EROFS: (
        "the file system is read-only",
        False,
        "Look into `dmesg`: file systems turn read-only when disks fail",
    ),
    errno.EFBIG: ("the file is too large for its file system", False, "Choose an --output on another disk"),
    errno.ESTALE: ("the network mount has gone stale", False, "Mount it again, or choose an --output on a local disk"),
}
# Only where the run directory is written are these about the disk.
SAVE_ERRORS: Mapping[int, tuple[str, bool, str]] = {
    errno.ENOENT: ("the run directory is gone", False, "Put it back from where it was moved"),
    errno.ENOTDIR: ("the run directory is gone", False, "Put it back from where it was moved"),
    errno.EACCES: ("the run directory may not be written", False, "Mend its permissions"),
    errno.EPERM: ("the run directory may not be written", False, "Mend its permissions"),
}
# Rust (safetensors, tokenizers) and Python name the error's number; others only its text.
OS_ERROR = _any(r"os error (\d+)", r"\[Errno (\d+)\]")
DISK_TEXTS: Mapping[int, re.Pattern[str]] = {
    errno.ENOSPC: _any(r"No space left on device", r"database or disk is full"),
    errno.EDQUOT: _any(r"Disk quota exceeded"),
    errno.EIO: _any(r"Input/output error"),
    errno.EROFS: _any(r"Read-only file system"),
}
# torch.save says that bytes are missing, not why.
WRITER_TEXTS = _any(r"unexpected pos \d+", r"PytorchStreamWriter failed", r"file write failed")
READER_TEXTS = _any(
    r"Weights only load failed",
    r"PytorchStreamReader failed",
    r"[Ee]rror while deserializing",
    r"HeaderTooLarge|HeaderTooSmall|InvalidHeader|MetadataIncompleteBuffer",
    r"invalid load key",
    r"Ran out of input",
    r"unpickling stack underflow|pickle data was truncated",
)
