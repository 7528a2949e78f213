"""What is there the whole time: weights, adapter, optimizer state; and gradients, when all are there."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.paths import arithmetic_of

# NF4 with double quantisation: 4 bits + 8-bit scale per 64 values + fp32 scale per 256 blocks (arXiv:2305.14314, §3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Tables of an NF4 weight: 16 and 256 fp32 values (bitsandbytes 0.50, ``QuantState``).
NF4_TABLES = 4 * (16 + 256)
# What a CPU needs per value of the matrix that it is quantising: measured with bitsandbytes 0.50 on matrices of 3
# million values, as the rise above what is quantised already.
QUANTIZING_BYTES = {"nf4": 13.2, "int8": 8.4}
# bitsandbytes' optimizers keep states of tensors below this many values, and of embeddings, in 32 bits.
SMALL_TENSOR = 4096
# 8-bit states: one byte per value and a fp32 scale per block of 256 (``optim/optimizer.py``).
BLOCK_8BIT = 1 + 4 / 256


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerCost:
    """Bytes of an optimizer.

    Attributes:
        state: Per trained parameter, all the time.
        wide_state: The same of tensors whose states stay in 32 bits; None where there is no difference.
        temporary: Copies of the largest tensor in fp32 that one step makes, on a CPU.
        temporary_all: Copies of all trained tensors that one step makes, on a GPU.
        paged: The driver moves the states to host memory when the device is full (CUDA alone).
        factored: States are a row and a column of each matrix.
    """

    state: float
    wide_state: float | None = None
    temporary: float = 0
    temporary_all: float = 0
    paged: bool = False
    factored: bool = False


def _eight_bit(states: int, temporary: float, *, paged: bool = False) -> OptimizerCost:
    return OptimizerCost(state=states * BLOCK_8BIT, wide_state=4 * states, temporary=temporary, paged=paged)


# States: one or two fp32 moments unless said otherwise. Temporaries counted in the optimizers' sources: torch 2.13
# (``_single_tensor_*`` on a CPU, ``_multi_tensor_*`` on a GPU; fused ones none), transformers 5.23 (Adafactor),
# bitsandbytes 0.50 (``backends/cpu/ops.py``, which unpacks a whole tensor; its CUDA kernels need none).
OPTIMIZERS: dict[str, OptimizerCost] = {
    "adamw_torch": OptimizerCost(state=8, temporary=2, temporary_all=1),
    "adamw_torch_fused": OptimizerCost(state=8),
    "adamw_torch_xla": OptimizerCost(state=8),
    "adamw_torch_npu_fused": OptimizerCost(state=8),
    "adamw_anyprecision": OptimizerCost(state=8, temporary=2),  # transformers asks it for fp32 moments
    "adafactor": OptimizerCost(state=4, temporary=2, factored=True),
    "adamw_torch_4bit": OptimizerCost(state=2 * (0.5 + 4 / 128), wide_state=8, temporary=4),
    "adamw_torch_8bit": _eight_bit(2, 4),
    "adamw_8bit": _eight_bit(2, 5),
    "adamw_bnb_8bit": _eight_bit(2, 5),
    "paged_adamw_8bit": _eight_bit(2, 5, paged=True),
    "paged_adamw_32bit": OptimizerCost(state=8, temporary=3, paged=True),
    "ademamix": OptimizerCost(state=12, temporary=4),
    "ademamix_8bit": _eight_bit(3, 8),
    "paged_ademamix_32bit": OptimizerCost(state=12, temporary=4, paged=True),
    "paged_ademamix_8bit": _eight_bit(3, 8, paged=True),
    "lion_32bit": OptimizerCost(state=4, temporary=3),
    "lion_8bit": _eight_bit(1, 5),
    "paged_lion_32bit": OptimizerCost(state=4, temporary=3, paged=True),
    "paged_lion_8bit": _eight_bit(1, 5, paged=True),
    "rmsprop": OptimizerCost(state=4, temporary=2, temporary_all=1),
    "rmsprop_bnb": OptimizerCost(state=4, temporary=3),
    "rmsprop_bnb_32bit": OptimizerCost(state=4, temporary=3),
    "rmsprop_bnb_8bit": _eight_bit(1, 4),
    "adagrad": OptimizerCost(state=4, temporary=2, temporary_all=1),
    # Without momentum, as transformers makes it; weight decay is added to a copy of the gradient.
    "sgd": OptimizerCost(state=0, temporary=1, temporary_all=1),
    "schedule_free_sgd": OptimizerCost(state=4, temporary=1),
    "lomo": OptimizerCost(state=0, temporary=1),  # updates in the backward pass (arXiv:2306.09782)
    "adalomo": OptimizerCost(state=4, temporary=3, factored=True),
    "grokadamw": OptimizerCost(state=12, temporary=3),
}
# Any other keeps at most two fp32 moments: galore and apollo of projections of the gradients, which are smaller.
DEFAULT_OPTIMIZER = OptimizerCost(state=8, temporary=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Bytes that are there between passes.

    Attributes:
        trained: Parameters that are trained.
        gradients: Of all of them.
        step_work: Beside gradients and state while the optimizer steps.
        loading: While weights are loaded: the file, mapped, beside what it is converted to.
    """

    trained: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    step_work: int
    loading: int


