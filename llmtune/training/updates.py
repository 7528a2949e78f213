"""One data loader item is one update: the micro-batches of this rank's share of one global batch.

Which rows an update holds is a function of (seed, epoch, position) alone; how they are cut into micro-batches depends
on lengths and the token budget, never on a random state. A resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llmtune.data import Encoded, EncodedDataset, collate, epoch_order, micro_batches, shard_rows

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one rank does in one update.

    Attributes:
        micro_batches: Tensors of each forward pass: ``input_ids``, ``attention_mask``, ``labels``; int64 [rows, seq].
        num_rows: Rows of this rank.
        num_tokens: Tokens without padding.
        num_supervised_tokens: Tokens the loss is computed on (the first of a row never is).
        max_rows: Rows of the largest micro-batch.
    """

    micro_batches: Sequence[dict[str, torch.Tensor]]
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    max_rows: int


class UpdateSampler(Sampler[list[int]]):
    """Row numbers of this rank's share of each update, epoch by epoch.

    A rank that gets no row of a short last update gets a filler, written as ``~row``: it computes that row with nothing
    supervised, because every rank has to take part in the reduction of gradients.
    """

    def __init__(self, lengths: np.ndarray, *, global_batch_size: int, seed: int, rank: int, num_ranks: int) -> None:
        self._lengths, self._batch, self._seed = lengths, global_batch_size, seed
        self._rank, self._num_ranks = rank, num_ranks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(len(self._lengths), self._seed, self._epoch)
        for start in range(0, len(order), self._batch):
            rows = [int(row) for row in order[start : start + self._batch]]
            share = shard_rows(rows, self._lengths, self._num_ranks)[self._rank]
            yield share or [~rows[0]]


class _Rows(Dataset[tuple[Encoded, bool]]):
    def __init__(self, data: EncodedDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Encoded, bool]:
        return (self._data[~index], True) if index < 0 else (self._data[index], False)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCollator:
    """Cuts the rows of one update into padded micro-batches."""

    pad_token_id: int
    token_budget: int
    max_rows: int

    def __call__(self, items: list[tuple[Encoded, bool]]) -> Update:
        """Collate ``items``: a row and whether it is a filler."""
        rows = [row for row, _ in items]
        lengths = np.array([len(row.input_ids) for row in rows])
        pieces = micro_batches(lengths, range(len(rows)), token_budget=self.token_budget, max_rows=self.max_rows)
        batches = [collate([rows[i] for i in piece], self.pad_token_id) for piece in pieces]
        filler = any(is_filler for _, is_filler in items)
        if filler:
            for batch in batches:
                batch["labels"].fill_(IGNORED)
        return Update(
            micro_batches=batches,
            num_rows=0 if filler else len(rows),
            num_tokens=0 if filler else int(lengths.sum()),
            num_supervised_tokens=sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches),
            max_rows=max(len(piece) for piece in pieces),
        )


class UpdateLoader(DataLoader[Any]):
    """The data loader of a run; ``set_epoch`` reaches the sampler."""

    def __init__(
        self,
        data: EncodedDataset,
        sampler: UpdateSampler,
        collator: UpdateCollator,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        # Its own generator: drawing the workers' seed from the global one would change what dropout draws next.
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            _Rows(data),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=generator,
            persistent_workers=num_workers > 0,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        sampler = self.batch_sampler
        assert isinstance(sampler, UpdateSampler)
        sampler.set_epoch(epoch)
