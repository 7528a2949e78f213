"""Hold rows out for evaluation, the same ones every time, and never a text that is also trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_64_intdigest

from llmtune.data.duplicates import Groups, duplicate_groups
from llmtune.data.encoded import EncodedDataset
from llmtune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

# Never more than this share is held out, however small the data.
_MOST = 0.5
# A group of near duplicates this large is not one text in many versions but a template that many texts fill: kept whole
# it could never be held out, and the evaluation would say nothing about it. llmtune: chosen.
_TEMPLATE_SHARE = 0.25
_TEMPLATE_ROWS = 100


def split(
    dataset: EncodedDataset, fraction: float, seed: int, *, groups: Groups | None = None
) -> tuple[EncodedDataset, EncodedDataset]:
    """Training and evaluation rows, both in the data's order; see `held_out_rows`.

    Args:
        dataset: The rows.
        fraction: Share of the rows to hold out.
        seed: Chooses among the groups.
        groups: Which rows repeat each other, where that is known already.

    Raises:
        DataError: Fewer than two distinct rows, so nothing can be held out.
        ValueError: ``fraction`` is not between 0 and 1.
    """
    groups = groups or duplicate_groups(dataset.digests, dataset.signatures)
    held_out = held_out_rows(groups.group, dataset.digests, fraction, seed)
    training = np.setdiff1d(np.arange(len(dataset)), held_out, assume_unique=True)
    return dataset.select(training), dataset.select(held_out)


def held_out_rows(groups: Rows, contents: NDArray[np.uint64], fraction: float, seed: int) -> Rows:
    """The numbers of the rows to hold out, upwards.

    Which rows these are depends on ``seed`` and the rows' content alone, not on their order. Rows of one group stay
    together. Small data: at least one row is held out, and at most half of the rows. Where the groups are so large that
    less than half of what is wanted could be held out, the smallest of the others as well. Templates count as no group,
    see `kept_together`.

    Args:
        groups: int64 [rows], of `duplicate_groups`.
        contents: uint64 [rows], the rows' `content_digest`.
        fraction: Share of the rows to hold out.
        seed: Chooses among the groups.

    Raises:
        DataError: Fewer than two distinct rows, so nothing can be held out.
        ValueError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"got fraction={fraction}, expected a share between 0 and 1")
    rows = len(groups)
    groups = kept_together(groups, contents)
    names, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise DataError(
            f"{rows} rows, {len(names)} of them distinct: nothing can be held out for evaluation. "
            "Add rows, or give evaluation data with --eval-data FILE."
        )
    lowest = np.full(len(names), np.iinfo(np.uint64).max, np.uint64)  # content that stands for the group
    np.minimum.at(lowest, number, contents)
    keys = [xxh3_64_intdigest(content.to_bytes(8, "little"), seed % (1 << 64)) for content in lowest.tolist()]
    order = np.argsort(np.array(keys, np.uint64), kind="stable")
    wanted = min(max(1, round(rows * fraction)), max(1, int(rows * _MOST)))
    chosen: list[int] = []
    count = 0
    for group in order[:-1].tolist():  # the last group always stays, so that something is trained on
        if count + sizes[group] <= wanted:
            chosen.append(group)
            count += int(sizes[group])
    if 2 * count < wanted:  # nearly every group is larger than that
        left = order[~np.isin(order, chosen)]
        smallest = int(left[np.argmin(sizes[left])])
        if not chosen or count + sizes[smallest] <= rows * _MOST:
            chosen.append(smallest)
    return np.flatnonzero(np.isin(number, chosen))


def kept_together(groups: Rows, contents: NDArray[np.uint64]) -> Rows:
    """The groups that a split keeps together: ``groups`` without templates, whose rows go by their exact content.

    A template is a group of more than a quarter of the rows, and more than 100 of them. Where near duplicates leave
    one group alone, all rows go by their content.
    """
    names, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    template = (sizes > max(_TEMPLATE_ROWS, _TEMPLATE_SHARE * len(groups)))[number]
    if len(names) == 1:
        template[:] = True
    _, exact = np.unique(contents, return_inverse=True)
    return np.where(template, len(names) + exact, number).astype(np.int64)
