"""What a device can be expected to do where nothing was measured on it: data sheets and common experience."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmtune.hardware.device import DeviceChoice
from llmtune.hardware.facts import Cpu, Hardware, Rates, Speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One device's data sheet.

    Attributes:
        part: What its name contains, as words of their own.
        half: FLOP/s of dense bf16 or fp16 matrix products, accumulated in fp32.
        single: FLOP/s in fp32, without TF32.
        memory: Bytes per second of its memory.
    """

    part: str
    half: float
    single: float
    memory: float


def _sheets(*rows: tuple[str, float, float, float]) -> tuple[Sheet, ...]:
    """Rows of name, TFLOP/s in half and single precision, and GB/s."""
    return tuple(
        Sheet(part=part, half=half * 1e12, single=single * 1e12, memory=memory * 1e9)
        for part, half, single, memory in rows
    )


# First match counts, so the longer of two names comes first. Rates as vendors publish them, with fp32 accumulation and
# without sparsity, written down from memory; L4, L40S, A10, A40, A100, H100 and H200 were compared with NVIDIA's data
# sheets. The arithmetic of Apple's M3 and later is an estimate from their number of cores. Measured rates replace them.
SHEETS = _sheets(
    ("GB200", 2500, 80, 8000),
    ("B300", 2250, 75, 8000),
    ("B200", 2250, 75, 7700),
    ("GH200", 990, 67, 4000),
    ("H200", 989, 67, 4800),
    ("H100 NVL", 835, 60, 3900),
    ("H100 PCIe", 756, 51, 2000),
    ("H100", 989, 67, 3350),
    ("H800", 989, 67, 3350),
    ("A100-SXM4-40GB", 312, 19.5, 1555),
    ("A100-PCIE-40GB", 312, 19.5, 1555),
    ("A100", 312, 19.5, 1935),
    ("A800", 312, 19.5, 1935),
    ("A40", 149.7, 37.4, 696),
    ("A30", 165, 10.3, 933),
    ("A10G", 70, 35, 600),
    ("A10", 125, 31.2, 600),
    ("L40S", 362, 91.6, 864),
    ("L40", 181, 90.5, 864),
    ("L4", 121, 30.3, 300),
    ("T4", 65, 8.1, 320),
    ("V100", 125, 15.7, 900),
    ("P100", 18.7, 9.3, 732),
    ("RTX PRO 6000", 504, 126, 1792),
    ("RTX 6000 Ada", 364, 91.1, 960),
    ("RTX A6000", 154.8, 38.7, 768),
    ("RTX A5000", 111.1, 27.8, 768),
    ("RTX A4000", 76.7, 19.2, 448),
    ("RTX 5090", 209.5, 104.8, 1792),
    ("RTX 5080", 112.6, 56.3, 960),
    ("RTX 5070 Ti", 87.9, 43.9, 896),
    ("RTX 5070", 61.7, 30.9, 672),
    ("RTX 5060", 47.4, 23.7, 448),
    ("RTX 4090", 165.2, 82.6, 1008),
    ("RTX 4080", 97.5, 48.7, 717),
    ("RTX 4070 Ti", 80.2, 40.1, 504),
    ("RTX 4070", 58.3, 29.1, 504),
    ("RTX 4060", 30.2, 15.1, 272),
    ("RTX 3090", 71, 35.6, 936),
    ("RTX 3080", 59.5, 29.8, 760),
    ("RTX 3070", 40.6, 20.3, 448),
    ("RTX 3060", 25.3, 12.7, 360),
    ("RTX 2080 Ti", 53.8, 13.4, 616),
    ("MI355X", 2500, 157, 8000),
    ("MI350X", 2300, 144, 8000),
    ("MI325X", 1307, 163, 6000),
    ("MI300X", 1307, 163, 5300),
    ("MI300A", 981, 123, 5300),
    ("MI250", 191.5, 23.9, 1638),  # one of its two dies, which is what torch calls a device
    ("MI210", 181, 22.6, 1638),
    ("MI100", 92, 23.1, 1229),
    ("RX 7900 XTX", 122.8, 61.4, 960),
    ("M1 Ultra", 21, 21, 800),
    ("M1 Max", 10.4, 10.4, 400),
    ("M1 Pro", 5.2, 5.2, 200),
    ("Apple M1", 2.6, 2.6, 68),
    ("M2 Ultra", 27.2, 27.2, 800),
    ("M2 Max", 13.6, 13.6, 400),
    ("M2 Pro", 6.8, 6.8, 200),
    ("Apple M2", 3.6, 3.6, 100),
    ("M3 Ultra", 28, 28, 819),
    ("M3 Max", 14, 14, 400),
    ("M3 Pro", 6.4, 6.4, 150),
    ("Apple M3", 3.5, 3.5, 100),
    ("M4 Max", 17, 17, 546),
    ("M4 Pro", 8.5, 8.5, 273),
    ("Apple M4", 4.3, 4.3, 120),
)
# Estimates, for a device of a few years' age.
UNKNOWN = {
    "cuda": Sheet(part="", half=50e12, single=12e12, memory=400e9),
    "xpu": Sheet(part="", half=100e12, single=15e12, memory=450e9),
    "mps": Sheet(part="", half=5e12, single=5e12, memory=150e9),
}
# What a large product reaches of the data sheet: 790 of 989 TFLOP/s on an H200 with random data.
_REACHED = 0.8

