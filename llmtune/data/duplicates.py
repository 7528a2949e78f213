"""Rows that repeat others: exactly, nearly, and between training and evaluation.

Two texts are *exactly* equal when they differ at most in case, white space and sentence punctuation. They are *nearly*
equal when at least `THRESHOLD` of their shingles (three consecutive words; five characters where a script puts no
spaces) are the same, estimated with MinHash (Broder 1997). Texts of fewer than `LEAST_SHINGLES` shingles are never
nearly equal to anything: "What is 12+7?" and "What is 13+9?" are two problems, not one.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

THRESHOLD = (
    0.8  # Lee et al. 2021, arXiv:2107.06499, section 4.2; Rae et al. 2021 (Gopher), arXiv:2112.11446, appendix A
)
LEAST_SHINGLES = 20
SIGNATURE_BYTES = 256

_PERMUTATIONS = SIGNATURE_BYTES // 4  # the estimate's standard error at 0.8 is sqrt(0.8 × 0.2 / 64) = 0.05
_BAND = 5  # twelve bands of five: two texts that share 0.8 meet in one of them with 99.2 %, with 0.5 in 32 %
_NEIGHBOURS = 4  # in a bucket each row is compared with its next four and with the first: linear in any bucket
_KEEPERS = 64  # rows of one group that others are compared with when near duplicates are dropped
_BLOCK = 1 << 14  # pairs compared at once: 8 MiB of signatures
_MOST_EXAMPLES = 20

# What the exact comparison leaves out. Operators stay: 12+7 is not 12-7.
_LEFT_OUT = b"!\"'(),.:;?[]_`{}\0" + string.whitespace.encode()
_LOWER = bytes(byte + 32 if chr(byte) in string.ascii_uppercase else byte for byte in range(256))
_WORDS = bytes(32 if byte in _LEFT_OUT else _LOWER[byte] for byte in range(256))
_NUMBERS = bytes(byte if chr(byte) in string.digits else 32 for byte in range(256))
# Quotation marks, dashes and stops of other scripts.
_STOPS = re.compile("[«»·¿¡\u2010-\u2015\u2018-\u201f\u2022\u060c\u061b\u061f\u0964\u0965\u3001\u3002\u3008-\u3011]+")
# NFKC would turn 5² into 52.
_RAISED = re.compile("[²³¹¼-¾\u2070-\u209f\u2150-\u218f]")


def content_digest(text: str) -> int:
    """64 bits (xxh3) that are equal for texts which differ at most in case, white space and sentence punctuation.

    Digits, letters of any script, operators and where a number ends all count. A text of nothing but punctuation
    stands for itself.
    """
    raw = _plain(text)
    folded = raw.translate(_LOWER, _LEFT_OUT)
    if not folded:
        return xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=1)
    numbers = b" ".join(raw.translate(_NUMBERS).split())
    return xxh3_64_intdigest(folded, seed=xxh3_64_intdigest(numbers) if numbers else 0)


def signature(text: str) -> bytes:
    """MinHash of the text's shingles, `SIGNATURE_BYTES` long; all zero for a text too short to compare.

    The same in every process and on every machine.
    """
    from datasketch import MinHash

    shingles = _shingles(_plain(text))
    if len(shingles) < LEAST_SHINGLES:
        return bytes(SIGNATURE_BYTES)
    sketch = MinHash(scheme="affine32", permutations=_permutations(), num_perm=_PERMUTATIONS, hashfunc=_hashed_already)
    for start in range(0, len(shingles), _BLOCK):
        sketch.update_batch([shingles[start : start + _BLOCK]])
    return bytes(sketch.hashvalues.astype("<u4").tobytes())


def _plain(text: str) -> bytes:
    if text.isascii():
        return text.encode()
    text = unicodedata.normalize("NFC" if _RAISED.search(text) else "NFKC", text).casefold()
    text = _STOPS.sub(" ", text)
    return text.encode("utf-8", "surrogatepass")


def _shingles(raw: bytes) -> NDArray[np.uint32]:
    folded = raw.translate(_WORDS)
    words = folded.split()
    size = 3
    if len(folded) > 32 * len(words):  # bytes per word: no script that writes spaces comes near
        size = 5
        characters = b"".join(words).decode("utf-8", "surrogatepass")
        units = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4")
    else:
        units = np.fromiter(map(crc32, words), np.uint32, len(words))
    count = max(0, len(units) - size + 1)
    shingles = np.zeros(count, np.uint32)
    for offset in range(size):
        shingles = shingles * np.uint32(0x01000193) + units[offset : offset + count]
    return shingles


def _hashed_already(values: Any) -> Any:
    # A whole array counts as one value: datasketch lays them out in a row, see test_data_duplicates.
    return values


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=_PERMUTATIONS, seed=1, scheme="affine32").permutations


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """A row that repeats an earlier one."""

    file: str
    line: int
    of_file: str
    of_line: int
    near: bool

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """How much of a data set repeats itself.

    Attributes:
        rows: All rows.
        exact_rows: Rows that repeat an earlier one exactly: what ``drop_exact`` leaves out.
        exact_groups: Texts that occur more than once.
        near_rows: Further rows that repeat an earlier one nearly: what ``drop_near`` leaves out besides. None: not
            looked for.
        near_groups: Groups that hold at least two different texts. None: not looked for.
        largest_group: Rows in the largest group of exact and near duplicates; 1 where nothing repeats.
        examples: The first of them, at most 20.
    """

    rows: int
    exact_rows: int
    exact_groups: int
    near_rows: int | None
    near_groups: int | None
    largest_group: int
    examples: tuple[Repeat, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The ``duplicates`` object of ``data_report.json``."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        return facts | {"examples": [example.to_json() for example in self.examples]}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Which rows belong together, as row numbers. Every array: int64 [rows].

    Attributes:
        exact: The first row with the same text (its own number where there is none before it).
        group: The first row of the group. Near duplicates chain: a row may share its group with one that it does not
            resemble itself. No two rows of different groups were found alike, so this is what a split keeps together.
        kept: The row that stays for it when near duplicates are dropped; the two are alike themselves.
        near: Whether near duplicates were looked for.
    """

    exact: Rows
    group: Rows
    kept: Rows
    near: bool

    def facts(self, locate: Callable[[int], tuple[str, int]]) -> Duplicates:
        """The counts, and examples by file and line; ``locate(row)`` gives those."""
        rows = np.arange(len(self.exact))
        exact, near = self.exact != rows, (self.kept != rows) & (self.exact == rows)
        sizes = np.bincount(self.group, minlength=1)
        texts = np.bincount(self.group[~exact], minlength=1)
        examples = []
        for row in np.flatnonzero(exact | near)[:_MOST_EXAMPLES].tolist():
            of_file, of_line = locate(int(self.exact[row] if exact[row] else self.kept[row]))
            file, line = locate(row)
            examples.append(Repeat(file=file, line=line, of_file=of_file, of_line=of_line, near=bool(near[row])))
        return Duplicates(
            rows=len(rows),
            exact_rows=int(exact.sum()),
            exact_groups=len(np.unique(self.exact[exact])),
            near_rows=int(near.sum()) if self.near else None,
            near_groups=int((texts > 1).sum()) if self.near else None,
            largest_group=int(sizes.max()),
            examples=tuple(examples),
        )


