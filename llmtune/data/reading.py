"""Rows to records: recognise the format once, then hold every row to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from llmtune.data.columns import (
    guessed_columns,
    listed,
    no_column,
    not_recognised,
    optional_columns,
    spelled_columns,
    with_columns,
)
from llmtune.data.formats import FORMAT_NAMES, FORMATS, Format, candidates
from llmtune.data.kinds import TextRows
from llmtune.data.records import Chunk, Problem, Record, SourceRow
from llmtune.data.reporter import RowReporter, is_list
from llmtune.data.source import Source, resolve
from llmtune.data.unread import note_unread
from llmtune.errors import ConfigError, DataError, did_you_mean

# Enough to see past a strange beginning, little enough to hold in memory.
_SAMPLE_ROWS = 200
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Data whose format is known. Iterating yields `Record`s and `Problem` lists, row by row, in order.

    Attributes:
        source: Where the rows are.
        format: What they are read as.
        reason: Why.
        columns: Field of the format -> column of the data, where they differ.
        ignored: Columns that are treated as if they were not there.
        forced: Whether the person chose the format.
        texts: The fields that are texts in the first rows; what else they are later is a change of type.
        instead: For data that cannot be trained on, the settings under which its answers can be learned.
        weight: As a part of a mix, how often each row is seen in one epoch.
    """

    source: Source
    format: Format
    reason: str
    columns: Mapping[str, str]
    ignored: frozenset[str] = frozenset()
    forced: bool = False
    texts: frozenset[str] = frozenset()
    instead: str = ""
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
        """Return the record of one row, or everything that is wrong with it."""
        mapped = _without(row, self.ignored) if self.ignored else row
        if self.columns:
            named = with_columns(mapped, self.columns, self.format.required)
            if isinstance(named, list):
                return named
            mapped = named
        result = self.format.convert(mapped, self.texts)
        if isinstance(result, list):
            if not self.format.has_fields(mapped.value) and (others := candidates(mapped.value)):
                problem = f"the row is {others[0].title}, the other rows are {self.format.title}"
                return [_problem(row, None, problem, "split the file by format, or remove the row")]
            return result
        if len(mapped.value) > len(self.format.required) and not mapped.value.keys() <= self.format.fields:
            report = RowReporter(mapped)
            note_unread(mapped.value, self.format, report, forced=self.forced)
            if report.problems:
                return report.problems
            if report.unused:
                result.unused = (*result.unused, *sorted(report.unused))
        return result


def read(
    data: Any,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    weight: float = 1.0,
    text_rows: TextRows = "documents",
) -> Reading:
    """Recognise the format of ``data`` (anything `resolve` takes) and make it ready to iterate.

    Args:
        data: A path, glob, directory, ``datasets.Dataset``, list of dicts, or a `Source`.
        format: One of `FORMAT_NAMES`; recognised from the first rows when not given.
        columns: Field of the format -> column of the data, where they differ. Columns whose names say plainly what
            they are (``Question``, ``q``, ``system_prompt``) need not be given.
        ignore_columns: Columns to treat as if they were not there.
        weight: As a part of a mix, how often each row is seen in one epoch.
        text_rows: What is a row of a ``.txt`` or ``.md`` file.

    Raises:
        ConfigError: An unknown format or field name, or a field that the recognised format does not have.
        DataError: Nothing readable, not recognised, or ambiguous.
    """
    columns, ignored = dict(columns or {}), frozenset(ignore_columns)
    _check_names(format, columns)
    source = resolve(data, text_rows=text_rows)
    sample = list(islice((row for row in source if isinstance(row, SourceRow)), _SAMPLE_ROWS))
    if not sample:
        raise DataError(_no_rows(source))
    if missing := no_column(sample, columns):
        raise DataError(missing)
    sample = [_without(row, ignored) for row in sample]
    among = [each for each in FORMATS if format is None or each.name == format]
    every_field = {field for each in among for field in each.fields}
    spelled = {field: column for field, column in spelled_columns(sample, every_field).items() if field not in columns}
    rows = _named(sample, columns | spelled)
    guessed = {} if any(candidates(row.value, among) for row in rows) else guessed_columns(rows, among) or {}
    rows = _named(rows, guessed)
    chosen, reason = _choose(rows, among, columns, forced=format)
    guessed |= optional_columns(rows, chosen, {*guessed, *guessed.values()})
    # Columns that were renamed once go by their own names again.
    found = spelled | {field: spelled.get(column, columns.get(column, column)) for field, column in guessed.items()}
    fields = (*chosen.required, *chosen.optional)
    guessed = {field: found[field] for field in fields if field in found and field not in columns}
    columns |= guessed
    _require_read(columns, chosen, sample[0])
    rows = _named(sample, columns)
    if told := {field: column for field, column in guessed.items() if column != field}:
        pairs = ", ".join(f"{column!r} as {field}" for field, column in told.items())
        reason = f"the columns are read by their names: {pairs}"
    return Reading(
        source=source,
        format=chosen,
        reason=reason,
        columns={field: column for field, column in columns.items() if field != column},
        ignored=ignored,
        forced=format is not None,
        texts=_texts(rows, chosen),
        instead=_instead(chosen, rows[0].value, columns),
        weight=weight,
    )


