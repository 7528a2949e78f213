"""Cross-entropy over a vocabulary whose logits are never there all at once.

Of a chunk of rows the logits are computed, turned into the loss, overwritten by their own gradient, multiplied back
into the gradient of the hidden states (and of the head, where it is trained), and forgotten. So the backward pass
computes nothing, and the head is multiplied with twice (three times where it is trained) and never again.

On a CPU what costs beside the products is how often a number per row and entry of the vocabulary goes through memory.
16-bit logits are therefore widened to fp32 a few rows at a time, `WORK_ENTRIES` numbers, which stay in the cache from
the widening to the rounding of the gradient. On CUDA a chunk is one such piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

# fp32 numbers widened at once per thread, 1 MiB: measured on a Xeon with AMX and 2 MiB of L2 per core, one thread:
# pieces of 0.4 to 1.2 MiB took 12 ms and a whole chunk 19 ms (256 rows of 49,152), 37 and 92 ms (256 of 151,936).
WORK_ENTRIES = 2**18
# Entries of the head's gradient added up at once, for the same reason.
BLOCK_ENTRIES = 2**20
# The smallest fp16 above zero is 6e-8, and most entries of the gradient of the logits are smaller than 1e-4.
FP16_UNIT = 1024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What the loss of a row is, and how it is computed; see `supervised_loss`."""

    logit_scale: float
    softcap: float | None
    chunk_rows: int
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype  # of the products
    unit: float  # the gradient that is kept is so many times that of the sum
    differentiates: bool


