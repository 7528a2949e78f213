"""Closed-form prediction of time: the arithmetic and the traffic of one update over the rates of this machine.

Rates are those measured on the machine (``llmtune doctor``, or the start of a training) where there are any, else those
of data sheets. What one update costs of each was fitted on two CPUs, see `costs_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.hardware import DeviceChoice, Hardware, Rates, Speed, nominal_rates
from llmtune.models import ModelSpec
from llmtune.planning.memory import BYTES_PER_VALUE, Footprint, paths_of
from llmtune.planning.passes import Pace, costs_of, forward_pass, optimizer_seconds, training_pass

# A CPU's kernels are compiled for every new number of tokens in a pass, and widths are multiples of eight. Measured on
# one AMX core, torch 2.13: 0.03 to 0.04 s with builtin:tiny, 0.06 to 0.11 s with a Llama 576 wide.
SHAPE_SECONDS, SHAPE_TOKENS = 0.05, 8
# SHA-256 with the processor's instructions for it, read back once: every byte is hashed twice.
HASHED_BYTES_PER_SECOND = 1.0e9
# Serialising, file system and the trainer's own state: a save of 4 MB took 0.1 s.
SAVE_SECONDS = 0.1
# Setting up the trainer, and evaluating for the first time. An estimate.
START_SECONDS = 1.0
# Sent between the ranks of one machine: PCIe 4.0 with 16 lanes, or shared memory of a CPU. Estimates.
LINK_BYTES_PER_SECOND = {"cpu": 2e9, "accelerator": 20e9}

# The range in which a total is no surprise, as factors. Calibrated: the fitted updates took between 0.85 and 1.25 of
# what is predicted on a quiet machine; on the same machine at another hour 1.5 times as long. Measured on this run's
# own steps: rows of other lengths, evaluations and saves remain. Nominal: data sheets say nothing of the software.
RANGE = {"nominal": (1 / 2, 3.0), "calibrated": (0.7, 1.7), "measured": (0.8, 1.3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Predicted time of a run.

    Attributes:
        step_seconds: One update.
        total_seconds: From loaded weights to the saved result: all updates, evaluations, saves and samples.
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
        tokens_per_update: Padded tokens of its share of one update.
        length: Padded tokens of a row on average; of a packed sequence all its tokens.
        scored: Share of the padded tokens that are learned.
        micro_batches: Forward passes per update, on average.
        updates: Updates of the run.
        evaluated_tokens: Padded tokens of all evaluations of the run.
        evaluation_passes: Forward passes of all evaluations; 0 when they are as large as those of training.
        saves: Checkpoints that are written.
        save_bytes: Bytes of one checkpoint.
        result_bytes: Bytes of the result.
        generated_tokens: Tokens answered one after the other, by base and tuned model; rows that are answered together
            count once.
        threads: CPU threads of the process; None for its share of the usable cores.
    """

    tokens_per_update: float
    length: float
    scored: float
    micro_batches: float
    updates: int
    evaluated_tokens: float
    evaluation_passes: float = 0.0
    saves: int = 0
    save_bytes: int = 0
    result_bytes: int = 0
    generated_tokens: float = 0.0
    threads: int | None = None


