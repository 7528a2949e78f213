"""Loss on held-out data, weighted by tokens: the sum over all supervised tokens over their number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmtune.data import IGNORED, EncodedDataset, collate, micro_batches
from llmtune.kernels.attention import mask_is_needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Sum of the negative log likelihood in nats, and the number of supervised tokens it runs over."""

    loss_sum: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log likelihood per supervised token, in nats."""
        return self.loss_sum / max(self.num_tokens, 1)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


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
) -> Scores:
    """Evaluate ``model`` on every ``num_ranks``-th row of ``data``, starting at row ``rank``.

    Rows are sorted by length and padded to the right (``pad_multiple``: see `pass_width`); each forward pass holds at
    most ``token_budget`` padded tokens. The model is put back into the mode it was in.
    """
    rows = range(rank, len(data), num_ranks)
    was_training = model.training
    model.eval()
    masked = mask_is_needed(getattr(model, "module", model).config)  # DeepSpeed wraps it
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for piece in micro_batches(data.lengths, rows, token_budget=token_budget, pad_multiple=pad_multiple):
            padded = collate([data[row] for row in piece], pad_token_id, pad_multiple=pad_multiple)
            tokens += int((padded["labels"][:, 1:] != IGNORED).sum())
            batch = {name: tensor.to(device) for name, tensor in padded.items() if masked or name != "attention_mask"}
            total += model(**batch, num_items_in_batch=1).loss
    finally:
        model.train(was_training)
    return Scores(loss_sum=float(total), num_tokens=tokens)