def supervised_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = 256,
    label_smoothing: float = 0.0,
    row_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Sum of the cross-entropies of rows of hidden states with their labels, in nats.

    Per row, with ``logits = softcap × tanh(logit_scale × (weight · hidden + bias) / softcap)``, or without the bound::

        (1 - label_smoothing) × -log p[label] + label_smoothing × mean(-log p) + z_loss × logsumexp(logits)²

    Products are of the weight's dtype, or of autocast's where that is on; all else is fp32 (fp64 for an fp64 weight).
    Gradients are computed here, in the forward pass, where gradients are recorded at all.

    Args:
        hidden: [rows, hidden size]; rows without a label are left out by the caller.
        weight: [vocabulary, hidden size], as of the head; it may be the embedding's.
        labels: int64 [rows], none of them ignored.
        bias: [vocabulary].
        logit_scale: Factor of the logits.
        softcap: Bound of the logits.
        chunk_rows: Rows whose logits exist at once. They take ``2 × chunk_rows × vocabulary`` bytes in 16 bits (4 in
            fp32), and on CUDA as many fp32 numbers beside them.
        label_smoothing: Share of the label's probability that the whole vocabulary gets, as in `CrossEntropyLoss`.
        row_weights: fp32 [rows], factors of the rows' losses; no gradient comes to them.
        z_loss: Factor of the squared log-normaliser (PaLM, arXiv:2204.02311).

    Returns:
        fp32 scalar (fp64 for an fp64 weight). Where ``weight`` is trained its backward pass runs once.
    """
    rule = _rule(weight, bias, logit_scale, softcap, chunk_rows, label_smoothing, z_loss)
    loss: torch.Tensor = _SupervisedLoss.apply(hidden, weight, bias, labels, row_weights, rule)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def supervised_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int = 256,
) -> torch.Tensor:
    """Return the cross-entropy of each row, in nats; see `supervised_loss`, which returns their sum.

    Returns:
        fp32 [rows] (fp64 for an fp64 weight), without gradients.
    """
    rule = _rule(weight, bias, logit_scale, softcap, chunk_rows, 0.0, 0.0)
    with torch.autocast(weight.device.type, enabled=False):
        losses, _ = _loss_and_gradients(hidden, weight, bias, labels, None, rule, (False, False, False))
    return losses


def _rule(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int,
    label_smoothing: float,
    z_loss: float,
) -> _Rule:
    dtype = _product_dtype(weight)
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    return _Rule(
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=max(1, chunk_rows),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        dtype=dtype,
        unit=FP16_UNIT if dtype == torch.float16 and not trains_head else 1.0,
        differentiates=torch.is_grad_enabled(),
    )


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(kind)
    return weight.dtype


class _SupervisedLoss(torch.autograd.Function):
    """Gradients are made in ``forward`` and only scaled in ``backward``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        row_weights: torch.Tensor | None,
        rule: _Rule,
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[:3] if rule.differentiates else (False, False, False)
        with torch.autocast(weight.device.type, enabled=False):
            losses, gradients = _loss_and_gradients(hidden, weight, bias, labels, row_weights, rule, needed)
        ctx.unit = rule.unit
        ctx.save_for_backward(gradients[0])
        # Not among the saved tensors: they are large, and scaled where they are.
        ctx.of_head = list(gradients[1:])
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = grad_outputs
        factor = factor / ctx.unit
        (of_hidden,) = ctx.saved_tensors
        if ctx.of_head is None:
            raise RuntimeError("the loss of a head that is trained can be differentiated once: compute it again")
        of_weight, of_bias = ctx.of_head
        if of_weight is not None or of_bias is not None:
            ctx.of_head = None
        return (
            None if of_hidden is None else of_hidden * factor,
            None if of_weight is None else of_weight.mul_(factor),
            None if of_bias is None else of_bias.mul_(factor),
            None,
            None,
            None,
        )


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    row_weights: torch.Tensor | None,
    rule: _Rule,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """Each row's loss, and the gradients of hidden states, weight and bias that are ``needed``, ``rule.unit`` times."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if rule.dtype == torch.float64 else torch.float32
    matrix = weight.detach().to(rule.dtype)
    offset = None if bias is None else bias.detach().to(rule.dtype)
    of_hidden = torch.empty_like(hidden) if needed[0] else None
    of_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
    of_bias = torch.zeros_like(bias, dtype=wide) if needed[2] and bias is not None else None
    losses = hidden.new_empty(rows, dtype=wide)
    chunk = math.ceil(rows / max(1, math.ceil(rows / rule.chunk_rows)))  # chunks of one size: short ones cost as much
    room = hidden.new_empty((chunk, vocabulary), dtype=rule.dtype)
    work = _workspace(room, wide)
    for start in range(0, rows, max(1, chunk)):
        piece = slice(start, min(start + chunk, rows))
        states = hidden[piece].detach().to(rule.dtype)
        logits = room[: len(states)]
        if offset is None:
            torch.mm(states, matrix.t(), out=logits)
        else:
            torch.addmm(offset, states, matrix.t(), out=logits)
        factors = None if row_weights is None else row_weights[piece].to(wide)
        losses[piece] = _to_gradient(logits, labels[piece], factors, rule, work, keeps=any(needed))
        if of_hidden is not None:
            of_hidden[piece] = logits @ matrix
        if of_weight is not None:
            _add_product(of_weight, logits, states)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=wide)
    return losses, (
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    )


def _workspace(room: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Where logits are widened; of no width where they are wide already. Its rows are those worked on at a time."""
    rows, vocabulary = room.shape
    if room.is_cpu:
        rows = min(rows, max(1, torch.get_num_threads() * WORK_ENTRIES // vocabulary))
    return room.new_empty((rows, 0 if room.dtype == wide else vocabulary), dtype=wide)


def _to_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    factors: torch.Tensor | None,
    rule: _Rule,
    work: torch.Tensor,
    *,
    keeps: bool,
) -> torch.Tensor:
    """The loss of each row; its gradient, ``rule.unit`` times, takes the place of the logits where it ``keeps`` it.

    Args:
        logits: [rows, vocabulary], before scale and bound.
        labels: int64 [rows].
        factors: Of the rows; None where all are 1.
        rule: What the loss is.
        work: As many rows as are worked on at a time, of the vocabulary's width where logits have to be widened.
        keeps: Whether the gradient is wanted.
    """
    losses = []
    for start in range(0, len(logits), len(work)):
        piece = slice(start, start + len(work))
        part, label = logits[piece], labels[piece, None]
        wide = work[: len(part)].copy_(part) if work.shape[1] else part
        factor = None if factors is None else factors[piece, None]
        loss = _row_losses(wide, label, factor, rule, keeps=keeps)
        losses.append(loss if factor is None else loss * factor)
        if keeps and wide is not part:
            part.copy_(wide)
    return torch.cat(losses).squeeze(1)


def _row_losses(
    logits: torch.Tensor, label: torch.Tensor, factor: torch.Tensor | None, rule: _Rule, *, keeps: bool
) -> torch.Tensor:
    """The losses [rows, 1] without ``factor``; ``logits``, wide, become their gradient with it."""
    smoothing, vocabulary = rule.label_smoothing, logits.shape[1]
    slope = None
    if rule.logit_scale != 1.0:
        logits.mul_(rule.logit_scale)
    if rule.softcap is not None:
        logits.div_(rule.softcap).tanh_()
        slope = logits.square().neg_().add_(1.0) if keeps else None
        logits.mul_(rule.softcap)
    top = logits.amax(1, keepdim=True)
    logits.sub_(top)
    own = logits.gather(1, label)
    mean = logits.mean(1, keepdim=True) if smoothing else 0.0
    total = logits.exp_().sum(1, keepdim=True)
    log_total = total.log()
    loss = log_total - (1.0 - smoothing) * own - smoothing * mean
    normaliser = log_total + top
    if rule.z_loss:
        loss = loss + rule.z_loss * normaliser.square()
    if not keeps:
        return loss
    share = torch.full_like(total, rule.unit * rule.logit_scale)
    if factor is not None:
        share *= factor
    logits.mul_(share * (1.0 + 2.0 * rule.z_loss * normaliser) / total)
    logits.scatter_(1, label, logits.gather(1, label) - (1.0 - smoothing) * share)
    if smoothing:
        logits.sub_(share * (smoothing / vocabulary))
    if slope is not None:
        logits.mul_(slope)
    return loss


def _add_product(total: torch.Tensor, logits: torch.Tensor, states: torch.Tensor) -> None:
    """Add ``logitsᵀ · states`` to ``total`` [vocabulary, hidden size], a block of the vocabulary at a time."""
    if total.dtype == logits.dtype:
        total.addmm_(logits.t(), states)
        return
    block = max(1, BLOCK_ENTRIES // states.shape[1]) if total.is_cpu else len(total)
    for start in range(0, len(total), block):
        total[start : start + block] += logits[:, start : start + block].t() @ states
