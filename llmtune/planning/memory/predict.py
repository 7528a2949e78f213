"""The prediction: the fullest moment of loading, a pass, the optimizer's step, evaluation and saving, term by term."""

from __future__ import annotations

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint, MemoryEstimate
from llmtune.planning.memory.passes import PassSimulation
from llmtune.planning.memory.paths import largest_passes, paths_of
from llmtune.planning.memory.resident import heap_slack, kernel_bytes
from llmtune.planning.memory.sharding import communication, sharded
from llmtune.planning.memory.weights import standing
from llmtune.units import MIB

# Resident set of a CPU process that is about to load a model: interpreter, torch, transformers, peft, datasets and
# encoded rows. Measured on Linux x86-64, Python 3.11, torch 2.13: 542-556 MiB.
INTERPRETER_BYTES = 550 * MIB
# Context, kernels and library workspaces of one CUDA process. An estimate: published figures lie between 0.3 and 0.8
# GiB.
CUDA_CONTEXT_BYTES = 600 * MIB
# What the caching allocator of a GPU holds back, as a share of all but the weights. An estimate: blocks are rounded up
# to 512 bytes, segments to 2 or 20 MiB, and tensors of different widths leave holes (``CUDACachingAllocator``).
CUDA_ALLOCATOR_SHARE = 0.06


def predict_memory(
    spec: ModelSpec,
    footprint: Footprint,
    *,
    device: str,
    total_bytes: int,
    free_bytes: int,
    correction: float = 1.0,
    holes: bool = False,
) -> MemoryEstimate:
    """Peak memory of one process that trains ``spec`` as ``footprint`` says, on a device with ``free_bytes`` to give.

    Args:
        spec: The model.
        footprint: How it is trained.
        device: ``cpu`` or the name of an accelerator such as ``cuda:0``.
        total_bytes: Memory the device has.
        free_bytes: Memory that may be used now.
        correction: Factor on everything that is not there before training.
        holes: Whether the heap of a CPU process leaves holes, see `llmtune.heap`.
    """
    on_cpu = device == "cpu"
    found = _Prediction(spec, footprint, on_cpu=on_cpu)
    terms = {
        name: round(size * (1.0 if name in ("weights", "adapter") else correction))
        for name, size in found.terms.items()
        if round(size) > 0
    }
    tensor_peak = sum(terms.values())
    terms["allocator"] = round(
        found.slack(tensor_peak, loading=terms.get("loading", 0), holes=holes)
        if on_cpu
        else CUDA_ALLOCATOR_SHARE * (tensor_peak - terms["weights"])
    )
    terms |= {"interpreter": INTERPRETER_BYTES} if on_cpu else {"context": CUDA_CONTEXT_BYTES}
    if on_cpu and (kernels := round(kernel_bytes(spec, footprint))):
        terms["kernels"] = kernels
    return MemoryEstimate(
        device=device,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        tensor_peak_bytes=tensor_peak,
        peak_bytes=sum(terms.values()),
        pass_bytes=round(found.pass_bytes * correction),
        terms=terms,
    )


class _Prediction:
    """The tensor terms of one process, before any correction."""

    def __init__(self, spec: ModelSpec, footprint: Footprint, *, on_cpu: bool) -> None:
        whole = standing(spec, footprint, on_cpu=on_cpu)
        self._footprint = footprint
        self._there, self._exchanged = sharded(whole, footprint), communication(spec, footprint, whole)
        passes = [
            PassSimulation(spec, one, trained=whole.trained, on_cpu=on_cpu)
            for one in largest_passes(footprint, paths_of(spec, footprint, on_cpu=on_cpu))
        ]
        self._run = max(passes, key=lambda run: run.peak().total)
        self._held: dict[str, float] = {
            "weights": self._there.weights,
            "adapter": self._there.adapter,
            "optimizer": self._there.optimizer,
        }
        split = self._there.gradients / max(whole.gradients, 1)
        in_pass, in_step = self._in_pass(split), self._in_step()
        self.pass_bytes = sum(size for name, size in in_pass.items() if name not in self._held)
        self.terms = max(in_pass, in_step, key=lambda terms: sum(terms.values()))
        training = sum(self.terms.values())
        evaluation = sum(self._held.values()) + max(run.evaluation() for run in passes) + self._exchanged.in_pass
        # The larger one adds to the peak: they are not at the same time.
        name, most = max(("loading", self._there.loading), ("evaluation", evaluation), key=lambda part: part[1])
        self.terms[name] = max(0.0, most - training)

    def slack(self, tensor_peak: float, *, loading: float, holes: bool) -> float:
        """Bytes that are resident beside ``tensor_peak`` on a CPU; ``loading`` of it are freed before the training."""
        return heap_slack(self._run, self._footprint, self._there, tensor_peak, loading=loading, holes=holes)

    def _in_pass(self, split: float) -> dict[str, float]:
        moment = self._run.peak()
        return self._held | {
            "gradients": moment.gradients * split,
            "activations": moment.activations,
            "weight copies": moment.copies,
            "masks": moment.masks,
            "logits": moment.logits,
            "workspace": moment.workspace,
            "communication": self._exchanged.in_pass,
        }

    def _in_step(self) -> dict[str, float]:
        return self._held | {
            "gradients": self._there.gradients,
            "weight copies": self._run.adapter_copies,
            "workspace": self._there.step_work,
            "communication": self._exchanged.in_step,
        }
