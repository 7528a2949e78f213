"""Rows to records: recognise the format once, then hold every row to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from llmtune.data.formats import FORMAT_NAMES, FORMATS, Format, candidates
from llmtune.data.kinds import TextRows
from llmtune.data.messages import is_list
from llmtune.data.records import Chunk, Problem, Record, SourceRow
from llmtune.data.source import Source, resolve
from llmtune.errors import ConfigError, DataError, did_you_mean, nearest

# Enough to see past a strange beginning, little enough to hold in memory.
_SAMPLE_ROWS = 200
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Data whose format is known. Iterating yields `Record`s and `Problem` lists, row by row, in order.

    ``texts``: the fields that are texts in the first rows; what else they are later is a change of type.
    ``weight``: as a part of a mix, how often each row is seen in one epoch.
    """

    source: Source
    format: Format
    reason: str
    columns: Mapping[str, str]
    texts: frozenset[str] = frozenset()
    weight: float = 1.0

    def chunks(self, chunk_bytes: int = 8 << 20) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        return self.source.chunks(chunk_bytes)

    def read(self, chunk: Chunk) -> Iterator[Record | list[Problem]]:
        """The rows of one chunk in order, each as its record or with everything that is wrong with it.

        Raises:
            DataError: The file as a whole cannot be read.
        """
        for row in self.source.read(chunk):
            yield [row] if isinstance(row, Problem) else self.convert(row)

    def __iter__(self) -> Iterator[Record | list[Problem]]:
        """Every row of every chunk in order, in this process."""
        for chunk in self.chunks():
            yield from self.read(chunk)

    def convert(self, row: SourceRow) -> Record | list[Problem]:
        """The record of one row, or everything that is wrong with it."""
        mapped = _with_columns(row, self.columns) if self.columns else row
        if isinstance(mapped, list):
            return mapped
        result = self.format.convert(mapped, self.texts)
        if isinstance(result, list) and not self.format.has_fields(mapped.value):
            others = candidates(mapped.value)
            if others:
                problem = f"the row is {others[0].title}, the other rows are {self.format.title}"
                return [_problem(row, None, problem, "split the file by format, or remove the row")]
        return result


def read(
    data: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    weight: float = 1.0,
    text_rows: TextRows = "documents",
) -> Reading:
    """Recognise the format of ``data`` (anything `resolve` takes) and make it ready to iterate.

    Args:
        data: A path, glob, directory, ``datasets.Dataset``, list of dicts, or a `Source`.
        format: One of `FORMAT_NAMES`; recognised from the first rows when not given.
        columns: Field of the format -> column of the data, where they differ.
        weight: As a part of a mix, how often each row is seen in one epoch.
        text_rows: What is a row of a ``.txt`` or ``.md`` file.

    Raises:
        ConfigError: An unknown format or field name.
        DataError: Nothing readable, not recognised, or ambiguous.
    """
    columns = dict(columns or {})
    _check_names(format, columns)
    source = resolve(data, text_rows=text_rows)
    sample = list(islice((row for row in source if isinstance(row, SourceRow)), _SAMPLE_ROWS))
    if not sample:
        raise DataError(_no_rows(source))
    rows = [row for row in (_with_columns(each, columns) for each in sample) if isinstance(row, SourceRow)]
    if not rows:
        raise DataError(_no_column(sample[0], columns))
    among = [each for each in FORMATS if format is None or each.name == format]
    chosen, reason = _choose(rows, among, columns, forced=format)
    return Reading(
        source=source, format=chosen, reason=reason, columns=columns, texts=_texts(rows, chosen), weight=weight
    )


def _texts(rows: Iterable[SourceRow], format: Format) -> frozenset[str]:
    """The names of fields and of messages' parts that are texts in a row."""
    found: set[str] = set()
    for row in rows:
        for name in (*format.required, *format.optional):
            value = row.value.get(name)
            if isinstance(value, str):
                found.add(name)
            elif value is not None and is_list(value):
                parts = (part for part in value if isinstance(part, Mapping))
                found.update(key for part in parts for key in ("content", "value") if isinstance(part.get(key), str))
    return frozenset(found)


def readings_of(
    data: Any, *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Reading, ...]:
    """``data`` as the parts of a mix: `Reading`s as they are, anything else read as one part.

    Raises:
        ConfigError, DataError: See `read`.
    """
    if isinstance(data, Reading):
        return (data,)
    if isinstance(data, (list, tuple)) and data and all(isinstance(each, Reading) for each in data):
        return tuple(data)
    return (read(data, format=format, columns=columns),)


def chunks_of(readings: Sequence[Reading], chunk_bytes: int) -> Iterator[tuple[int, Chunk]]:
    """Every chunk of every reading in order, with the number of its reading."""
    for number, reading in enumerate(readings):
        for chunk in reading.chunks(chunk_bytes):
            yield number, chunk


