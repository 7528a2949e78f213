"""One data loader item is one update: the micro-batches of this rank's share of one global batch.

Which rows an update holds is a function of (seed, epoch, position) alone; how they are cut into micro-batches depends
on lengths and the token budget, never on a random state. A resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llmtune.console import speaker
from llmtune.data import (
    IGNORED,
    Encoded,
    EncodedDataset,
    Part,
    collate,
    collate_packed,
    epoch_order,
    epoch_rows,
    micro_batches,
    pack_rows,
    shard_rows,
)
from llmtune.training.watchdog import surviving


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one rank does in one update.

    Attributes:
        micro_batches: Tensors of each forward pass: ``input_ids``, ``labels`` and ``attention_mask`` of padded rows,
            int64 [rows, seq]; or ``position_ids`` in place of the mask where rows are packed, int64 [1, seq].
        num_rows: Rows of this rank.
        num_tokens: Tokens without padding.
        num_supervised_tokens: Tokens the loss is computed on (the first of a row never is).
        max_rows: Rows of the largest micro-batch.
        rows: Which rows each micro-batch holds, as numbers in the training data; a filler's too.
    """

    micro_batches: Sequence[dict[str, torch.Tensor]]
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    max_rows: int
    rows: tuple[tuple[int, ...], ...]


class UpdateSampler(Sampler[list[int]]):
    """Row numbers of this rank's share of each update, epoch by epoch.

    A rank that gets no row of a short last update gets a filler, written as ``~row``: it computes that row with nothing
    supervised, because every rank has to take part in the reduction of gradients.

    Args:
        lengths: Tokens of every row of the data set, int32 [rows of the data set].
        parts: The mix that the data set is; None for all its rows once per epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        parts: Sequence[Part] | None = None,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self._lengths, self._batch, self._seed = lengths, global_batch_size, seed
        self._parts = (Part(num_rows=len(lengths)),) if parts is None else parts
        self._rank, self._num_ranks = rank, num_ranks
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(epoch_rows(self._parts) / self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self._parts, self._seed, self._epoch)
        for start in range(0, len(order), self._batch):
            rows = [int(row) for row in order[start : start + self._batch]]
            share = shard_rows(rows, self._lengths, self._num_ranks)[self._rank]
            yield share or [~rows[0]]


class _Rows(Dataset[tuple[Encoded, int]]):
    def __init__(self, data: EncodedDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Encoded, int]:
        return self._data[max(index, ~index)], index


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCollator:
    """Cuts the rows of one update into forward passes: padded micro-batches, or packed sequences.

    Attributes:
        token_budget: Most tokens of a pass, padding included.
        max_rows: Most rows of a pass.
        packing: Whether rows are laid end to end instead of being padded.
        pad_multiple: See `pass_width`.
        pass_overhead_tokens: See `micro_batches`.
    """

    pad_token_id: int
    token_budget: int
    max_rows: int
    packing: bool = False
    pad_multiple: int = 1
    pass_overhead_tokens: int | None = None

    def __call__(self, items: list[tuple[Encoded, int]]) -> Update:
        """Collate ``items``: rows with their numbers; that of a filler is written as ``~number``."""
        rows = [row for row, _ in items]
        lengths = np.array([len(row.input_ids) for row in rows])
        pieces = self._cut(lengths)
        put_together = collate_packed if self.packing else collate
        batches = [
            put_together([rows[i] for i in piece], self.pad_token_id, pad_multiple=self.pad_multiple)
            for piece in pieces
        ]
        filler = any(number < 0 for _, number in items)
        if filler:
            for batch in batches:
                batch["labels"].fill_(IGNORED)
        return Update(
            micro_batches=batches,
            num_rows=0 if filler else len(rows),
            num_tokens=0 if filler else int(lengths.sum()),
            num_supervised_tokens=sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches),
            max_rows=max(len(piece) for piece in pieces),
            rows=tuple(tuple(max(items[i][1], ~items[i][1]) for i in piece) for piece in pieces),
        )

    def _cut(self, lengths: np.ndarray) -> list[list[int]]:
        numbers = range(len(lengths))
        if self.packing:
            return pack_rows(lengths, numbers, token_budget=self.token_budget, max_rows=self.max_rows)
        return micro_batches(
            lengths,
            numbers,
            token_budget=self.token_budget,
            max_rows=self.max_rows,
            pad_multiple=self.pad_multiple,
            pass_overhead_tokens=self.pass_overhead_tokens,
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
        self.on_lost_worker: Callable[[str], None] = speaker.warn

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator does
        """The updates of an epoch, even if a worker process dies; once."""

        def anew() -> Iterator[Any]:
            self._iterator = None  # persistent workers would go on with the dead one
            return iter(super(UpdateLoader, self).__iter__())

        return surviving(super().__iter__, anew, lambda cause: self.on_lost_worker(cause))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        sampler = self.batch_sampler
        assert isinstance(sampler, UpdateSampler)
        sampler.set_epoch(epoch)