def duplicate_groups(
    digests: NDArray[np.uint64], signatures: NDArray[np.uint8] | None, *, threshold: float = THRESHOLD
) -> Groups:
    """Which rows repeat each other. Which rows share a group depends on their content, not on their order.

    Near duplicates are found by locality-sensitive hashing (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets,
    chapter 3.4) and verified by their signatures. Time and memory grow with the number of rows, whatever repeats.

    Args:
        digests: uint64 [rows], of `content_digest`.
        signatures: uint8 [rows, `SIGNATURE_BYTES`], of `signature`; None to look for exact duplicates alone.
        threshold: Least share of shingles that near duplicates have in common.
    """
    numbers = np.arange(len(digests))
    order = np.lexsort((numbers, digests))
    new = np.append(True, digests[order][1:] != digests[order][:-1])[: len(order)]
    first_rows = order[new]  # one row for each distinct text, in the order of their digests
    exact = np.empty_like(numbers)
    exact[order] = first_rows[np.cumsum(new) - 1]
    if signatures is None:
        return Groups(exact=exact, group=exact, kept=exact, near=False)
    hashes = _hashes(signatures)
    texts = first_rows[hashes[first_rows].any(axis=1)]
    label = np.arange(len(texts))
    for a, b in _bucket_pairs(hashes, texts):
        apart = label[a] != label[b]
        a, b = a[apart], b[apart]
        alike = _similarity(hashes, texts[a], texts[b]) >= threshold
        _join(label, a[alike], b[alike])
    group, kept = exact.copy(), exact.copy()
    for members in _members(label, texts):
        group[members] = members[0]
        kept[members] = _kept(hashes, members, threshold)
    return Groups(exact=exact, group=group[exact], kept=kept[exact], near=True)


