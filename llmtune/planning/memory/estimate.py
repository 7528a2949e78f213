"""What a prediction is asked with and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES_PER_VALUE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
# Share of a device's free memory that a plan may use; the rest covers fragmentation and what others allocate.
USABLE_SHARE = 0.92


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted peak of one process.

    The terms are those of the moment in training when most is alive. ``loading``, ``evaluation`` and ``save snapshot``
    say what these need beyond it.

    Attributes:
        device: What the memory belongs to, e.g. ``cpu`` or ``cuda:0``.
        total_bytes: Memory the device has (RAM or the cgroup's limit on CPU).
        free_bytes: Memory that may be used now.
        tensor_peak_bytes: Sum of the tensor terms.
        peak_bytes: What the machine sees: device peak, or on CPU the resident set, interpreter included.
        pass_bytes: What the largest forward and backward pass takes beside weights, adapter and optimizer state,
            gradients included; 0 in documents of versions that did not say.
        terms: Bytes by name; they add up to ``peak_bytes``.
    """

    device: str
    total_bytes: int
    free_bytes: int
    tensor_peak_bytes: int
    peak_bytes: int
    pass_bytes: int = 0
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
            "pass_bytes": self.pass_bytes,
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
        precision: bf16, fp16, tf32 or fp32 arithmetic.
        dropout: Of the adapter; above 0 it keeps which values of its input were dropped.
        tokens: Padded tokens of the largest micro-batch. A label may follow every one of them.
        width: Padded tokens of its longest row.
        packed: Whether rows lie end to end in one of ``tokens``.
        checkpoint_every: Every n-th layer is recomputed in the backward pass; 0 recomputes none.
        offload: Whether what recomputed layers start from waits in host memory.
        optimizer: A name of transformers' ``OptimizerNames``.
        sharding: How the model is spread over the ranks: ``fsdp2``, ``zero2``, ``zero3``, or None (DDP, one process).
        processes: Ranks that train together.
        accumulates: Whether gradients of an earlier forward pass of the same update are there.
        shapes: Different numbers of tokens among the passes of the whole run.
        window: Tokens that attention looks back over, itself included; None for all.
        varlen: Whether the device has a kernel for packed rows: CUDA.
        threads: Of this process, on a CPU.
        vector_bf16: Whether that CPU has bf16 products, but no AMX: attention goes in blocks both ways.
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
    accumulates: bool = True
    shapes: int = 1
    window: int | None = None
    varlen: bool = False
    threads: int = 1
    vector_bf16: bool = False