def _choose(
    rows: Sequence[SourceRow], among: Sequence[Format], columns: Mapping[str, str], *, forced: str | None
) -> tuple[Format, str]:
    votes: Counter[tuple[str, ...]] = Counter()
    found: dict[tuple[str, ...], tuple[Format, ...]] = {}
    for row in rows:
        having = candidates(row.value, among)
        # A column that was named on purpose decides between formats that would all fit.
        named = tuple(each for each in having if columns and set(columns) <= {*each.required, *each.optional})
        having = named or having
        if having:
            key = tuple(each.title for each in having)
            votes[key] += 1
            found[key] = having
    if not votes:
        return _choose_unmatched(rows, among, forced)
    winner = found[votes.most_common(1)[0][0]]
    if len(winner) > 1:
        names = " or ".join(sorted({each.name for each in winner}))
        fields = ", ".join(f"{each.title} ({', '.join(each.required)})" for each in winner)
        flag = f"--set data.format={winner[0].name}"
        if len({each.name for each in winner}) == 1:
            flag = f"--set data.columns.{winner[0].required[0]}=COLUMN"
        raise DataError(
            f"{rows[0].file}:{rows[0].line}: the rows fit more than one format: {fields}. Say which: {flag} ({names})."
        )
    reason = winner[0].detect(rows[0].value) or f"the rows have {' and '.join(map(repr, winner[0].required))}"
    return winner[0], f"{reason} (said so)" if forced else reason


def _choose_unmatched(rows: Sequence[SourceRow], among: Sequence[Format], forced: str | None) -> tuple[Format, str]:
    """No row has all fields of a format: take the one that was asked for, or half met, so that rows are told why."""
    first = rows[0]
    keys = set(first.value)
    half = [each for each in among if keys & set(each.required)]
    if forced is None and (len(half) != 1 or not any(first.value.get(key) is not None for key in half[0].required)):
        shapes = "; ".join(" + ".join(each.required) for each in FORMATS)
        raise DataError(
            f"{first.file}:{first.line}: the format is not recognised; the row has {_listed(first.value)}. "
            f"Expected one of: {shapes}. Map your columns, e.g. --set data.columns.prompt=MY_COLUMN "
            "--set data.columns.completion=MY_OTHER_COLUMN."
        )
    chosen = (half or list(among))[0]
    return chosen, f"the rows have {_listed(first.value)}"


def _with_columns(row: SourceRow, columns: Mapping[str, str]) -> SourceRow | list[Problem]:
    missing = [column for column in columns.values() if column not in row.value]
    if missing:
        hint = f"the row has {_listed(row.value)}"
        return [_problem(row, column, f"the column '{column}' is missing", hint) for column in missing]
    value = {key: item for key, item in row.value.items() if key not in columns.values()}
    value |= {field: row.value[column] for field, column in columns.items()}
    return replace(row, value=value)


def _problem(row: SourceRow, field: str | None, problem: str, hint: str) -> Problem:
    return Problem(file=row.file, line=row.line, field=field, problem=problem, hint=hint, row_group=row.row_group)


def _check_names(format: str | None, columns: Mapping[str, str]) -> None:
    problems = []
    if format is not None and format not in FORMAT_NAMES:
        problems.append(f"data.format: unknown format {format!r}{did_you_mean(format, FORMAT_NAMES)}")
    fields = {field for each in FORMATS for field in (*each.required, *each.optional)}
    problems += [
        f"data.columns.{name}: unknown field{did_you_mean(name, fields)}" for name in columns if name not in fields
    ]
    if problems:
        raise ConfigError("data", problems)


def _no_rows(source: Source) -> str:
    problems = list(islice((item for item in source if isinstance(item, Problem)), _SHOWN))
    if not problems:
        return f"{', '.join(source.labels)}: no rows; expected at least one example."
    return f"{source.labels[0]}: no row can be read. " + summarise(problems)


def _no_column(row: SourceRow, columns: Mapping[str, str]) -> str:
    missing = [column for column in columns.values() if column not in row.value]
    hints = [f"'{name}'{_near(name, row.value)}" for name in missing]
    return f"{row.file}:{row.line}: no column {', '.join(hints)}. The row has {_listed(row.value)}."


def _near(name: str, known: Iterable[str]) -> str:
    match = nearest(name, known)
    return f" (did you mean '{match}'?)" if match else ""


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def summarise(problems: Sequence[Problem], *, more: int = 0) -> str:
    """The first problems, one per sentence with its hint, then how many follow."""
    shown = problems[:_SHOWN]
    rest = len(problems) - len(shown) + more
    parts = chain((f"{problem} ({problem.hint})" for problem in shown), [f"and {rest:,} more"] if rest else [])
    return " · ".join(parts)


def bad_rows_error(problems: Sequence[Problem], *, total: int, affected: int, rows: int) -> DataError:
    """One error for all bad rows: ``problems`` are the first of ``total``, in ``affected`` of ``rows`` rows."""
    way_out = f"or pass --set data.on_bad_row=skip ({affected:,} of {rows:,} rows affected)."
    if total == 1:
        return DataError(f"{problems[0]}. {capitalised(problems[0].hint)}, {way_out}")
    listed = summarise(problems, more=total - len(problems))
    return DataError(f"{total:,} problems. {listed}. Fix the rows, {way_out}")


def require_trainable(reading: Reading) -> None:
    """Refuse formats that hold no single answer to learn.

    Raises:
        DataError: Preference or KTO data.
    """
    if not reading.format.trainable:
        raise DataError(
            f"{', '.join(reading.source.labels[:3])}: {reading.format.title} data ({reading.reason}) holds judgements "
            "of answers, not answers to learn; supervised fine-tuning cannot use it. Give prompt and completion, for "
            "instance --set data.format=prompt_completion --set data.columns.completion=chosen."
        )


def capitalised(text: str) -> str:
    """``text`` with its first letter as at the beginning of a sentence."""
    return text[:1].upper() + text[1:]
