"""Which rows an epoch holds and in which order, and rows as padded tensors. No global random state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.masks import Encoded
from llmtune.data.packing import IGNORED
from llmtune.data.partition import pass_width

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Second word of the generator's key: epochs count from 0, parts from here, so that no part shares an epoch's numbers.
_FIRST_PART = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a mix: its rows lie together in the data set; each is seen ``weight`` times in an epoch."""

    num_rows: int
    weight: float = 1.0

    @property
    def rows_per_epoch(self) -> int:
        """Rows this part gives to every epoch: ``weight x num_rows``, rounded, and at least one if it has any."""
        return max(min(1, self.num_rows), int(self.weight * self.num_rows + 0.5))


def epoch_rows(parts: Sequence[Part]) -> int:
    """Rows of one epoch over a mix; the same for every epoch."""
    return sum(part.rows_per_epoch for part in parts)


def epoch_order(parts: Sequence[Part], seed: int, epoch: int) -> NDArray[np.int64]:
    """The row numbers of one epoch in order: a function of ``parts``, ``seed`` and ``epoch`` alone.

    Each part gives all its rows as often as its weight is whole. The rest of the weight is a stretch of a shuffled
    circle of its rows, continued by the next epoch, so that over the epochs all rows of a part are seen equally often
    (their counts differ by at most one). A single part of weight 1 is a permutation of its rows.

    Args:
        parts: The mix, in the order of the data set's rows.
        seed: Seed of the run.
        epoch: Counted from 0.

    Returns:
        int64 [rows per epoch].
    """
    chosen, first = [np.zeros(0, np.int64)], 0
    for number, part in enumerate(parts):
        passes, rest = divmod(part.rows_per_epoch, max(1, part.num_rows))
        chosen += [np.arange(first, first + part.num_rows)] * passes
        if rest:
            circle = _shuffled(part.num_rows, seed, _FIRST_PART + number)
            chosen.append(first + circle[(epoch * rest + np.arange(rest)) % part.num_rows])
        first += part.num_rows
    rows = np.concatenate(chosen)
    return rows[_shuffled(len(rows), seed, epoch)]


def _shuffled(count: int, seed: int, stream: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, stream])).permutation(count)


def collate(encoded: Sequence[Encoded], pad_token_id: int, *, pad_multiple: int = 1) -> dict[str, Tensor]:
    """One micro-batch as tensors, padded on the right; for ``pad_multiple`` see `pass_width`.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: int64 [batch, seq]; labels are -100 where nothing is learned.
    """
    import torch

    width = pass_width(max(len(row.input_ids) for row in encoded), len(encoded), pad_multiple)
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
