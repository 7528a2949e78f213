"""What a traced model keeps and needs while it trains, as numbers: see ``llmtune.models.trace``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# How a model may compute. ``half``: frozen 16-bit weights; ``single``: frozen fp32 weights (quantised ones too: their
# products are given back in fp32); ``trained``: trained fp32 weights; ``autocast``: the same under 16-bit autocast.
ARITHMETICS = ("half", "single", "trained", "autocast")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Bytes of one piece of a model: ``fixed + per token * tokens + per pair * tokens * width``.

    Attributes:
        saved: Per token, kept between forward and backward pass.
        saved_pair: The same per token and token of width.
        saved_fixed: The same for any number of tokens.
        forward: Per token, the most that the forward pass added to what was there before it.
        forward_pair: As above.
        forward_fixed: As above.
        backward: Per token, the most that the backward pass added to what was there before it.
        backward_pair: As above.
        backward_fixed: As above.
    """

    saved: float
    saved_pair: float
    saved_fixed: float
    forward: float
    forward_pair: float
    forward_fixed: float
    backward: float
    backward_pair: float
    backward_fixed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInput:
    """What a linear module of a layer reads.

    Attributes:
        module: Name of the module.
        tensor: Number of the tensor; modules that read the same one share it.
        saved: Whether frozen fp32 layers keep it anyway.
    """

    module: str
    tensor: int
    saved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedActivations:
    """One decoder layer, and everything outside the layers, without adapters, by kind of arithmetic.

    A kind that could not be traced is left out.
    """

    layer: Mapping[str, Stage]
    outside: Mapping[str, Stage]
    inputs: tuple[LinearInput, ...]
