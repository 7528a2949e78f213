"""Tries, cheaply, each thing that a run may want to use, and says why it is or is not usable here."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmtune.hardware.facts import Accelerator, Hardware
from llmtune.heap import VARIABLE, helpful_tunables


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """Whether something can be used on this machine, and why."""

    available: bool
    why: str


def probe_all(hardware: Hardware) -> dict[str, Usable]:
    """Everything that ``llmtune doctor`` lists as usable, by name."""
    return {
        **_precisions(hardware),
        "amx": _yes_or_no(
            hardware.cpu.amx, "the CPU has amx_tile and amx_bf16", "the CPU has no amx_tile and amx_bf16"
        ),
        "bitsandbytes_4bit": _bitsandbytes(bits=4),
        "bitsandbytes_8bit": _bitsandbytes(bits=8),
        "flash_attention": _flash_attention(hardware),
        "compile": _compile(hardware),
        "heap_for_tensors": _heap(),
        "distributed_gloo": _distributed("gloo", hardware),
        "distributed_nccl": _distributed("nccl", hardware),
        "deepspeed": _package("deepspeed", "pip install deepspeed"),
        "sentencepiece": _package("sentencepiece", "pip install 'llmtune[sentencepiece]'"),
        "tensorboard": _package("tensorboard", "pip install 'llmtune[tracking]'"),
        "nvidia_ml_py": _package("pynvml", "pip install 'llmtune[nvidia]'"),
        "postgresql": _package("psycopg", "pip install 'llmtune[postgresql]'"),
    }


def _yes_or_no(available: bool, yes: str, no: str) -> Usable:
    return Usable(available=available, why=yes if available else no)


def _precisions(hardware: Hardware) -> dict[str, Usable]:
    supported = hardware.precision_support
    if hardware.accelerators:
        where = ", ".join(dict.fromkeys(a.name for a in hardware.accelerators))
        return {p: _yes_or_no(p in supported, where, f"not on {where}") for p in ("bf16", "fp16", "tf32")}
    flag = "AMX" if hardware.cpu.amx else "AVX512-BF16"
    return {
        "bf16": _yes_or_no("bf16" in supported, f"the CPU has {flag}", "the CPU has neither AMX nor AVX512-BF16"),
        "fp16": Usable(available=False, why="no accelerator; fp16 training needs one"),
        "tf32": Usable(available=False, why="no accelerator; TF32 is a format of NVIDIA tensor cores"),
    }


def _package(module: str, mend: str) -> Usable:
    return _yes_or_no(find_spec(module) is not None, "installed", f"not installed: {mend}")


def _bitsandbytes(*, bits: int) -> Usable:
    """Quantises 64 x 64 numbers and back; bitsandbytes can be installed and its native library not load."""
    # On a CPU with AVX512-BF16 its import warns that an optional kernel was not fetched from the Hub; we never fetch.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.arange(64 * 64, dtype=torch.float32, device=device).sin().reshape(64, 64)
        if bits == 4:
            back = functional.dequantize_4bit(*functional.quantize_4bit(numbers, quant_type="nf4"))
        else:
            packed, scales, _ = functional.int8_vectorwise_quant(numbers.half())
            back = functional.int8_vectorwise_dequant(packed, scales)
        error = float((back - numbers).abs().max())
    except Exception as problem:  # a foreign native library: whatever it raises is the answer to report
        return Usable(available=False, why=f"{type(problem).__name__}: {str(problem).strip()[:200]}")
    # NF4's widest gap, -1 to -0.696, rounds by at most 0.152 (QLoRA, arXiv 2305.14314, appendix E).
    return _yes_or_no(error < 0.16, f"tried on {device}, error {error:.3f}", f"wrong numbers, error {error:.3f}")


def _flash_attention(hardware: Hardware) -> Usable:
    """That of torch; the package flash-attn is not used."""
    able = any(a.compute_capability is not None and a.compute_capability >= (8, 0) for a in hardware.accelerators)
    return _yes_or_no(able, "torch's own", "torch's own needs an NVIDIA GPU of compute capability 8.0 or more")


def _heap() -> Usable:
    tunables = ":".join(helpful_tunables())
    if not tunables:
        return Usable(available=False, why="this C library and this kernel have nothing to set, or nothing to mend")
    return Usable(available=True, why=f"llmtune sets it for itself; for programs of your own: {VARIABLE}={tunables}")


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call."""
    names = shlex.split(os.environ.get("CXX", "")) or ["g++", "clang++", "c++", "cl"]
    return next((path for name in names if (path := shutil.which(name))), None)


def can_compile(accelerators: Sequence[Accelerator]) -> bool:
    """Whether what torch.compile needs is installed, untried: a compiler, Python's headers, triton."""
    if any(a.kind in ("cuda", "rocm", "xpu") for a in accelerators) and find_spec("triton") is None:
        return False
    return find_compiler() is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _compile(hardware: Hardware) -> Usable:
    """Lets the C++ compiler that torch.compile would call check a file that includes Python.h, as inductor's do."""
    if any(a.kind in ("cuda", "rocm", "xpu") for a in hardware.accelerators) and find_spec("triton") is None:
        return Usable(available=False, why="not installed: pip install triton")
    compiler = find_compiler()
    if compiler is None:
        return Usable(available=False, why="no C++ compiler: apt install g++, or xcode-select --install")
    if os.path.basename(compiler).lower().startswith("cl."):
        return Usable(available=True, why=compiler)
    command = [compiler, "-fsyntax-only", "-x", "c++", f"-I{sysconfig.get_path('include')}", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>\n", text=True, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Usable(available=False, why=f"{compiler} cannot be run: {error}")
    return _yes_or_no(tried.returncode == 0, compiler, f"{compiler} does not find Python.h: apt install python3-dev")


def _distributed(backend: str, hardware: Hardware) -> Usable:
    try:
        import torch.distributed as distributed
    except (ImportError, OSError) as error:
        return Usable(available=False, why=f"torch cannot be imported: {error}")
    built: Mapping[str, bool] = {
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
    }
    if not built[backend]:
        return Usable(available=False, why=f"this build of torch has no {backend}")
    if backend == "nccl" and not any(a.kind in ("cuda", "rocm") for a in hardware.accelerators):
        return Usable(available=False, why="no GPU")
    return Usable(available=True, why=f"torch is built with {backend}")
