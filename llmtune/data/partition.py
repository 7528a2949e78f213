"""How the rows of one update are shared: over ranks, then over forward passes. Pure functions of lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NEVER = np.iinfo(np.int64).max
# Every width is a multiple of this where passes are padded at all: tensor cores and a CPU's tiles take that many.
_WIDTHS = 8


def padded(length: int, multiple: int) -> int:
    """The next multiple of ``multiple`` that holds ``length`` tokens, one at the least."""
    return max(1, -(-length // multiple)) * multiple


def pass_width(longest: int, num_rows: int, multiple: int) -> int:
    """The least width of a padded pass for which rows x width is a multiple of ``multiple``.

    The width itself is a multiple of eight, or of ``multiple`` where that is less.

    Args:
        longest: Tokens of its longest row.
        num_rows: Its rows.
        multiple: What the tokens of passes are multiples of; 1 pads to the longest row alone.
    """
    return padded(longest, _step(num_rows, multiple))


def pass_tokens(longest: int, most_rows: int, multiple: int) -> NDArray[np.int64]:
    """Tokens of passes of 1, 2, … ``most_rows`` rows with `pass_width`, int64 [most_rows]."""
    steps = _steps(multiple, padded(most_rows, 64))[:most_rows]  # few different numbers, so few to remember
    return -(-max(1, longest) // steps) * steps * np.arange(1, most_rows + 1)


@functools.cache
def _steps(multiple: int, most_rows: int) -> NDArray[np.int64]:
    return np.array([_step(count, multiple) for count in range(1, most_rows + 1)], np.int64)


def _step(num_rows: int, multiple: int) -> int:
    return math.lcm(min(multiple, _WIDTHS), multiple // math.gcd(multiple, num_rows))


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
    for row in longest_first(rows, lengths):
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
    lengths: NDArray[np.int32],
    rows: Sequence[int],
    *,
    token_budget: int,
    max_rows: int | None = None,
    pad_multiple: int = 1,
    pass_overhead_tokens: int | None = None,
) -> list[list[int]]:
    """The rows of one update, cut into the fewest forward passes, and of those cuts the one with the least padding.

    A pass keeps rows x width <= ``token_budget``, with the width that `collate` gives it, and at most ``max_rows``
    rows; a row longer than the budget stands alone. Longest first, so that memory peaks at the first pass. With
    ``pass_overhead_tokens``, one more pass is taken where it saves more padded tokens than that.

    Exact: whatever the rows of the passes are, dealing the sorted rows to passes of the same numbers of rows makes none
    wider, so a best cut is one into runs of the sorted rows; and the best cut of the rows from ``i`` on follows from
    those of the rows after it. Time is linear in the rows, about 8 microseconds each, and no cut is approximate.

    Args:
        lengths: Tokens of every row of the data set, int32 [rows of the data set].
        rows: Row numbers of this update on this rank.
        token_budget: Most padded tokens of a pass.
        max_rows: Most rows of a pass.
        pad_multiple: See `pass_width`.
        pass_overhead_tokens: What a pass costs beside its tokens, in tokens; None when passes alone count.
    """
    if not rows:
        return []
    ordered = longest_first(rows, lengths)
    count = len(ordered)
    most = count if max_rows is None else max_rows
    # By default one more pass weighs more than all padding there can be.
    all_padding = padded(int(lengths[ordered[0]]), _step(1, pad_multiple)) * count
    one_pass = all_padding + 1 if pass_overhead_tokens is None else pass_overhead_tokens
    cost = np.zeros(count + 1, np.int64)  # cost[i]: of the best cut of ordered[i:]
    taken = np.ones(count, np.int64)  # rows of its first pass
    for i in range(count - 1, -1, -1):
        length = max(1, int(lengths[ordered[i]]))
        rows_here = max(1, min(count - i, most, token_budget // length))
        costs = pass_tokens(length, rows_here, pad_multiple)
        fits = costs <= token_budget
        fits[0] = True
        costs += cost[i + 1 : i + 1 + rows_here]
        best = int(np.where(fits, costs, _NEVER).argmin())
        taken[i], cost[i] = best + 1, costs[best] + one_pass
    batches, start = [], 0
    while start < count:
        batches.append(ordered[start : start + int(taken[start])])
        start += int(taken[start])
    return batches


def longest_first(rows: Sequence[int], lengths: NDArray[Any]) -> list[int]:
    """``rows`` by falling length; equal lengths in the order of their numbers."""
    return sorted(rows, key=lambda row: (-int(lengths[row]), row))
