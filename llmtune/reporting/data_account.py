"""What a report tells about the data, read from ``data_report.json``; keys that a run lacks are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmtune.reporting.reading import count, items, mapping, numbers, text
from llmtune.runs import number

# From the lowest to the highest, as the columns of a table.
QUANTILES = ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max")
_QUANTILE_OF = re.compile(rf"(.+)_({'|'.join(QUANTILES)})")
_FLAGS = {
    "stop_token_supervised": (
        "The stop token is not learned in every row: the model may not know where to end.",
        "Look at such a row with llmtune preview, and at its chat template.",
    ),
    "bos_once": (
        "Rows do not begin with exactly one beginning-of-text token.",
        "Take the token out of the data or out of the chat template.",
    ),
    "ids_in_vocabulary": (
        "There are token ids that the model has no embedding for.",
        "Use the tokenizer that belongs to the model.",
    ),
}
_COUNTS = {
    "rows_without_supervision": "hold nothing that is learned",
    "rows_without_stop": "end without a stop token that is learned",
    "rows_too_long": "are longer than what is trained on",
    "rows_truncated": "were cut to the longest length that is trained on",
    "rows_dropped": "were left out because they are too long",
}
# What the advice about long rows says in one sentence, where there is any.
_TOLD_TOGETHER = ("rows_too_long", "rows_truncated", "rows_dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something to know about the data, and what to do about it."""

    severity: Literal["warning", "info"]
    finding: str
    suggestion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How one quantity is distributed over the rows; ``values`` by name of `QUANTILES`."""

    name: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComplexityPart:
    """One part of the complexity score; ``score`` and ``weight`` are 0 to 1."""

    name: str
    value: float
    score: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """A row and the earlier one that it repeats, as ``file:line``."""

    where: str
    of: str
    near: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DataAccount:
    """The data of one run.

    Attributes:
        notices: Warnings first.
        spreads: Lengths and shares, one for each quantity.
        text, supervision: Rows of name and value, in the order of the report.
        complexity, complexity_definition: The score, 0 to 1, and what it is.
        duplicates, leakage: Counts by name.
    """

    format: str | None
    reason: str | None
    rows: int | None
    bytes: float | None
    tokens: int | None
    supervised_tokens: int | None
    size_class: str | None
    notices: tuple[Notice, ...]
    spreads: tuple[Spread, ...]
    text: tuple[tuple[str, Any], ...]
    supervision: tuple[tuple[str, Any], ...]
    complexity: float | None
    complexity_parts: tuple[ComplexityPart, ...]
    complexity_definition: str | None
    duplicates: Mapping[str, float]
    leakage: Mapping[str, float]
    repeats: tuple[Repeat, ...]


def data_account(report: Mapping[str, Any]) -> DataAccount:
    """Tell the data from the report that was written before training."""
    statistics, supervision = mapping(report.get("statistics")), mapping(report.get("supervision"))
    complexity = mapping(statistics.get("complexity"))
    duplicates, leakage = mapping(report.get("duplicates")), mapping(report.get("leakage"))
    return DataAccount(
        format=text(report.get("format")),
        reason=text(report.get("reason")),
        rows=count(report.get("rows")),
        bytes=number(report.get("bytes")),
        tokens=count(report.get("tokens")),
        supervised_tokens=count(report.get("supervised_tokens")),
        size_class=text(statistics.get("size_class")),
        notices=tuple(sorted(_notices(report), key=lambda notice: notice.severity != "warning")),
        spreads=(*_spreads(statistics), *_spreads(supervision)),
        text=tuple(_rest(statistics, without=("complexity", "size_class"))),
        supervision=tuple(_rest(supervision)),
        complexity=number(complexity.get("score")),
        complexity_parts=tuple(_complexity_parts(mapping(complexity.get("parts")))),
        complexity_definition=text(complexity.get("definition")),
        duplicates=numbers(duplicates),
        leakage=numbers(leakage),
        repeats=tuple(_repeats(duplicates)),
    )


def _notices(report: Mapping[str, Any]) -> Iterator[Notice]:
    """Of what was counted, then of what was advised."""
    rows, bad = count(report.get("rows")), count(report.get("bad_rows"))
    if bad:
        of = f" of {rows:,}" if rows else ""
        finding = f"{bad:,}{of} rows have a problem and were left out."
        yield Notice(severity="warning", finding=finding, suggestion="The problems are listed below.")
    advice = [mapping(entry) for entry in items(report.get("advice"))]
    advised = [entry.get("kind") for entry in advice]
    supervision = mapping(report.get("supervision"))
    for name, value in supervision.items():
        if value is False and name in _FLAGS:
            finding, suggestion = _FLAGS[name]
            yield Notice(severity="warning", finding=finding, suggestion=suggestion)
        elif name in _COUNTS and (found := count(value)) and not (name in _TOLD_TOGETHER and "too_long" in advised):
            yield Notice(severity="warning", finding=f"{found:,} rows {_COUNTS[name]}.", suggestion="")
    leakage = numbers(mapping(report.get("leakage")))
    leaked = leakage.get("exact_rows", 0) + leakage.get("near_rows", 0)
    if leaked and "leakage" not in advised:
        finding = f"{leaked:,.0f} evaluation rows are also trained on: the evaluation will flatter."
        yield Notice(severity="warning", finding=finding, suggestion="")
    if unused := [str(name) for name in items(report.get("unused_columns"))]:
        suggestion = (
            "Read such a column with --set data.columns.FIELD=COLUMN, or hear no more of it with "
            "--set data.ignore_columns=COLUMN."
        )
        yield Notice(severity="info", finding=f"Not used: {', '.join(unused)}.", suggestion=suggestion)
    for entry in advice:
        severity: Literal["warning", "info"] = "info" if entry.get("severity") == "info" else "warning"
        finding, suggestion = str(entry.get("finding", "")), str(entry.get("suggestion", ""))
        yield Notice(severity=severity, finding=_sentence(finding), suggestion=suggestion)


def _spreads(document: Mapping[str, Any]) -> Iterator[Spread]:
    """Objects of quantiles, and quantiles that are told beside each other: ``length_p50``, ``length_max``."""
    beside: dict[str, dict[str, float]] = {}
    for name, value in document.items():
        if (quantiles := _quantiles(value)) is not None:
            yield Spread(name=name, values=quantiles)
        elif (match := _QUANTILE_OF.fullmatch(name)) and (found := number(value)) is not None:
            beside.setdefault(match[1], {})[match[2]] = found
    for name, values in beside.items():
        yield Spread(name=name, values=values)


def _quantiles(value: Any) -> dict[str, float] | None:
    found = {key: item for key, item in numbers(mapping(value)).items() if key in QUANTILES}
    return found if len(found) > 1 else None


def _rest(document: Mapping[str, Any], without: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What is no spread and has no place of its own."""
    for name, value in document.items():
        is_spread = _quantiles(value) is not None or _QUANTILE_OF.fullmatch(name)
        if name not in without and not is_spread and value not in ({}, []):
            yield name, value


def _complexity_parts(parts: Mapping[str, Any]) -> Iterator[ComplexityPart]:
    for name, entry in parts.items():
        part = numbers(mapping(entry))
        if {"value", "score", "weight"} <= part.keys():
            yield ComplexityPart(name=name, value=part["value"], score=part["score"], weight=part["weight"])


def _repeats(duplicates: Mapping[str, Any]) -> Iterator[Repeat]:
    for entry in map(mapping, items(duplicates.get("examples"))):
        if {"file", "line", "of_file", "of_line"} <= entry.keys():
            where, of = f"{entry['file']}:{entry['line']}", f"{entry['of_file']}:{entry['of_line']}"
            yield Repeat(where=where, of=of, near=entry.get("near") is True)


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) or not text else f"{text}."
