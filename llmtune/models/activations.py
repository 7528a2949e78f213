"""What a traced model keeps and needs while it trains, as numbers: see ``llmtune.models.trace``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# How a model may compute. ``half``: frozen 16-bit weights; ``single``: frozen fp32 weights; ``trained``: trained fp32
# weights; ``autocast``: the same under 16-bit autocast.
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
        attention: Per token, what was added when torch's kernel for attention had gone backward; 0 without it.
        attention_pair: As above.
        attention_fixed: As above.
        normed: Values per token that norms like Llama's read.
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
    attention: float
    attention_pair: float
    attention_fixed: float
    normed: float


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
    """One decoder layer, and what is outside the layers, without adapters, by kind of arithmetic.

    A kind that could not be traced is left out.

    Attributes:
        layer: The last layer.
        outside: Embedding and last norm; head and loss too, unless they are plain.
        inputs: What the linear modules of a layer read.
        plain_loss: Whether it is a decoder with a linear head and the usual cross-entropy. What the loss is in numbers
            is compared when the weights are there.
        plain_linears: Whether all linear modules are torch's own.
        plain_attention: Whether attention is torch's flash kernel.
    """

    layer: Mapping[str, Stage]
    outside: Mapping[str, Stage]
    inputs: tuple[LinearInput, ...]
    plain_loss: bool
    plain_linears: bool
    plain_attention: bool