def _named(sample: Sequence[SourceRow], columns: Mapping[str, str]) -> list[SourceRow]:
    """Return the rows with their columns named as fields, as far as they have them."""
    named = (with_columns(row, columns, ()) if columns else row for row in sample)
    return [row for row in named if isinstance(row, SourceRow)]


def _without(row: SourceRow, ignored: frozenset[str]) -> SourceRow:
    if ignored.isdisjoint(row.value):
        return row
    return replace(row, value={key: item for key, item in row.value.items() if key not in ignored})


def _require_read(columns: Mapping[str, str], format: Format, row: SourceRow) -> None:
    """Refuse a mapping that would not be used.

    Raises:
        ConfigError: Names the fields of the recognised format.
    """
    unknown = [field for field in columns if field not in format.fields]
    if unknown:
        fields = ", ".join((*format.required, *format.optional))
        problems = [f"data.columns.{field}: {format.title} rows have no field '{field}'" for field in unknown]
        raise ConfigError(row.file, [*problems, f"the fields of {format.title} are {fields}"])


def _instead(format: Format, row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the settings under which the answers of judged rows can be learned, "" where there are none."""
    if format.trainable or columns:
        return ""
    if format.required == ("chosen", "rejected") and row.get("prompt") is None:
        if row.get("conversations") is None and row.get("messages") is None:
            return "--set data.format=chat --set data.columns.messages=chosen" if is_list(row["chosen"]) else ""
        field = "messages" if row.get("conversations") is None else "conversations"
        return f"{format.instead} --set data.columns.prompt={field}"
    return format.instead


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
    half = [each for each in among if any(row.value.get(field) is not None for row in rows for field in each.required)]
    if forced is None and (len(half) != 1 or _has_other_texts(rows, half[0])):
        raise not_recognised(rows)
    chosen = (half or list(among))[0]
    return chosen, f"the rows have {listed(first.value)}"


def _has_other_texts(rows: Sequence[SourceRow], format: Format) -> bool:
    return any(isinstance(row.value[name], str) for row in rows for name in row.value.keys() - format.fields)


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
        raise DataError(f"{', '.join(reading.source.labels[:3])}: {not_trainable(reading)}")


def not_trainable(reading: Reading) -> str:
    """Return why ``train`` cannot use data that holds judgements, and what can be done with it."""
    instead = f" To learn its answers without the judgement: {reading.instead}." if reading.instead else ""
    return (
        f"this is {reading.format.title} data ({reading.reason}): it holds judgements of answers, and supervised "
        f"fine-tuning cannot use it.{instead}"
    )


def ignored_names(readings: Sequence[Reading]) -> frozenset[str]:
    """Return the names that nobody wants to hear of: ``data.ignore_columns`` of all parts."""
    return frozenset().union(*(reading.ignored for reading in readings))


def capitalised(text: str) -> str:
    """``text`` with its first letter as at the beginning of a sentence."""
    return text[:1].upper() + text[1:]
