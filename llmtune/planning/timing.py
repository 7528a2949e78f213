"""Closed-form prediction of time: arithmetic of one update over the rate this machine can be expected to reach.

The rates are nominal and said to be estimates; the progress display replaces them by what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.hardware import Hardware
from llmtune.models import ModelSpec

# Matrix rate per core in FLOP/s. Measured on AMX cores with torch 2.13: 2.05e12 bf16 and 0.33e12 fp32 on two of them.
CPU_CORE_RATE = {"amx": 1.0e12, "avx512_bf16": 0.25e12, "fp32": 0.16e12}
# Dense bf16/fp16 tensor rates from the vendor's data sheets, by a part of the device name; first match counts.
GPU_RATES = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40", 181e12),
    ("4090", 165e12),
    ("3090", 71e12),
    ("A10", 125e12),
    ("T4", 65e12),
    ("V100", 125e12),
)
UNKNOWN_GPU_RATE = 50e12
# Share of the matrix rate that a training step reaches. CPU: 13 % measured on a 135M model on two AMX cores.
CPU_SHARE, GPU_SHARE = 0.13, 0.40
# Time of one layer's forward and backward that does not shrink with the model: kernel launches, Python.
# Measured on two CPU cores: 3 ms.
LAYER_OVERHEAD_SECONDS = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Predicted seconds of one update and of all of them, evaluation included."""

    step_seconds: float
    total_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The ``time`` object of ``plan --json``."""
        return {"step_seconds": round(self.step_seconds, 4), "total_seconds": round(self.total_seconds, 1)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TimeEstimate:
        """The inverse of ``to_json``."""
        return cls(**document)


def flops_per_token(spec: ModelSpec, *, method: str, adapter_parameters: int, length: float) -> float:
    """Forward and backward FLOP of one token in a row of ``length`` tokens.

    LoRA: ``4 N_b + 6 N_l + 4 N_h + 6 q S L``; full fine-tuning: ``6 N_b + 6 N_h + 6 q S L``.
    """
    shape = spec.shape
    attention = 6 * shape.heads * shape.head_dim * length * shape.layers
    if method == "full":
        return 6 * spec.block_parameters + 6 * spec.head_parameters + attention
    return 4 * spec.block_parameters + 6 * adapter_parameters + 4 * spec.head_parameters + attention


def matrix_rate(hardware: Hardware, device: str, precision: str) -> float:
    """FLOP/s that a training step can be expected to reach on ``device``."""
    if device == "cpu":
        cpu = hardware.cpu
        kind = "fp32" if precision == "fp32" else "amx" if cpu.amx else "avx512_bf16" if cpu.avx512_bf16 else "fp32"
        return CPU_CORE_RATE[kind] * cpu.usable_cores * CPU_SHARE
    name = next((a.name for a in hardware.accelerators), "")
    rate = next((rate for part, rate in GPU_RATES if part in name), UNKNOWN_GPU_RATE)
    return rate * GPU_SHARE * (0.5 if precision == "fp32" else 1.0)


def predict_time(
    *,
    flops_per_update: float,
    rate: float,
    micro_batches: int,
    layers: int,
    updates: int,
    evaluation_share: float,
) -> TimeEstimate:
    """Seconds of one update (arithmetic plus per-layer overhead) and of the whole run.

    Args:
        flops_per_update: FLOP of one update on one process.
        rate: FLOP/s of that process.
        micro_batches: Forward passes per update on one process.
        layers: Decoder layers.
        updates: Updates of the run.
        evaluation_share: Time of all evaluations as a share of the updates' time.
    """
    step = flops_per_update / rate + micro_batches * layers * LAYER_OVERHEAD_SECONDS
    return TimeEstimate(step_seconds=step, total_seconds=step * updates * (1 + evaluation_share))
