"""From tensors to what a CPU process has resident: what the C library keeps of what was freed.

glibc takes blocks up to 32 MiB from its heap and others from the kernel, which gets these back at once. Of the heap it
returns the top alone, and up to glibc 2.37 aligned blocks leave holes that the next tensor of the same size does not
fit in (glibc bug 14581). The shares were fitted to 50 runs of six architectures (20 to 300 million parameters; lora,
qlora and full; glibc 2.36, torch 2.13, Linux x86-64), whose resident peak they give within -2 and +14 %; other C
libraries keep less.
"""

from __future__ import annotations

from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.layers import arithmetic_of
from llmtune.planning.memory.passes import PassSimulation
from llmtune.planning.memory.weights import Standing
from llmtune.units import MIB

HEAP_BLOCK_BYTES = 32 * MIB
# Beside everything else: kernels that oneDNN compiles, the heap's top.
HEAP_BYTES = 100 * MIB
# Of the most that is in the heap at once, and of all that goes through it in a pass; more of the latter where weights
# were converted while loading and values are twice as wide.
HEAP_SHARE, PASSED_SHARE, WIDE_PASSED_SHARE = 1.24, 0.27, 0.76


def heap_slack(run: PassSimulation, footprint: Footprint, there: Standing, tensor_peak: float) -> float:
    """Bytes that are resident beside the interpreter and the tensors alive at the peak."""
    logits = 3 * run.log_probabilities if run.log_probabilities > HEAP_BLOCK_BYTES else 0.0
    embeddings = run.embedding_gradients if run.embedding_gradients > HEAP_BLOCK_BYTES else 0.0
    work = there.step_work if there.step_work > HEAP_BLOCK_BYTES else 0
    in_heap = 0.0
    for moment in run.moments():
        small = moment.total - min(moment.gradients, embeddings) - (moment.logits if logits else 0.0)
        in_heap = max(in_heap, small)
    mapped = there.weights + there.adapter + there.optimizer + max(logits, embeddings + work)
    wide = footprint.method != "full" and arithmetic_of(footprint).stream == 4
    passed = run.passed * (WIDE_PASSED_SHARE if wide else PASSED_SHARE)
    return max(0.0, mapped + HEAP_SHARE * in_heap + passed - tensor_peak) + HEAP_BYTES
