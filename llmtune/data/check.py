"""Look at every row before anything is trained: what it is, what is wrong with it, how much of it there is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmtune.data.advice import Advice, advise
from llmtune.data.duplicates import SIGNATURE_BYTES, Duplicates, Leakage, contamination, duplicate_groups
from llmtune.data.reading import Reading, bad_rows_error, ignored_names, not_trainable, readings_of
from llmtune.data.records import Problem
from llmtune.data.scan import Scanner, ScanTally, scan
from llmtune.data.supervision import Supervision
from llmtune.data.unread import sentence

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHOWN = 20  # problems that are printed


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """Everything `check` found. ``rows`` counts all rows, ``bad_rows`` those with a problem.

    ``problems``: the first 10,000 of ``num_problems``, in the order of files and lines. ``supervision`` and ``leakage``
    are known once the rows were encoded for a model, and compared with evaluation data. ``dropped_duplicates``: rows
    that a run left out because they repeat others. ``unused``: names of columns and parts that hold something and are
    not read. ``not_trainable``: why ``train`` cannot use this data, None where it can. ``notices``: what a person
    should know about how the data is read.
    """

    format: str
    reason: str
    rows: int
    bad_rows: int
    bytes: int
    num_problems: int
    problems: tuple[Problem, ...]
    statistics: Mapping[str, Any]
    duplicates: Duplicates
    dropped_duplicates: int = 0
    unused: tuple[str, ...] = ()
    not_trainable: str | None = None
    advice: tuple[Advice, ...] = ()
    supervision: Supervision | None = None
    leakage: Leakage | None = None
    notices: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """What came out, in one line."""
        if self.bad_rows:
            have = "has a problem" if self.bad_rows == 1 else "have problems"
            return (
                f"{self.bad_rows:,} of {self.rows:,} rows {have}; write the good ones with --fix good.jsonl"
                if self.bad_rows < self.rows
                else f"{self.bad_rows:,} of {self.rows:,} rows {have}; there is nothing to train on"
            )
        if self.not_trainable:
            return f"0 of {self.rows:,} rows have problems, but train cannot use {self.format} data"
        return f"0 of {self.rows:,} rows have problems"

    def __str__(self) -> str:
        """What there is, what is wrong with it and what would be worth doing, a line each."""
        lines = [f"{self.rows:,} rows, {self.format} ({self.reason}), {self.bad_rows:,} of them with a problem"]
        lines += [sentence(self.unused)] if self.unused else []
        lines += [f"warning: {self.not_trainable}"] if self.not_trainable else []
        lines += [f"  {problem}; {problem.hint}" for problem in self.problems[:_SHOWN]]
        if self.num_problems > _SHOWN:
            lines.append(f"  and {self.num_problems - _SHOWN:,} more problems")
        lines += [f"{advice.severity}: {advice.finding}. {advice.suggestion}" for advice in self.advice]
        return "\n".join(lines)

    def raise_if_bad(self, on_bad_row: Literal["error", "skip"] = "error") -> None:
        """Raise unless the data can be used under this policy.

        Raises:
            DataError: There are bad rows and they are not to be skipped, or no row is good.
        """
        if self.problems and (on_bad_row == "error" or self.bad_rows == self.rows):
            raise bad_rows_error(self.problems, total=self.num_problems, affected=self.bad_rows, rows=self.rows)

    def to_json(self) -> dict[str, Any]:
        """The document of ``check --json`` and of ``data_report.json``."""
        document: dict[str, Any] = {
            "format": self.format,
            "reason": self.reason,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "bytes": self.bytes,
            "num_problems": self.num_problems,
            "problems": [problem.to_json() for problem in self.problems],
            "statistics": dict(self.statistics),
            "duplicates": self.duplicates.to_json(),
            "dropped_duplicates": self.dropped_duplicates,
            "unused_columns": list(self.unused),
            "trainable": self.not_trainable is None,
            "advice": [each.to_json() for each in self.advice],
            "notices": list(self.notices),
        }
        if self.supervision is not None:
            document["tokens"] = self.supervision.tokens
            document["supervised_tokens"] = self.supervision.supervised_tokens
            document["supervision"] = self.supervision.to_json()
        if self.leakage is not None:
            document["leakage"] = self.leakage.to_json()
        return document


def check(
    data: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    near_duplicates: bool = False,
    evaluation: Reading | None = None,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Read every row and report every problem.

    Args:
        data: Anything `resolve` takes, a `Reading`, or several `Reading`s: the parts of a mix.
        format: See `read`.
        columns: See `read`.
        near_duplicates: Also look for rows that nearly repeat others, which takes several times as long.
        evaluation: Evaluation data, whose good rows are compared with the others.
        processes: How many share the work; as many as pay off when None. The report is the same for any number.
        progress: Called with the number of rows done so far.

    Raises:
        DataError: Nothing can be read or recognised at all.
        ConfigError: An unknown format or field.
    """
    readings = readings_of(data, format=format, columns=columns)
    tally = scan(Scanner(readings=readings, signatures=near_duplicates), processes=processes, progress=progress)
    leakage = None
    if evaluation is not None:
        judged = scan(Scanner(readings=(evaluation,), signatures=near_duplicates), processes=processes)
        leakage = _leakage((readings, tally), ((evaluation,), judged), near_duplicates)
    return data_report(readings, tally, near_duplicates=near_duplicates, leakage=leakage)


