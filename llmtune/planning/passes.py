"""What one forward and backward pass and one optimizer step take: arithmetic, traffic and launches over a speed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmtune.hardware import Cpu, Speed
from llmtune.models import ModelSpec
from llmtune.planning.memory import BYTES_PER_VALUE, Footprint, Paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the parts of a forward and backward pass beside the large matrix products cost on one kind of device.

    Attributes:
        value: Bytes of traffic per value of a layer's activations.
        adapter: Bytes of traffic per input value of an adapted module, and twice those per output value.
        peft_adapter: The same where PEFT computes the adapter and not ``llmtune.kernels``.
        dropout: Bytes of traffic per input value that an adapter's dropout sees.
        logit: Bytes of traffic per position and word of the vocabulary, in new memory.
        cast: Bytes of traffic per weight of an fp32 model that is computed in bf16, in new memory, per pass.
        unpacking: Bytes of traffic per 4-bit weight and use.
        optimizer: Bytes of traffic per trained parameter and update.
        launches: Times of one small operation per launched operation, its bookkeeping for the backward pass included.
        weight_gradient: How much longer the product for a weight's gradient takes than the other two, in bf16.
        overlaps: Whether operations are launched while the device computes.
    """

    value: float
    adapter: float
    peft_adapter: float
    dropout: float
    logit: float
    cast: float
    unpacking: float
    optimizer: float
    launches: float
    weight_gradient: float
    overlaps: bool


# Fitted to 25 updates by ``tests/benchmarks/bench_time.py --fit``: Llama, Qwen2, Phi and GPT-2 of 8M to 220M parameters
# with random weights; LoRA, QLoRA and full fine-tuning, bf16 and fp32, 64 to 2,000 tokens, with and without
# recomputation and dropout; two AMX cores, torch 2.13, transformers 5.23, peft 0.21. Rates: 1.34e12 FLOP/s bf16,
# 0.22e12 fp32, 66e9 and 6.4e9 bytes/s, 1.0e-6 s per operation. Predicted over measured: 0.79 to 1.18, rms 0.11 from 1.
# Those cannot tell all apart: ``optimizer`` is counted (norm, clipping, AdamW), ``adapter`` and ``weight_gradient`` are
# held. ``unpacking`` is the other CPU's, in seconds: it was fitted here when QLoRA still added up in fp32.
AMX_CPU = Costs(
    value=43,
    adapter=10,
    peft_adapter=304,
    dropout=264,
    logit=54,
    cast=16,
    unpacking=35,
    optimizer=40,
    launches=61,
    weight_gradient=2.0,
    overlaps=False,
)
# The same 25 updates on two cores of an AMD EPYC of the fifth generation (AVX512-BF16, no AMX), whose tensors in caches
# are read five times as fast. Rates: 1.0e12 FLOP/s bf16, 0.22e12 fp32, 330e9 and 19e9 bytes/s, 0.8e-6 s per operation.
# Predicted over measured: 0.93 to 1.26, 24 of 25 within 25 %, rates measured anew. ``unpacking`` was fitted later, with
# two cases more.
VECTOR_CPU = replace(
    AMX_CPU,
    value=207,
    peft_adapter=937,
    dropout=22,
    logit=46,
    cast=13,
    unpacking=175,
    launches=11,
)
# Counted from what the kernels read and write, not measured. With these a LoRA of an 8B model on one H100 comes to
# about 10,000 tokens/s at 4,096 tokens; NeMo AutoModel publishes 12,473 with kernels of its own.
ACCELERATOR = Costs(
    value=12,
    adapter=20,
    peft_adapter=20,
    dropout=10,
    logit=30,
    cast=12,
    unpacking=3,
    optimizer=40,
    launches=3,
    weight_gradient=1.0,
    overlaps=True,
)
# Share of traffic and launches that belongs to the forward pass; evaluations of the same models took 0.26 to 0.47.
FORWARD_SHARE = 0.37
# Operations of one decoder layer, forward and backward, and of one adapted module in it. Counts of a Llama.
LAYER_OPERATIONS, ADAPTER_OPERATIONS = 60, 12
# Operations per trained tensor and update: gradient norm, clipping and optimizer (45 microseconds on that core).
TENSOR_OPERATIONS = 50
# What a layer's recomputation starts from goes to the host and back: PCIe 4.0 with 16 lanes. An estimate.
OFFLOAD_BYTES_PER_SECOND = 20e9


