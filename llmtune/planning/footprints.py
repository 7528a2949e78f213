"""The predictions of memory and time, asked with the facts as the planner knows them."""

from __future__ import annotations

import math
from dataclasses import replace

from llmtune.planning.batching import Load
from llmtune.planning.execution import threads_of
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.planning.request import PlanRequest
from llmtune.planning.timing import TimeEstimate, Workload, predict_time


def trainable_parameters(request: PlanRequest, footprint: Footprint) -> int:
    """Weights that are trained: the adapter's, or the whole model's."""
    if footprint.method == "full":
        return request.spec.parameters
    return request.spec.adapter_parameters(footprint.rank, footprint.targets)


def memory_of(request: PlanRequest, footprint: Footprint) -> MemoryEstimate:
    """Peak memory of one process; processes on a CPU share its memory."""
    device = request.device
    sharing = request.processes if device.type == "cpu" else 1
    return predict_memory(
        request.spec,
        footprint,
        device=str(device),
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes // sharing,
        correction=request.correction.memory,
        holes=request.hardware.heap_leaves_holes,
    )


def training_of(request: PlanRequest, load: Load, updates: int) -> Workload:
    """The updates of a run, without evaluations and saves."""
    return Workload(
        tokens_per_update=load.tokens,
        length=load.width,
        scored=request.stats.supervised_tokens / max(request.stats.tokens, 1),
        micro_batches=load.passes,
        updates=updates,
        evaluated_tokens=0,
        threads=threads_of(request),
    )


def workload_of(
    request: PlanRequest, load: Load, updates: int, *, evaluations: int, saves: int, save_bytes: int
) -> Workload:
    """The whole run, with so many evaluations and checkpoints of so many bytes."""
    rows = math.ceil(request.eval_rows / request.processes)
    # Evaluation sorts all its rows by length: little is padded beyond the multiple, by half of it on average.
    tokens = rows * (request.mean_length + request.pad_multiple / 2)
    config = request.config.evaluate
    return replace(
        training_of(request, load, updates),
        evaluated_tokens=evaluations * tokens,
        evaluation_passes=evaluations * math.ceil(tokens / load.budget),
        saves=saves,
        save_bytes=save_bytes,
        result_bytes=save_bytes // 3,
        # Base and tuned model; answers end early as often as not.
        generated_tokens=2 * config.max_new_tokens if evaluations and config.num_samples else 0,
    )


def time_of(request: PlanRequest, footprint: Footprint, workload: Workload) -> TimeEstimate:
    """Time of a run with this workload."""
    return predict_time(
        request.spec,
        footprint,
        workload,
        trainable_parameters=trainable_parameters(request, footprint),
        hardware=request.hardware,
        device=request.device,
        processes=request.processes,
        correction=request.correction.seconds,
        measured=request.correction.basis == "probe",
    )
