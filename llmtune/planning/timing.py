"""Closed-form prediction of time: arithmetic of one update over the rate this machine can be expected to reach.

The rates are nominal and said to be estimates; the progress display replaces them by what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.hardware import DeviceChoice, Hardware
from llmtune.models import ModelSpec
from llmtune.planning.memory import Footprint

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
# Share of the matrix rate that a training step reaches. CPU: 13 % measured on a 135M model on two AMX cores. GPU: what
# published LoRA runs reach (NeMo AutoModel, Llama 3 8B on one H100: 402 of 989 TFLOP/s).
CPU_SHARE, GPU_SHARE = 0.13, 0.40
# Time of one layer's forward and backward that does not shrink with the rows: kernel launches, Python. An estimate.
LAYER_OVERHEAD_SECONDS = 0.003
# Recomputing the forward pass in the backward one: 6 instead of 4 FLOP per frozen weight, 8 instead of 6 when trained;
# the mean of what was measured, 1.2-1.4.
CHECKPOINTING_COST = 4 / 3
# Unpacking 4-bit weights at every use. An estimate that keeps unquantised weights ahead where both fit.
QUANTIZED_COST = 1.4


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Predicted time of a run.

    Attributes:
        step_seconds: One update.
        total_seconds: All updates, evaluations and saves.
        low_seconds: Least ``total_seconds`` that would be no surprise.
        high_seconds: Most ``total_seconds`` that would be no surprise.
        terms: Seconds by name; they add up to ``total_seconds``.
        basis: What the arithmetic rate rests on: ``nominal`` (data sheets), ``calibrated`` (measured on this machine)
            or ``measured`` (this model's own steps).
    """

    step_seconds: float
    total_seconds: float
    low_seconds: float
    high_seconds: float
    terms: Mapping[str, float]
    basis: str

    def to_json(self) -> dict[str, Any]:
        """The ``time`` object of ``plan --json``."""
        return {
            "step_seconds": self.step_seconds,
            "total_seconds": self.total_seconds,
            "low_seconds": self.low_seconds,
            "high_seconds": self.high_seconds,
            "terms": dict(self.terms),
            "basis": self.basis,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TimeEstimate:
        """The inverse of ``to_json``; plans of earlier versions knew two of the numbers."""
        total = document["total_seconds"]
        before = {"low_seconds": total, "high_seconds": total, "terms": {"training": total}, "basis": "nominal"}
        return cls(**(before | dict(document)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one process has to do.

    Attributes:
        tokens_per_update: Tokens of its share of one update.
        length: Tokens of a row on average.
        micro_batches: Forward passes per update.
        updates: Updates of the run.
        evaluated_tokens: Tokens of all evaluations of the run.
    """

    tokens_per_update: float
    length: float
    micro_batches: int
    updates: int
    evaluated_tokens: float


def flops_per_token(spec: ModelSpec, *, method: str, adapter_parameters: int, length: float) -> float:
    """Forward and backward FLOP of one token in a row of ``length`` tokens.

    LoRA: ``4 N_b + 6 N_l + 4 N_h + 6 q S L``; full fine-tuning: ``6 N_b + 6 N_h + 6 q S L``.
    """
    shape = spec.shape
    attention = 6 * shape.heads * shape.head_dim * length * shape.layers
    if method == "full":
        return 6 * spec.block_parameters + 6 * spec.head_parameters + attention
    return 4 * spec.block_parameters + 6 * adapter_parameters + 4 * spec.head_parameters + attention


def matrix_rate(hardware: Hardware, device: DeviceChoice, precision: str) -> float:
    """FLOP/s that a training step can be expected to reach on ``device``."""
    if device.type == "cpu":
        cpu = hardware.cpu
        kind = "amx" if cpu.amx else "avx512_bf16" if cpu.avx512_bf16 else "fp32"
        return CPU_CORE_RATE[kind if precision == "bf16" else "fp32"] * cpu.usable_cores * CPU_SHARE
    rate = next((rate for part, rate in GPU_RATES if part in device.name), UNKNOWN_GPU_RATE)
    return rate * GPU_SHARE * (0.5 if precision == "fp32" else 1.0)


def predict_time(
    spec: ModelSpec,
    footprint: Footprint,
    workload: Workload,
    *,
    trainable_parameters: int,
    hardware: Hardware,
    device: DeviceChoice,
    processes: int,
) -> TimeEstimate:
    """Seconds of one update (arithmetic plus per-layer overhead) and of the whole run.

    Processes share the cores of a CPU.
    """
    rate = matrix_rate(hardware, device, footprint.precision) / (processes if device.type == "cpu" else 1)
    quantized = QUANTIZED_COST if footprint.quantization else 1.0
    per_token = quantized * flops_per_token(
        spec, method=footprint.method, adapter_parameters=trainable_parameters, length=workload.length
    )
    recomputed = CHECKPOINTING_COST if footprint.checkpoint_every else 1.0
    overhead = workload.micro_batches * spec.shape.layers * LAYER_OVERHEAD_SECONDS
    step = workload.tokens_per_update * per_token * recomputed / rate + overhead
    # Without a backward pass: 2 of the 4 FLOP per frozen weight, 2 of the 6 per trained one.
    forward = per_token * (1 / 3 if footprint.method == "full" else 1 / 2)
    terms = {"training": step * workload.updates, "evaluation": workload.evaluated_tokens * forward / rate}
    total = sum(terms.values())
    return TimeEstimate(
        step_seconds=step,
        total_seconds=total,
        low_seconds=total / 2,
        high_seconds=total * 4,
        terms=terms,
        basis="nominal",
    )
