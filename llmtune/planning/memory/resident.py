"""From tensors to what a CPU process has resident: what the C library keeps of what was freed.

glibc takes blocks up to 32 MiB from its heap and others from the kernel, which gets these back at once. The heap does
not shrink: beside what is alive at the fullest moment, what was in it at another one is resident too. Fitted to 54 runs
of six architectures (20 to 300 million parameters; lora, qlora and full; glibc 2.36, torch 2.13, Linux x86-64), of
which none was predicted more than 3 % too low: ``tests/benchmarks/bench_memory.py``. Other C libraries keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.passes import PassSimulation
from llmtune.planning.memory.weights import Standing
from llmtune.units import KIB, MIB

# What oneDNN keeps of one matrix product of one shape: 660 to 860 KiB in bf16 with AMX, 24 KiB in fp32 (growth of the
# resident set over 200 shapes each, torch 2.13). It keeps 1,024 of them, the least recently used goes first.
KERNEL_BYTES = {"bf16": 800 * KIB, "fp32": 24 * KIB}
MOST_KERNELS = 1024
HEAP_BLOCK_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """What lies between the tensors.

    Attributes:
        least: Bytes, whatever the run: the first kernels that oneDNN compiles, the heap's top.
        of_passed: Share of all that layers hold in a pass, were none run again.
        most_of_passed: The most of it, as a share of the tensors alive at the peak: of large models less goes through
            the heap.
        of_converted: Share of the file, where weights were converted while loading.
        at_loading: Bytes beside the tensors while weights are converted: no kernel is compiled yet. Of four runs with
            qlora; with holes about 35 MiB more.
    """

    least: int
    of_passed: float
    most_of_passed: float
    of_converted: float
    at_loading: int


TIGHT = Gaps(least=110 * MIB, of_passed=0.10, most_of_passed=0.13, of_converted=0.3, at_loading=70 * MIB)
# Fitted to 37 of those runs, lora and qlora, as a program of Python that uses llmtune makes them; see `llmtune.heap`.
# Predicted within -5 and +18 %; four of qlora, with the kernels of today and all that is not quantised in fp32, +7 to
# +20 %.
WITH_HOLES = Gaps(least=210 * MIB, of_passed=0.27, most_of_passed=0.35, of_converted=0.4, at_loading=110 * MIB)


def kernel_bytes(spec: ModelSpec, footprint: Footprint) -> float:
    """Compiled matrix products of all the shapes of a run but the first, which `Gaps.least` holds."""
    layers = {(m.in_features, m.out_features) for m in spec.linears}
    adapted = {(m.in_features, m.out_features) for m in spec.targeted(footprint.targets)}
    full = footprint.method == "full"
    # Forward and for the input's gradient, the head too; where they are trained, for the weight's gradient.
    base = (len(layers) + 1) * (3 if full else 2)
    adapter = 0 if full else 6 * len(adapted)  # both factors, in fp32
    new = min((footprint.shapes - 1) * (base + adapter), MOST_KERNELS)
    share = base / (base + adapter)
    return new * (share * KERNEL_BYTES.get(footprint.precision, 0) + (1 - share) * KERNEL_BYTES["fp32"])


def heap_slack(
    run: PassSimulation, footprint: Footprint, there: Standing, tensor_peak: float, *, loading: float, holes: bool
) -> float:
    """Bytes that are resident beside the interpreter and the tensors alive at the peak.

    ``loading`` of these are freed before the training begins: what it needs beside its tensors comes in their place.
    """
    # Of tensors too large for the heap as much counts as fits: those of smaller passes were in it.
    logits = sum(max(0.0, size - HEAP_BLOCK_BYTES) for size in run.logits)
    embeddings = max(0.0, run.embedding_gradients - 2 * HEAP_BLOCK_BYTES)
    work = max(0.0, there.step_work - HEAP_BLOCK_BYTES)
    in_heap = max(
        moment.total - min(moment.gradients, embeddings) - (logits if moment.logits else 0.0) for moment in run.moments
    )
    mapped = there.weights + there.adapter + there.optimizer + max(logits, embeddings + work)
    gaps, training = WITH_HOLES if holes else TIGHT, tensor_peak - loading
    converted = max(0, there.loading - there.weights)
    between = min(gaps.of_passed * run.passed, gaps.most_of_passed * training) + gaps.of_converted * converted
    trained = max(training, mapped + in_heap) + between + gaps.least
    return max(trained, tensor_peak + gaps.at_loading) - tensor_peak