def predict_time(
    spec: ModelSpec,
    footprint: Footprint,
    workload: Workload,
    *,
    trainable_parameters: int,
    hardware: Hardware,
    device: DeviceChoice,
    processes: int,
    correction: float = 1.0,
    measured: bool = False,
) -> TimeEstimate:
    """Seconds of one update and of the whole run. Processes share the cores of a CPU.

    Args:
        spec: The model.
        footprint: How it is trained.
        workload: What one process has to do.
        trainable_parameters: Of the adapter, or of the model.
        hardware: The machine; its measured rates count where they are those of ``device``.
        device: What trains.
        processes: Ranks.
        correction: Measured over predicted seconds of an update, from earlier runs or a probe.
        measured: Whether ``correction`` comes from steps of this very run.
    """
    calibrated = hardware.rates is not None and hardware.rates.device == device.name
    rates = hardware.rates if hardware.rates is not None and calibrated else nominal_rates(hardware, device)
    pace = Pace(
        speed=_speed(rates, hardware, device, workload, processes),
        op_seconds=rates.op_seconds,
        costs=costs_of(device.type, hardware.cpu),
    )
    adapter_parameters = 0 if footprint.method == "full" else trainable_parameters
    paths = paths_of(spec, footprint, on_cpu=device.type == "cpu")
    # transformers' own loss computes logits of every position, and so does an answer that is generated.
    row = {"length": workload.length, "scored": workload.scored if paths.loss else 1.0}
    training = training_pass(spec, footprint, paths, pace, **row, adapter_parameters=adapter_parameters)
    forward = forward_pass(spec, footprint, paths, pace, **row)
    answer = forward_pass(spec, footprint, paths, pace, length=workload.length, scored=1.0)
    per_pass = workload.tokens_per_update / workload.micro_batches
    step = correction * (
        training.seconds(workload.tokens_per_update, workload.micro_batches)
        + optimizer_seconds(spec, footprint, pace, trainable_parameters)
        + _communication(spec, footprint, workload, trainable_parameters, device, processes)
    )
    evaluations = workload.evaluation_passes or workload.evaluated_tokens / max(per_pass, 1.0)
    terms = {
        "start": _start(device, workload, per_pass),
        "training": step * workload.updates,
        "evaluation": correction * forward.seconds(workload.evaluated_tokens, evaluations),
        "saving": _saving(workload, rates),
        "samples": correction * answer.seconds(workload.generated_tokens, workload.generated_tokens),
    }
    total = sum(terms.values())
    basis = "measured" if measured else "calibrated" if calibrated else "nominal"
    low, high = RANGE[basis]
    return TimeEstimate(
        step_seconds=step,
        total_seconds=total,
        low_seconds=total * low,
        high_seconds=total * high,
        terms={name: seconds for name, seconds in terms.items() if seconds > 0},
        basis=basis,
    )


def _speed(rates: Rates, hardware: Hardware, device: DeviceChoice, workload: Workload, processes: int) -> Speed:
    """What one process reaches: with its threads, and no more than its share of what all cores reach together."""
    if device.type != "cpu":
        return rates.speeds[-1]
    threads = workload.threads or max(1, hardware.cpu.usable_cores // processes)
    one, most = rates.speeds[0], rates.speeds[-1]

    def reached(single: float, whole: float) -> float:
        """Between one thread and all of them, in equal steps of the logarithm."""
        if threads == 1 or most.threads == 1:
            with_threads = single
        else:
            share = min(1.0, math.log(threads) / math.log(most.threads))
            with_threads = single * (whole / single) ** share
        return min(with_threads, whole / processes)

    return Speed(
        threads=threads,
        matmul={name: reached(one.matmul[name], rate) for name, rate in most.matmul.items()},
        memory_bytes_per_second=reached(one.memory_bytes_per_second, most.memory_bytes_per_second),
        fresh_bytes_per_second=reached(one.fresh_bytes_per_second, most.fresh_bytes_per_second),
    )


def _communication(
    spec: ModelSpec,
    footprint: Footprint,
    workload: Workload,
    trainable: int,
    device: DeviceChoice,
    processes: int,
) -> float:
    """Gradients added up over the ranks once per update; sharded weights gathered for every forward and backward."""
    if processes == 1:
        return 0.0
    sent = 2.0 * 4 * trainable
    if footprint.sharding in ("fsdp2", "zero3"):
        sent += 2.0 * BYTES_PER_VALUE[footprint.precision] * spec.parameters * workload.micro_batches
    return sent / LINK_BYTES_PER_SECOND["cpu" if device.type == "cpu" else "accelerator"]


def _start(device: DeviceChoice, workload: Workload, tokens: float) -> float:
    """Until the trainer is set up, and on a CPU its kernels compiled for every number of tokens that occurs."""
    if device.type != "cpu":
        return START_SECONDS
    shapes = min(workload.updates * workload.micro_batches, max(1.0, tokens / SHAPE_TOKENS))
    return START_SECONDS + SHAPE_SECONDS * shapes


def _saving(workload: Workload, rates: Rates) -> float:
    """Checkpoints and the result: written, synchronised, hashed."""
    disk = rates.disk_write_bytes_per_second
    per_byte = 2 / HASHED_BYTES_PER_SECOND + (1 / disk if disk else 0.0)
    return (workload.saves * workload.save_bytes + workload.result_bytes) * per_byte + SAVE_SECONDS * workload.saves
