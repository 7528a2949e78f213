"""What of the standing bytes one of several ranks holds, and what travels between them.

Estimates, written from the sources of torch 2.13 (``DistributedDataParallel``, ``fully_shard``) and DeepSpeed's
documentation of ZeRO (arXiv:1910.02054); nothing here was measured on several GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtune.models import ModelSpec
from llmtune.planning.memory.estimate import Footprint
from llmtune.planning.memory.paths import arithmetic_of
from llmtune.planning.memory.weights import Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Bytes for what ranks exchange: while a pass runs, and while the optimizer steps."""

    in_pass: float
    in_step: float


def sharded(whole: Standing, footprint: Footprint) -> Standing:
    """One rank's part: FSDP2 and ZeRO 3 split everything, ZeRO 2 gradients and optimizer state, DDP nothing."""
    if footprint.sharding is None or footprint.processes == 1:
        return whole
    ranks = footprint.processes
    part = replace(
        whole,
        gradients=whole.gradients // ranks,
        optimizer=whole.optimizer // ranks,
        step_work=whole.step_work // ranks,
    )
    if footprint.sharding == "zero2":
        return part
    weights = whole.weights // ranks
    # Weights are read into host memory and reach the device in parts.
    return replace(part, weights=weights, adapter=whole.adapter // ranks, loading=weights)


def communication(spec: ModelSpec, footprint: Footprint, whole: Standing) -> Communication:
    """Buckets of gradients (DDP, ZeRO 2), or weights put together for use and gradients before they are split."""
    if footprint.processes == 1:
        return Communication(in_pass=0, in_step=0)
    if footprint.sharding is None:  # DDP copies all gradients into its buckets, and keeps them
        return Communication(in_pass=whole.gradients, in_step=whole.gradients)
    full = footprint.method == "full"
    layer = whole.weights * spec.block_parameters / max(spec.parameters, 1) / max(spec.shape.layers, 1)
    gradient = whole.gradients / max(spec.shape.layers, 1)
    if footprint.sharding == "zero2":
        return Communication(in_pass=2 * gradient, in_step=0)
    # The layer in use and the next one; the embedding and head, which are one unit; in the type that is computed in.
    ends = 1 if spec.shape.tied_head else 2
    narrow = 0.5 if full and arithmetic_of(footprint).autocast else 1.0
    outside = ends * spec.head_parameters * whole.weights / max(spec.parameters, 1)
    return Communication(in_pass=narrow * (2 * layer + outside) + gradient, in_step=0)
