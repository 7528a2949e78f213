"""Where the documents of a packed row begin, in place of a mask of the square of its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch


def variable_lengths(position_ids: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """What variable-length kernels are told of a packed row, under transformers' names, worked out on the host.

    Goes into the pass beside ``position_ids``: the attention of this package and FlashAttention take it from there
    (``transformers.modeling_flash_attention_utils.FlashAttentionKwargs``) and wait for no device.

    Args:
        position_ids: int64 [1, seq], not yet on the device; a document begins where it does not go on by one.

    Returns:
        ``cu_seq_lens_q`` and ``cu_seq_lens_k``: int32 [documents + 1], where each document begins and the last ends;
        ``max_length_q`` and ``max_length_k``: tokens of the longest document.
    """
    begins = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    bounds = torch.cat([begins.new_zeros(1), begins, begins.new_tensor([position_ids.shape[1]])])
    longest = int(bounds.diff().max())
    bounds = bounds.to(torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@dataclass(slots=True, kw_only=True)
class Documents:
    """The documents of one row, laid end to end: each attends to itself alone, causally.

    Handed from layer to layer where transformers hands its mask. What a reader asks for is worked out once per pass.

    Attributes:
        continues: Whether a token, from the second on, belongs to the document of the one before it: bool [seq - 1].
        window: Most tokens that a token sees, itself included; None if it sees all before it.
        make_mask: Builds the mask that the documents stand for: bool [1, 1, seq, seq].
    """

    continues: torch.Tensor
    window: int | None
    make_mask: Callable[[], torch.Tensor]
    _bounds: tuple[int, ...] | None = field(default=None, init=False)
    _cumulated: torch.Tensor | None = field(default=None, init=False)
    _mask: torch.Tensor | None = field(default=None, init=False)

    def bounds(self) -> tuple[int, ...]:
        """Where each document begins, from 0 on, and where the last one ends. Waits for the device."""
        if self._bounds is None:
            starts = (~self.continues).nonzero().flatten() + 1
            self._bounds = (0, *starts.tolist(), len(self.continues) + 1)
        return self._bounds

    def longest(self) -> int:
        """Tokens of the longest document."""
        bounds = self.bounds()
        return max(end - start for start, end in pairwise(bounds))

    def cumulated(self) -> torch.Tensor:
        """`bounds` as variable-length kernels take them: int32 [documents + 1], on the device of the row."""
        if self._cumulated is None:
            self._cumulated = torch.tensor(self.bounds(), dtype=torch.int32, device=self.continues.device)
        return self._cumulated

    def mask(self) -> torch.Tensor:
        """What they stand for, where no kernel takes them: bool [1, 1, seq, seq]."""
        if self._mask is None:
            self._mask = self.make_mask()
        return self._mask
