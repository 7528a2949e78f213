"""Loss on held-out data, weighted by tokens: the sum over all supervised tokens over their number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.data import IGNORED, EncodedDataset, collate, micro_batches
from llmtune.kernels.attention import mask_is_needed
from llmtune.kernels.head import attached_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLosses:
    """The losses of the rows of a data set, in its order.

    Attributes:
        losses: float64 [rows], the summed negative log likelihood of each row, in nats.
        tokens: int64 [rows], the supervised tokens that it runs over.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def mean(self, chosen: NDArray[np.bool_] | None = None) -> float:
        """Return the mean loss per token of the ``chosen`` rows, all when None; NaN where they have no token."""
        losses, tokens = (self.losses, self.tokens) if chosen is None else (self.losses[chosen], self.tokens[chosen])
        count = int(tokens.sum())
        return float(losses.sum()) / count if count else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Sum of the negative log likelihood in nats, and the number of supervised tokens it runs over.

    ``rows``: the same for each row; None where the model computes its loss for a whole batch only.
    """

    loss_sum: float
    num_tokens: int
    rows: RowLosses | None = field(default=None, compare=False)

    @property
    def loss(self) -> float:
        """Mean negative log likelihood per supervised token, in nats."""
        return self.loss_sum / max(self.num_tokens, 1)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """Return ``exp(loss)``; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss >= 700 else math.nan


@torch.no_grad()
def score(
    model: torch.nn.Module,
    data: EncodedDataset,
    *,
    pad_token_id: int,
    token_budget: int,
    pad_multiple: int = 1,
    device: torch.device | str,
    rank: int = 0,
    num_ranks: int = 1,
    one_by_one: bool = False,
) -> Scores:
    """Evaluate ``model`` on every ``num_ranks``-th row of ``data``, starting at row ``rank``.

    Rows are sorted by length and padded to the right (``pad_multiple``: see `pass_width`); each forward pass holds at
    most ``token_budget`` padded tokens. The model is put back into the mode it was in.

    Args:
        model: A causal language model.
        data: Rows to score.
        pad_token_id: Fills rows up.
        token_budget: Most padded tokens per forward pass.
        pad_multiple: See `pass_width`.
        device: Where the model is.
        rank: First row.
        num_ranks: Distance between rows.
        one_by_one: Give a model that computes its loss for a whole batch only one row at a time, so that the losses of
            the rows are known. It takes longer.
    """
    rows = range(rank, len(data), num_ranks)
    per_row = attached_rows(getattr(model, "module", model)) is not None
    if one_by_one and not per_row:
        token_budget = 1
    was_training = model.training
    model.eval()
    masked = mask_is_needed(getattr(model, "module", model).config)  # DeepSpeed wraps it
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    found: list[tuple[list[int], Any]] = []
    counts = np.zeros(len(data), np.int64)
    try:
        for piece in micro_batches(data.lengths, rows, token_budget=token_budget, pad_multiple=pad_multiple):
            padded = collate([data[row] for row in piece], pad_token_id, pad_multiple=pad_multiple)
            of_rows = (padded["labels"][:, 1:] != IGNORED).sum(1)
            counts[piece] = of_rows.numpy()
            tokens += int(of_rows.sum())
            batch: dict[str, Any] = {
                name: tensor.to(device) for name, tensor in padded.items() if masked or name != "attention_mask"
            }
            how: dict[str, Any] = {"per_row": True} if per_row else {}
            loss = model(**batch, **how, num_items_in_batch=1).loss.double()
            total += loss.sum()
            if len(piece) == 1 or loss.ndim == 1:
                found.append((list(piece), loss.reshape(-1)))
    finally:
        model.train(was_training)
    losses = _by_row(found, len(data)) if sum(len(piece) for piece, _ in found) == len(rows) else None
    by_row = None if losses is None else RowLosses(losses=losses, tokens=counts)
    return Scores(loss_sum=float(total), num_tokens=tokens, rows=by_row)


def _by_row(found: list[tuple[list[int], torch.Tensor]], count: int) -> NDArray[np.float64]:
    """Losses in the order of the rows; zero for rows of other ranks. One transfer from the device for all of them."""
    losses = np.zeros(count)
    if found:
        losses[[row for piece, _ in found for row in piece]] = torch.cat([of for _, of in found]).cpu().numpy()
    return losses