def data_report(
    readings: Sequence[Reading],
    tally: ScanTally,
    *,
    near_duplicates: bool = False,
    leakage: Leakage | None = None,
) -> DataReport:
    """The account of a whole scan."""
    statistics, duplicates = tally.text.statistics(), _duplicates(readings, tally, near_duplicates)
    return DataReport(
        format=_joined([reading.format.name for reading in readings], " + "),
        reason=_joined([reading.reason for reading in readings], "; "),
        rows=tally.rows,
        bad_rows=tally.bad_rows,
        bytes=sum(reading.source.num_bytes for reading in readings),
        num_problems=tally.num_problems,
        problems=tuple(tally.problems),
        statistics=statistics,
        duplicates=duplicates,
        unused=tally.unused.names(ignored_names(readings)),
        not_trainable=next((not_trainable(reading) for reading in readings if not reading.format.trainable), None),
        advice=advise(statistics, duplicates, leakage=leakage) if tally.rows > tally.bad_rows else (),
        leakage=leakage,
        notices=tuple(dict.fromkeys(notice for reading in readings for notice in reading.source.all_notices)),
    )


def _joined(texts: Sequence[str], separator: str) -> str:
    return separator.join(dict.fromkeys(texts))


def _duplicates(readings: Sequence[Reading], tally: ScanTally, near_duplicates: bool) -> Duplicates:
    digests, signatures = _fingerprints(tally, near_duplicates)
    return duplicate_groups(digests, signatures).facts(_locator(readings, tally))


_Scanned = tuple[Sequence[Reading], ScanTally]


def _leakage(train: _Scanned, evaluation: _Scanned, near: bool) -> Leakage:
    found = contamination(*_fingerprints(train[1], near), *_fingerprints(evaluation[1], near))
    return found.located(_locator(*evaluation), _locator(*train))


def _fingerprints(tally: ScanTally, near: bool) -> tuple[NDArray[np.uint64], NDArray[np.uint8] | None]:
    digests = np.frombuffer(tally.digests, np.uint64)
    return digests, np.frombuffer(tally.signatures, np.uint8).reshape(-1, SIGNATURE_BYTES) if near else None


def _locator(readings: Sequence[Reading], tally: ScanTally) -> Callable[[int], tuple[str, int]]:
    """What gives file and line of a good row."""
    ends = list(accumulate(count for *_, count in tally.chunks))

    def locate(row: int) -> tuple[str, int]:
        reading, file, _ = tally.chunks[bisect_right(ends, row)]
        return readings[reading].source.labels[file], tally.lines[row]

    return locate