def standing(spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> Standing:
    """What a run holds beside its passes, in one process."""
    full = footprint.method == "full"
    trained = spec.parameters if full else spec.adapter_parameters(footprint.rank, footprint.targets)
    optimizer = OPTIMIZERS.get(footprint.optimizer, DEFAULT_OPTIMIZER)
    state, work = _optimizer_bytes(spec, footprint, optimizer, trained)
    weights = weight_bytes(spec, footprint)
    return Standing(
        trained=trained,
        weights=weights,
        adapter=0 if full else 4 * trained,
        gradients=4 * trained,
        optimizer=0 if optimizer.paged and not on_cpu else state,
        step_work=work if on_cpu else int(4 * trained * optimizer.temporary_all),
        loading=_loading_bytes(spec, footprint, weights) if on_cpu else weights,
    )


def _loading_bytes(spec: ModelSpec, footprint: Footprint, weights: int) -> int:
    """On a CPU: weights of the file's type are mapped and left there, others made beside the mapped file."""
    file = spec.parameters * spec.stored_item
    if footprint.quantization is None:
        return weights if file == weights else weights + file
    largest = max((module.in_features * module.out_features for module in spec.linears), default=0)
    # All matrices are quantised before the rest is copied out of the file.
    quantized = weights - arithmetic_of(footprint).stream * (spec.parameters - spec.block_parameters)
    return file + max(weights, quantized + int(QUANTIZING_BYTES[footprint.quantization] * largest))


def weight_bytes(spec: ModelSpec, footprint: Footprint) -> int:
    """The base model: in the precision of the residual stream; the matrices of its layers may be quantised."""
    item = arithmetic_of(footprint).stream
    if footprint.quantization is None:
        return spec.parameters * item
    block = spec.block_parameters
    rest = item * (spec.parameters - block)
    if footprint.quantization == "nf4":
        return rest + int(block * NF4_BYTES) + NF4_TABLES * sum(module.count for module in spec.linears)
    return rest + block + 4 * sum(module.out_features * module.count for module in spec.linears)  # a scale per row


def _optimizer_bytes(spec: ModelSpec, footprint: Footprint, optimizer: OptimizerCost, trained: int) -> tuple[int, int]:
    """State, and what one step needs beside it on a CPU."""
    shape = spec.shape
    if footprint.method != "full":
        targeted = spec.targeted(footprint.targets)
        widths = [(footprint.rank, width, m.count) for m in targeted for width in (m.in_features, m.out_features)]
        return _state_bytes(optimizer, widths, 0), _work_bytes(optimizer, widths, 0)
    matrices = [(m.in_features, m.out_features, m.count) for m in spec.linears]
    embedding = shape.vocabulary * shape.hidden
    if not shape.tied_head:
        matrices.append((shape.hidden, shape.vocabulary, 1))
    others = trained - sum(rows * columns * count for rows, columns, count in matrices) - embedding
    state = _state_bytes(optimizer, matrices, embedding)
    small = optimizer.wide_state if optimizer.wide_state is not None else optimizer.state
    return state + int(small * max(0, others)), _work_bytes(optimizer, matrices, embedding)


def _state_bytes(optimizer: OptimizerCost, matrices: list[tuple[int, int, int]], embedding: int) -> int:
    if optimizer.factored:
        return int(optimizer.state * sum((rows + columns) * count for rows, columns, count in matrices))
    wide = optimizer.state if optimizer.wide_state is None else optimizer.wide_state
    total = wide * embedding
    for rows, columns, count in matrices:
        size = rows * columns
        total += count * size * (wide if size < SMALL_TENSOR else optimizer.state)
    return int(total)


def _work_bytes(optimizer: OptimizerCost, matrices: list[tuple[int, int, int]], embedding: int) -> int:
    largest = max((rows * columns for rows, columns, _ in matrices), default=0)
    # States in 32 bits are not unpacked: gradient, update and its divisor alone.
    of_embedding = min(optimizer.temporary, 3) if optimizer.wide_state is not None else optimizer.temporary
    return int(4 * max(largest * optimizer.temporary, embedding * of_embedding))
