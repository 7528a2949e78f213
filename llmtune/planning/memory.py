"""Closed-form prediction of peak memory, term by term.

The activation formula counts what autograd saves per token and layer of a pre-norm decoder with flash attention. It was
checked byte for byte against saved tensors on two Llama shapes (torch 2.13, transformers 5.23, peft 0.21).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.models import ModelSpec
from llmtune.units import MIB

BYTES_PER_VALUE = {"bf16": 2, "fp16": 2, "fp32": 4}
# NF4 with double quantisation: 4 bits + 8-bit scale per 64 values + fp32 scale per 256 blocks (arXiv:2305.14314, §3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# LLM.int8(): one byte per weight and one fp32 scale per output row, which is below a percent of it.
INT8_BYTES = 1.01
# Resident set of a CPU process that trains, less its tensors. Measured on Linux x86-64, Python 3.11, torch 2.13 with
# builtin:tiny: 470 MiB after importing torch, transformers, peft and datasets; 630 (lora) to 650 MiB (full) in a run.
INTERPRETER_BYTES = 640 * MIB
# Context, kernels and library workspaces of one CUDA process; published figures lie between 0.3 and 0.8 GiB.
CUDA_CONTEXT_BYTES = 600 * MIB
# Share of a device's free memory that a plan may use; the rest covers fragmentation and what others allocate.
USABLE_SHARE = 0.92


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted peak of one process.

    Attributes:
        device: What the memory belongs to, e.g. ``cpu`` or ``cuda:0``.
        total_bytes: Memory the device has (RAM or the cgroup's limit on CPU).
        free_bytes: Memory that may be used now.
        tensor_peak_bytes: Sum of the tensor terms.
        peak_bytes: What the machine sees: device peak, or on CPU the resident set, interpreter included.
        terms: Bytes by name.
    """

    device: str
    total_bytes: int
    free_bytes: int
    tensor_peak_bytes: int
    peak_bytes: int
    terms: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether the peak stays below the usable share of what is free."""
        return self.peak_bytes <= self.free_bytes * USABLE_SHARE

    def to_json(self) -> dict[str, Any]:
        """The ``memory`` object of ``plan --json``."""
        return {
            "device": self.device,
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "peak_bytes": self.peak_bytes,
            "tensor_peak_bytes": self.tensor_peak_bytes,
            "terms": dict(self.terms),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> MemoryEstimate:
        """The inverse of ``to_json``."""
        return cls(**document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The part of a plan that decides memory.

    Attributes:
        method: lora, qlora or full.
        quantization: nf4, int8 or None.
        precision: bf16, fp16 or fp32 arithmetic.
        dropout: Of the adapter; above 0 its input is kept a second time.
        tokens: Padded tokens of the largest micro-batch.
        width: Padded tokens of its longest row; packed rows are one row.
        packed: Whether rows lie end to end and are kept apart by a dense mask.
        checkpoint_every: Every n-th layer is recomputed in the backward pass; 0 recomputes none.
        offload: Whether what recomputed layers start from waits in host memory.
        optimizer: A name of transformers' ``OptimizerNames``.
        sharding: How the model is spread over the ranks: ``fsdp2``, ``zero2``, ``zero3``, or None (DDP, one process).
        processes: Ranks that train together.
    """

    method: str
    quantization: str | None
    precision: str
    rank: int
    targets: tuple[str, ...]
    dropout: float
    tokens: int
    width: int
    packed: bool
    checkpoint_every: int
    offload: bool
    optimizer: str
    sharding: str | None
    processes: int


def predict_memory(
    spec: ModelSpec, footprint: Footprint, *, device: str, total_bytes: int, free_bytes: int
) -> MemoryEstimate:
    """Peak memory of training ``spec`` as ``footprint`` says, on a device with ``free_bytes`` to give."""
    full = footprint.method == "full"
    trainable = spec.parameters if full else spec.adapter_parameters(footprint.rank, footprint.targets)
    terms = {
        "weights": _weight_bytes(spec, footprint),
        "adapter": 0 if full else 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,  # two fp32 moments of Adam
        "activations": _activation_bytes(spec, footprint),
        # The vocabulary-wide logits of every position: stored once in the compute dtype, once in fp32 for the
        # cross-entropy, and their gradients likewise.
        "logits": 12 * spec.shape.vocabulary * footprint.tokens,
    }
    tensors = sum(terms.values())
    terms["interpreter" if device == "cpu" else "context"] = (
        INTERPRETER_BYTES if device == "cpu" else CUDA_CONTEXT_BYTES
    )
    return MemoryEstimate(
        device=device,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        tensor_peak_bytes=tensors,
        peak_bytes=sum(terms.values()),
        terms=terms,
    )


def _weight_bytes(spec: ModelSpec, footprint: Footprint) -> int:
    wide = 4 if footprint.method == "full" else BYTES_PER_VALUE[footprint.precision]
    if footprint.quantization is None:
        return spec.parameters * wide
    per_value = NF4_BYTES if footprint.quantization == "nf4" else INT8_BYTES
    # prepare_model_for_kbit_training holds what is not quantised (embedding, head, norms) in fp32.
    return int(spec.block_parameters * per_value) + 4 * (spec.parameters - spec.block_parameters)


def _activation_bytes(spec: ModelSpec, footprint: Footprint) -> int:
    shape = spec.shape
    h, f = shape.hidden, shape.mlp_width
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_layer = 8 * h + 8 + 4 * h + 4 * q + 4 * kv + 8 * f + 4 * shape.heads
    if footprint.method == "full":
        per_layer += 6 * h + 2 * q  # copies made by bf16 autocast
    else:
        modules = sum(m.count for m in spec.targeted(footprint.targets)) / max(shape.layers, 1)
        per_layer += int(2 * footprint.rank * modules)
        per_layer += 16 * h + 4 * q + 2 * f + 14 * footprint.rank  # inputs cast to the fp32 adapters
    if footprint.precision == "fp32":
        per_layer *= 2
    layers = shape.layers
    if footprint.checkpoint_every:
        return footprint.tokens * (2 * h * layers + per_layer)
    return footprint.tokens * per_layer * layers
