"""Which rows go together: epochs, ranks, micro-batches, tensors. Pure functions; no global random state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.masks import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PAD_MULTIPLE = 8  # widths of tensors; matrix units of CPUs and GPUs work on blocks of eight 2-byte values
IGNORED = -100  # the label that cross-entropy in torch and transformers leaves out


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of rows in one epoch: a permutation that depends on ``seed`` and ``epoch`` alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows)


def shard_rows(rows: Sequence[int], lengths: NDArray[np.int32], world_size: int) -> list[list[int]]:
    """The rows of one update dealt to ``world_size`` ranks: counts differ by at most one, tokens are balanced.

    Args:
        rows: Row numbers of one update.
        lengths: Tokens of every row of the data set, int32 [rows of the data set].
        world_size: Number of ranks.
    """
    shards: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    most, extra = divmod(len(rows), world_size)
    full = 0  # ranks that already hold one row more than the others may
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        open_ranks = [
            rank
            for rank in range(world_size)
            if len(shards[rank]) < most or (len(shards[rank]) == most and full < extra)
        ]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], len(shards[rank]), rank))
        shards[rank].append(row)
        tokens[rank] += int(lengths[row])
        full += len(shards[rank]) == most + 1
    return shards


def micro_batches(
    lengths: NDArray[np.int32], rows: Sequence[int], *, token_budget: int, max_rows: int | None = None
) -> list[list[int]]:
    """The rows of one update, cut into micro-batches of similar length.

    Each micro-batch keeps rows x width <= ``token_budget``, its longest row padded as `collate` does, and at most
    ``max_rows`` rows; a row longer than the budget stands alone. Longest first, so that memory peaks at the first
    micro-batch of an update.

    Args:
        lengths: Tokens of every row of the data set, int32 [rows of the data set].
        rows: Row numbers of this update on this rank.
        token_budget: Most padded tokens of a micro-batch.
        max_rows: Most rows of a micro-batch.
    """
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        current = batches[-1] if batches else None
        # Sorted downwards, so the first row of a batch is its longest.
        if (
            current is not None
            and (len(current) + 1) * padded(int(lengths[current[0]])) <= token_budget
            and (max_rows is None or len(current) < max_rows)
        ):
            current.append(row)
        else:
            batches.append([row])
    return batches


def padded(length: int) -> int:
    """The width that a row of this length is padded to at least."""
    return max(1, -(-length // PAD_MULTIPLE)) * PAD_MULTIPLE


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """One micro-batch as tensors, padded on the right to a multiple of ``PAD_MULTIPLE``.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: int64 [batch, seq]; labels are -100 where nothing is learned.
    """
    import torch

    width = padded(max(len(row.input_ids) for row in encoded))
    input_ids = np.full((len(encoded), width), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(encoded), width), dtype=np.int64)
    labels = np.full((len(encoded), width), IGNORED, dtype=np.int64)
    for i, row in enumerate(encoded):
        length = len(row.input_ids)
        input_ids[i, :length] = row.input_ids
        attention_mask[i, :length] = 1
        labels[i, :length] = np.where(row.supervised, row.input_ids, IGNORED)
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