def _hashes(signatures: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(signatures).view("<u4").reshape(len(signatures), _PERMUTATIONS)


def _similarity(hashes: NDArray[np.uint32], a: Rows, b: Rows, others: NDArray[np.uint32] | None = None) -> Any:
    """Estimated share of common shingles of the rows ``a`` with the rows ``b`` (of ``others``), pair by pair."""
    others = hashes if others is None else others
    equal = np.empty(len(a), np.float32)
    for start in range(0, len(a), _BLOCK):
        block = slice(start, start + _BLOCK)
        equal[block] = (hashes[a[block]] == others[b[block]]).mean(axis=1)
    return equal


def _band_keys(hashes: NDArray[np.uint32], rows: Rows) -> Iterator[NDArray[np.uint64]]:
    """For each band, one number per row, equal where the band is."""
    for start in range(0, _PERMUTATIONS - _BAND + 1, _BAND):
        key = np.zeros(len(rows), np.uint64)
        for column in range(start, start + _BAND):
            key = (key ^ hashes[rows, column]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        yield key


def _bucket_pairs(hashes: NDArray[np.uint32], rows: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Positions in ``rows`` that may be alike: near each other in a bucket, or with the bucket's first."""
    for key in _band_keys(hashes, rows):
        order = np.argsort(key, kind="stable")
        key = key[order]
        for step in range(1, _NEIGHBOURS + 1):
            here = np.flatnonzero(key[step:] == key[:-step])
            yield order[here], order[here + step]
        start = np.searchsorted(key, key)
        here = np.flatnonzero(np.arange(len(key)) - start > _NEIGHBOURS)
        yield order[start[here]], order[here]


def _join(label: Rows, a: Rows, b: Rows) -> None:
    """Give what the pairs connect one label, the lowest. ``label``: every entry points at its group's lowest."""
    while len(a):
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while not np.array_equal(label, higher := label[label]):
            label[:] = higher
        apart = label[a] != label[b]
        a, b = a[apart], b[apart]


def _members(label: Rows, rows: Rows) -> list[Rows]:
    """The rows of each group of two or more, upwards."""
    order = np.lexsort((rows, label))
    ends = np.flatnonzero(np.diff(label[order])) + 1
    return [members for members in np.split(rows[order], ends) if len(members) > 1]


def _kept(hashes: NDArray[np.uint32], members: Rows, threshold: float) -> Rows:
    """For each row the one that stays for it: from the first on, each row that is left stays for all like itself."""
    if len(members) == 2:
        return members[[0, 0]]
    kept, left = members.copy(), np.arange(len(members))
    for _ in range(_KEEPERS):
        alike = _similarity(hashes, np.broadcast_to(members[left[0]], left.shape), members[left]) >= threshold
        kept[left[alike]] = members[left[0]]
        left = left[~alike]
        if len(left) == 0:
            break
    return kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leakage:
    """Evaluation rows that also occur in training.

    Attributes:
        rows: Evaluation rows, all of them.
        exact_rows: int64 [n], the numbers of those whose text is in the training rows.
        near_rows: int64 [n], further ones that a training row nearly repeats. None: not looked for.
        training_rows: int64 [n], the training rows concerned.
        examples: (evaluation row, training row), at most 20.
        places: The same by file and line, once `located` has found them.
    """

    rows: int
    exact_rows: Rows
    near_rows: Rows | None
    training_rows: Rows
    examples: tuple[tuple[int, int], ...]
    places: tuple[Repeat, ...] = ()

    @property
    def leaked_rows(self) -> Rows:
        """Return the numbers of the evaluation rows that occur in training, exactly or nearly, upwards."""
        return self.exact_rows if self.near_rows is None else np.union1d(self.exact_rows, self.near_rows)

    def located(
        self, evaluation: Callable[[int], tuple[str, int]], training: Callable[[int], tuple[str, int]]
    ) -> Leakage:
        """Return the same with places; each argument gives file and line of a row."""
        exact, places = set(self.exact_rows.tolist()), []
        for row, of in self.examples:
            (file, line), (of_file, of_line) = evaluation(row), training(of)
            places.append(Repeat(file=file, line=line, of_file=of_file, of_line=of_line, near=row not in exact))
        return replace(self, places=tuple(places))

    @property
    def leaked(self) -> int:
        """How many evaluation rows occur in training, exactly or nearly."""
        return len(self.exact_rows) + (0 if self.near_rows is None else len(self.near_rows))

    def to_json(self) -> dict[str, Any]:
        """The ``leakage`` object of ``data_report.json``: counts, and examples by row number and by place."""
        places = [place.to_json() for place in self.places] or [{} for _ in self.examples]
        return {
            "rows": self.rows,
            "exact_rows": len(self.exact_rows),
            "near_rows": None if self.near_rows is None else len(self.near_rows),
            "training_rows": len(self.training_rows),
            "examples": [
                {"eval_row": row, "training_row": of} | place
                for (row, of), place in zip(self.examples, places, strict=True)
            ],
        }


def contamination(
    train_digests: NDArray[np.uint64],
    train_signatures: NDArray[np.uint8] | None,
    eval_digests: NDArray[np.uint64],
    eval_signatures: NDArray[np.uint8] | None,
    threshold: float = THRESHOLD,
) -> Leakage:
    """Which evaluation rows also occur among the training rows; arrays as in `duplicate_groups`."""
    by_digest = np.argsort(train_digests, kind="stable")
    at = np.searchsorted(train_digests[by_digest], eval_digests)
    exact = np.flatnonzero(np.isin(eval_digests, train_digests))
    found = [(exact, by_digest[at[exact]])]
    concerned = np.isin(train_digests, eval_digests)
    near = None
    if train_signatures is not None and eval_signatures is not None:
        source, alike = _near_sources(_hashes(eval_signatures), _hashes(train_signatures), threshold)
        near = np.setdiff1d(np.flatnonzero(source >= 0), exact)
        found.append((near, source[near]))
        concerned |= alike
    examples = sorted(pair for a, b in found for pair in zip(a.tolist(), b.tolist(), strict=True))
    return Leakage(
        rows=len(eval_digests),
        exact_rows=exact,
        near_rows=near,
        training_rows=np.flatnonzero(concerned),
        examples=tuple(examples[:_MOST_EXAMPLES]),
    )


def _near_sources(
    left: NDArray[np.uint32], right: NDArray[np.uint32], threshold: float
) -> tuple[Rows, NDArray[np.bool_]]:
    """For each row of ``left`` one of ``right`` that is alike, or -1; and which rows of ``right`` are alike to any."""
    a_rows, b_rows = np.flatnonzero(left.any(axis=1)), np.flatnonzero(right.any(axis=1))
    source, concerned = np.full(len(left), -1), np.zeros(len(right), np.bool_)
    for a_key, b_key in zip(_band_keys(left, a_rows), _band_keys(right, b_rows), strict=True):
        for a, b in (*_meetings(a_key, b_key), *((a, b) for b, a in _meetings(b_key, a_key))):
            a, b = a_rows[a], b_rows[b]
            open_ = (source[a] < 0) | ~concerned[b]
            a, b = a[open_], b[open_]
            alike = _similarity(left, a, b, right) >= threshold
            source[a[alike]] = b[alike]
            concerned[b[alike]] = True
    return source, concerned


def _meetings(keys: NDArray[np.uint64], buckets: NDArray[np.uint64]) -> Iterator[tuple[Rows, Rows]]:
    """Each of ``keys`` with the first few in its bucket, as positions."""
    order = np.argsort(buckets, kind="stable")
    start = np.searchsorted(buckets[order], keys)
    for step in range(_NEIGHBOURS):
        at = np.minimum(start + step, len(order) - 1)
        here = np.flatnonzero((start + step < len(order)) & (buckets[order[at]] == keys)) if len(order) else order
        yield here, order[at[here]]
