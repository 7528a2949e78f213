"""Columns of a row that its format does not read: named, or a reason to refuse the row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from llmtune.data.conversions import verdict
from llmtune.data.formats import Format
from llmtune.data.reporter import MEDIA, RowReporter, holds_text, is_blank

# Numbers under these names say whether or how much a row counts.
_WEIGHTS = frozenset(
    ("label", "labels", "weight", "loss_weight", "train", "training", "loss", "score", "rating", "reward")
)
_FLAT = ("alpaca", "prompt_completion", "question_answer")
MOST_NAMES = 100


def note_unread(row: Mapping[str, Any], format: Format, report: RowReporter, *, forced: bool) -> None:
    """Name every column that holds something and is not read, or report why the row cannot be used without it.

    Args:
        row: The row, its columns named as fields of the format.
        format: What the row is read as.
        report: Takes the names and the problems.
        forced: Whether the person chose the format.
    """
    for column in row.keys() - format.fields:
        value = row[column]
        if isinstance(value, str) and (not value or value.isspace()):
            continue
        name = column.strip().lower()
        if name in MEDIA and not is_blank(value):
            report.add(
                column,
                f"the row has '{column}', and only text can be trained",
                f"remove these rows, or train on their text alone with --set data.ignore_columns={column}",
            )
        elif name == "label" and format.trainable and not forced and _judges(value, format):
            report.add(
                column,
                f"the row has a verdict on its answer ('{column}': {value}), which training would not heed",
                f"keep the good answers alone, or learn every answer with --set data.ignore_columns={column}",
            )
        elif name == "instruction" and format.name in _FLAT and holds_text(value):
            report.add(
                column,
                f"the row has '{column}' beside {' and '.join(map(repr, format.required))}",
                f"say what it is with --set data.columns.system={column}, or --set data.ignore_columns={column}",
            )
        elif holds_text(value) or isinstance(value, bool) or (value is not None and name in _WEIGHTS):
            report.unused[column] = None


def _judges(value: object, format: Format) -> bool:
    """Return whether a label is a verdict: true or false; beside prompt or messages, where it is usual, also 1 or 0."""
    if format.name in ("chat", "sharegpt", "prompt_completion"):
        return verdict(value) is not None
    return format.name in _FLAT and str(value).strip().lower() in ("true", "false")


@dataclass(slots=True)
class UnusedTally:
    """Names of columns and parts that hold something and are not read, with the number of rows that hold them.

    At most `MOST_NAMES` are kept. Tallies can be merged in any order; the names come out sorted.
    """

    rows: dict[str, int] = field(default_factory=dict)

    def add(self, *names: Iterable[str]) -> None:
        """Count one row that holds parts of these names."""
        for name in chain.from_iterable(names):
            self._count(name, 1)

    def merge(self, other: UnusedTally) -> None:
        """Count the rows that ``other`` has counted."""
        for name, count in other.rows.items():
            self._count(name, count)

    def _count(self, name: str, count: int) -> None:
        if name in self.rows or len(self.rows) < MOST_NAMES:
            self.rows[name] = self.rows.get(name, 0) + count

    def names(self, ignored: Collection[str] = ()) -> tuple[str, ...]:
        """Return the names but those that the person wants to hear nothing of."""
        return tuple(sorted(name for name in self.rows if name not in ignored))


def sentence(names: Iterable[str]) -> str:
    """Return what is said of unused parts: ``not used: topic, source``."""
    return f"not used: {', '.join(names)}"
