"""Prediction of peak memory, term by term; pure arithmetic on a model's spec and the part of a plan that decides it.

``predict_memory`` is what others call. Below it: ``passes`` walks through a forward and backward pass, whose layers are
written down operation by operation (``layers``, on a ``tape``) or were traced (``traced``); ``paths`` knows which of
our kernels they take and what these need, ``weights`` what stands between passes, ``sharding`` what one rank holds.
"""

from __future__ import annotations

from llmtune.planning.memory.estimate import BYTES_PER_VALUE, USABLE_SHARE, Footprint, MemoryEstimate
from llmtune.planning.memory.paths import Paths, paths_of
from llmtune.planning.memory.predict import CUDA_CONTEXT_BYTES, INTERPRETER_BYTES, predict_memory

__all__ = [
    "BYTES_PER_VALUE",
    "CUDA_CONTEXT_BYTES",
    "INTERPRETER_BYTES",
    "USABLE_SHARE",
    "Footprint",
    "MemoryEstimate",
    "Paths",
    "paths_of",
    "predict_memory",
]
