"""Packing: rows of one update laid end to end in sequences, as an alternative to padding.

A packed sequence carries no attention mask. transformers reads off ``position_ids`` where a row begins (they restart at
0 there) when it was given neither an attention mask nor a cache: ``masking_utils.find_packed_sequence_indices``.
Attention then goes row by row (``llmtune.kernels.attention``), or behind a block-diagonal causal mask of the square of
the sequence where no kernel does that; sliding windows are kept either way.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.masks import Encoded
from llmtune.data.partition import longest_first, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

IGNORED = -100  # the label that cross-entropy in torch and transformers leaves out


def pack_rows(
    lengths: NDArray[np.int32], rows: Sequence[int], *, token_budget: int, max_rows: int | None = None
) -> list[list[int]]:
    """The rows of one update, dealt to sequences of at most ``token_budget`` tokens: best fit, longest row first.

    Best fit decreasing needs at most 11/9 of the fewest sequences possible, plus one (Johnson et al. 1974); with rows
    as short as answers it is nearly always the fewest. A row longer than the budget stands alone. The sequence with the
    most tokens comes first, so that memory peaks there.

    Args:
        lengths: Tokens of every row of the data set, int32 [rows of the data set].
        rows: Row numbers of this update on this rank.
        token_budget: Most tokens of a sequence.
        max_rows: Most rows of a sequence.
    """
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each sequence that may take more rows, sorted
    for row in longest_first(rows, lengths):
        length = int(lengths[row])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, number = room.pop(place)
            sequences[number].append(row)
        else:
            free, number = token_budget, len(sequences)
            sequences.append([row])
        if free > length and (max_rows is None or len(sequences[number]) < max_rows):
            insort(room, (free - length, number))
    return sorted(sequences, key=lambda sequence: -sum(int(lengths[row]) for row in sequence))


def collate_packed(encoded: Sequence[Encoded], pad_token_id: int, *, pad_multiple: int = 1) -> dict[str, Tensor]:
    """One packed sequence as tensors; what fills it up to a multiple of ``pad_multiple`` is a block of its own.

    Returns:
        ``input_ids``, ``position_ids``, ``labels``: int64 [1, seq]. Positions restart at 0 with every row; labels are
        -100 where nothing is learned and at the first token of every row, which the row before it must not predict.
    """
    import torch

    tokens = sum(len(row.input_ids) for row in encoded)
    width = padded(tokens, pad_multiple)
    input_ids = np.full((1, width), pad_token_id, dtype=np.int64)
    labels = np.full((1, width), IGNORED, dtype=np.int64)
    position_ids = np.zeros((1, width), dtype=np.int64)
    start = 0
    for row in encoded:
        end = start + len(row.input_ids)
        input_ids[0, start:end] = row.input_ids
        labels[0, start + 1 : end] = np.where(row.supervised, row.input_ids, IGNORED)[1:]
        position_ids[0, start:end] = np.arange(end - start)
        start = end
    position_ids[0, tokens:] = np.arange(width - tokens)
    arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