# Matrix products per core, in FLOP/s. AMX was measured with torch 2.13: 2.05e12 in bf16 and 0.33e12 in fp32 on two
# cores, 1.0e12 and 0.16e12 on one; AVX512-BF16 on an AMD EPYC of the fifth generation, which computes twice as wide as
# the fourth: 1.0e12 in bf16 on two cores, 0.5e12 on one. The last is an estimate.
CPU_CORE_RATE = {"amx": 1.0e12, "avx512_bf16": 0.5e12, "fp32": 0.16e12, "fp32_without_avx512": 0.08e12}
# One core with torch 2.13: product of two tensors that stay in its caches (AMX; that EPYC), and of two that are
# allocated anew.
_CPU_CORE_MEMORY, _VECTOR_CORE_MEMORY, _CPU_CORE_FRESH, _CPU_MEMORY = 40e9, 180e9, 7e9, 40e9
# A small operation launched by torch 2.13: 0.85 microseconds on that CPU; an accelerator's, about 6 (estimate).
_CPU_OP_SECONDS, _ACCELERATOR_OP_SECONDS = 1e-6, 6e-6
_DISK = 300e6  # estimate: a solid-state disk that is not new, synchronised


def sheet_of(device: DeviceChoice) -> Sheet:
    """The data sheet of an accelerator by its name, or what one of its kind does at least."""
    for sheet in SHEETS:
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(sheet.part)}(?![0-9])", device.name):  # A40 is not A4000
            return sheet
    return UNKNOWN.get(device.type, UNKNOWN["cuda"])


def nominal_rates(hardware: Hardware, device: DeviceChoice) -> Rates:
    """The rates of ``device`` in the form in which they are measured."""
    if device.type == "cpu":
        cores = min(hardware.cpu.physical_cores, hardware.cpu.usable_cores)
        speeds = tuple(_cpu_speed(hardware.cpu, threads) for threads in sorted({1, cores}))
        op_seconds = _CPU_OP_SECONDS
    else:
        sheet = sheet_of(device)
        # Tensor cores that have TF32 do half as many products in it.
        rates = {"bf16": sheet.half, "fp16": sheet.half, "tf32": sheet.half / 2, "fp32": sheet.single}
        reached = {name: rate * _REACHED for name, rate in rates.items()}
        memory = sheet.memory * _REACHED
        speeds = (Speed(threads=1, matmul=reached, memory_bytes_per_second=memory, fresh_bytes_per_second=memory),)
        op_seconds = _ACCELERATOR_OP_SECONDS
    return Rates(
        device=device.name, speeds=speeds, op_seconds=op_seconds, disk_write_bytes_per_second=_DISK, busy_share=0.0
    )


def _cpu_speed(cpu: Cpu, threads: int) -> Speed:
    return Speed(
        threads=threads,
        matmul={"bf16": bf16_core_rate(cpu) * threads, "fp32": fp32_core_rate(cpu) * threads},
        memory_bytes_per_second=(_VECTOR_CORE_MEMORY if cpu.vector_bf16 else _CPU_CORE_MEMORY) * threads,
        fresh_bytes_per_second=min(_CPU_CORE_FRESH * threads, _CPU_MEMORY),
    )


def bf16_core_rate(cpu: Cpu) -> float:
    """FLOP/s of bf16 products on one core; without an instruction for it torch computes in fp32."""
    kind = "amx" if cpu.amx else "avx512_bf16" if cpu.avx512_bf16 else None
    return CPU_CORE_RATE[kind] if kind else fp32_core_rate(cpu)


def fp32_core_rate(cpu: Cpu) -> float:
    """FLOP/s of fp32 products on one core; bf16 instructions come with the wide registers."""
    return CPU_CORE_RATE["fp32" if cpu.amx or cpu.avx512_bf16 else "fp32_without_avx512"]
