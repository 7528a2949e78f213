"""From tensors to what a CPU process has resident: what the C library keeps of what was freed.

glibc takes blocks up to 32 MiB from its heap and others from the kernel, which gets these back at once. Of the heap it
returns the top alone, and up to glibc 2.37 aligned blocks leave holes that the next tensor of the same size does not
fit in (glibc bug 14581). The shares were fitted to 50 runs of six architectures (20 to 300 million
parameters; lora, qlora and full; glibc 2.36, torch 2.13, Linux x86-64). Of eight runs measured since, the resident peak
was predicted within -8 and +10 %; the least for recomputed layers. Other C libraries keep less.
"""

from __future__ import annotations

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.layers import arithmetic_of
from llmtune.planning.memory.passes import PassSimulation
from llmtune.planning.memory.weights import Standing
from llmtune.units import KIB, MIB

# What oneDNN keeps of one matrix product of one shape: 660 to 860 KiB in bf16 with AMX, 24 KiB in fp32 (growth of the
# resident set over 200 shapes each, torch 2.13). It keeps 1,024 of them, the least recently used goes first.
KERNEL_BYTES = {"bf16": 800 * KIB, "fp32": 24 * KIB}
MOST_KERNELS = 1024

HEAP_BLOCK_BYTES = 32 * MIB
# Beside everything else: kernels that oneDNN compiles, the heap's top.
HEAP_BYTES = 100 * MIB
# Of the most that is in the heap at once, and of all that goes through it in a pass; more of the latter where weights
# were converted while loading and values are twice as wide.
HEAP_SHARE, PASSED_SHARE, WIDE_PASSED_SHARE = 1.24, 0.27, 0.76
# By the tensors alive at the peak, the most that was measured: 0.60 in those 50 runs, where nearly all are small enough
# for the heap; 0.32 in one of 494 million parameters and 1,824 tokens, where those as wide as the MLP are not.
MOST_SLACK_SHARE = 0.6


def kernel_bytes(spec: ModelSpec, footprint: Footprint) -> float:
    """Compiled matrix products of all the shapes of a run but the first, which `HEAP_BYTES` holds."""
    layers = {(m.in_features, m.out_features) for m in spec.linears}
    adapted = {(m.in_features, m.out_features) for m in spec.targeted(footprint.targets)}
    full = footprint.method == "full"
    # Forward and for the input's gradient, the head too; where they are trained, for the weight's gradient.
    base = (len(layers) + 1) * (3 if full else 2)
    adapter = 0 if full else 6 * len(adapted)  # both factors, in fp32
    new = min((footprint.shapes - 1) * (base + adapter), MOST_KERNELS)
    share = base / (base + adapter)
    return new * (share * KERNEL_BYTES.get(footprint.precision, 0) + (1 - share) * KERNEL_BYTES["fp32"])


def heap_slack(run: PassSimulation, footprint: Footprint, there: Standing, tensor_peak: float) -> float:
    """Bytes that are resident beside the interpreter and the tensors alive at the peak."""
    # Of tensors too large for the heap as much counts as fits: those of smaller passes were in it, and left holes.
    logits = max(0.0, 3 * (run.log_probabilities - HEAP_BLOCK_BYTES))
    embeddings = max(0.0, run.embedding_gradients - 2 * HEAP_BLOCK_BYTES)
    work = max(0.0, there.step_work - HEAP_BLOCK_BYTES)
    in_heap = max(
        moment.total - min(moment.gradients, embeddings) - (logits if moment.logits else 0.0) for moment in run.moments
    )
    mapped = there.weights + there.adapter + there.optimizer + max(logits, embeddings + work)
    wide = footprint.method != "full" and arithmetic_of(footprint).stream == 4
    passed = run.passed * (WIDE_PASSED_SHARE if wide else PASSED_SHARE)
    slack = max(0.0, mapped + HEAP_SHARE * in_heap + passed - tensor_peak)
    return min(slack, MOST_SLACK_SHARE * tensor_peak) + HEAP_BYTES
