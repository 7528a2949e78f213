"""Hold rows out for evaluation, the same ones every time, and never a text that is also trained on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from llmtune.data.encoded import EncodedDataset
from llmtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Never more than this share is held out, however small the data.
_MOST = 0.5


def split(dataset: EncodedDataset, fraction: float, seed: int) -> tuple[EncodedDataset, EncodedDataset]:
    """Training and evaluation rows, both in the data's order.

    Which rows are held out depends on ``seed`` and the rows' content alone, not on their order. Identical rows stay
    together. Small data: at least one row is held out, and at most half of the rows; where every row is repeated more
    often than that, the least repeated one.

    Raises:
        DataError: Fewer than two distinct rows, so nothing can be held out.
        ValueError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"got fraction={fraction}, expected a share between 0 and 1")
    groups: dict[bytes, list[int]] = {}
    for index in range(len(dataset)):
        content = hashlib.sha256(dataset[index].input_ids.tobytes()).digest()
        groups.setdefault(content, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{len(dataset)} rows, {len(groups)} of them distinct: nothing can be held out for evaluation. "
            "Add rows, or give evaluation data with --eval-data FILE."
        )
    wanted = min(max(1, round(len(dataset) * fraction)), max(1, int(len(dataset) * _MOST)))
    order = sorted(groups, key=lambda content: hashlib.sha256(f"{seed}:".encode() + content).digest())
    held_out: list[int] = []
    for content in order[:-1]:  # the last group always stays, so that something is trained on
        if len(held_out) + len(groups[content]) <= wanted:
            held_out += groups[content]
    if not held_out:  # every row is repeated more often than that
        held_out = list(groups[min(order, key=lambda content: len(groups[content]))])
    return dataset.select(_others(len(dataset), held_out)), dataset.select(sorted(held_out))


def _others(count: int, held_out: Sequence[int]) -> list[int]:
    taken = set(held_out)
    return [index for index in range(count) if index not in taken]