def costs_of(device_type: str, cpu: Cpu) -> Costs:
    """What passes cost there. A CPU without bf16 products trains in fp32, which was fitted on one with AMX."""
    if device_type != "cpu":
        return ACCELERATOR
    return VECTOR_CPU if cpu.vector_bf16 else AMX_CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast one process works: what its device reaches, to launch one operation, and what operations cost there."""

    speed: Speed
    op_seconds: float
    costs: Costs

    def matmul(self, precision: str) -> float:
        """FLOP/s; a precision that was not measured has no instruction of its own and is computed in fp32."""
        return self.speed.matmul.get(precision, self.speed.matmul["fp32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """Seconds of forward and backward: per token and per pass on the device, and per pass to launch it."""

    token_seconds: float
    pass_seconds: float
    launch_seconds: float
    overlaps: bool

    def seconds(self, tokens: float, passes: float) -> float:
        """Of so many tokens in so many passes."""
        device = tokens * self.token_seconds + passes * self.pass_seconds
        launch = passes * self.launch_seconds
        # Launching runs ahead of the device until something waits for a result: the slower of the two counts, and where
        # they are alike, somewhat more. An estimate.
        return math.hypot(device, launch) if self.overlaps else device + launch


def training_pass(
    spec: ModelSpec,
    footprint: Footprint,
    paths: Paths,
    pace: Pace,
    *,
    length: float,
    scored: float,
    adapter_parameters: int,
) -> PassTime:
    """Forward and backward of rows of ``length`` tokens, of which the share ``scored`` (ρ) goes through the head.

    LoRA: ``4 N_b + 6 N_l + 4 ρ N_h + 6 q S L`` FLOP per token; full fine-tuning: ``6 N_b + 6 ρ N_h + 6 q S L``.
    """
    costs, speed = pace.costs, pace.speed
    weights = spec.block_parameters + scored * spec.head_parameters
    attention = 2 * spec.shape.heads * spec.shape.head_dim * length * spec.shape.layers
    products = 2.0
    if footprint.method == "full":
        products += costs.weight_gradient if BYTES_PER_VALUE[footprint.precision] == 2 else 1.0
    again = 1 / footprint.checkpoint_every if footprint.checkpoint_every else 0.0
    flops = products * 2 * weights + 3 * attention + again * (2 * spec.block_parameters + attention)
    token = flops / pace.matmul(footprint.precision) + 6 * adapter_parameters / pace.matmul("fp32")
    token += (1 + again * FORWARD_SHARE) * _layer_traffic(spec, footprint, paths, costs) / speed.memory_bytes_per_second
    token += scored * costs.logit * spec.shape.vocabulary / speed.fresh_bytes_per_second
    if footprint.offload:
        token += 2 * 2 * spec.shape.hidden * spec.shape.layers / OFFLOAD_BYTES_PER_SECOND
    return PassTime(
        token_seconds=token,
        pass_seconds=_weight_seconds(spec, footprint, pace, uses=2 + again),
        launch_seconds=(1 + again * FORWARD_SHARE) * _launch_seconds(spec, footprint, pace),
        overlaps=costs.overlaps,
    )


def forward_pass(
    spec: ModelSpec, footprint: Footprint, paths: Paths, pace: Pace, *, length: float, scored: float
) -> PassTime:
    """Forward alone, of rows of ``length`` tokens, of which the share ``scored`` goes through the head."""
    shape, speed = spec.shape, pace.speed
    attention = 2 * shape.heads * shape.head_dim * length * shape.layers
    flops = 2 * (spec.block_parameters + scored * spec.head_parameters) + attention
    traffic = _layer_traffic(spec, footprint, paths, pace.costs, trains=False) / speed.memory_bytes_per_second
    traffic += scored * pace.costs.logit * shape.vocabulary / speed.fresh_bytes_per_second
    return PassTime(
        token_seconds=flops / pace.matmul(footprint.precision) + FORWARD_SHARE * traffic,
        pass_seconds=_weight_seconds(spec, footprint, pace, uses=1),
        launch_seconds=FORWARD_SHARE * _launch_seconds(spec, footprint, pace),
        overlaps=pace.costs.overlaps,
    )


def optimizer_seconds(spec: ModelSpec, footprint: Footprint, pace: Pace, trainable: int) -> float:
    """Gradient norm, clipping and the optimizer's step; sharded weights are each updated by one rank."""
    here = trainable / (footprint.processes if footprint.sharding else 1)
    modules = spec.linears if footprint.method == "full" else spec.targeted(footprint.targets)
    tensors = sum(module.count for module in modules) * (1 if footprint.method == "full" else 2)
    operations = 0.0 if pace.costs.overlaps else TENSOR_OPERATIONS * tensors * pace.op_seconds
    return pace.costs.optimizer * here / pace.speed.memory_bytes_per_second + operations


def _layer_traffic(spec: ModelSpec, footprint: Footprint, paths: Paths, costs: Costs, *, trains: bool = True) -> float:
    """Bytes per token that all layers move beside their matrix products, forward and backward."""
    shape = spec.shape
    mlp = (5 if shape.gated_mlp else 3) * shape.mlp_width
    traffic = costs.value * shape.layers * (10 * shape.hidden + 4 * shape.heads * shape.head_dim + mlp)
    if footprint.method == "full":
        return traffic
    modules = spec.targeted(footprint.targets)
    values = sum(m.count * (m.in_features + 2 * m.out_features) for m in modules)
    if paths.adapters:
        traffic += costs.adapter * values
    else:  # in fp32; a base in another precision has its values cast to that and back
        traffic += (1.0 if BYTES_PER_VALUE[footprint.precision] == 2 else 0.6) * costs.peft_adapter * values
    if trains and footprint.dropout > 0:
        traffic += costs.dropout * sum(m.count * m.in_features for m in modules)
    return traffic


def _weight_seconds(spec: ModelSpec, footprint: Footprint, pace: Pace, *, uses: float) -> float:
    """To read the weights of a pass, to cast those of an fp32 model, and to unpack 4-bit ones at each use."""
    memory, costs = pace.speed.memory_bytes_per_second, pace.costs
    seconds = uses * BYTES_PER_VALUE[footprint.precision] * spec.parameters / memory
    if footprint.method == "full" and BYTES_PER_VALUE[footprint.precision] == 2:
        weights = spec.block_parameters + spec.head_parameters
        seconds += uses / 2 * costs.cast * weights / pace.speed.fresh_bytes_per_second
    if footprint.quantization is not None:
        seconds += uses * costs.unpacking * spec.block_parameters / memory
    return seconds


def _launch_seconds(spec: ModelSpec, footprint: Footprint, pace: Pace) -> float:
    """To launch the operations of one pass, forward and backward."""
    modules = 0 if footprint.method == "full" else sum(m.count for m in spec.targeted(footprint.targets))
    operations = LAYER_OPERATIONS * spec.shape.layers + ADAPTER_OPERATIONS * modules
    return operations * pace.costs.launches * pace.op_seconds
