"""Writes ``report.html``: one file that needs no network, made from the run directory alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.reporting.charts import figures, to_html
from llmtune.reporting.data_account import QUANTILES, DataAccount
from llmtune.reporting.facts import Prediction, RunSummary
from llmtune.reporting.pages import page
from llmtune.reporting.summary import summarise
from llmtune.reporting.verdict import FLAW_WORDS
from llmtune.runs import RunDirectory
from llmtune.units import format_bytes, format_count, format_rows_right, format_seconds

# Figures of the data that have a table of their own: all of a list, and the workings of a score.
_TOLD_ELSEWHERE = re.compile(
    r"advice\.|duplicates\.examples|leakage\.examples|statistics\.complexity\.(parts|definition)"
)
# What quantities are called that are counted for each row.
_PER_ROW = {
    "chars": "characters",
    "bytes": "bytes",
    "answer_chars": "characters in answers",
    "turns": "answers",
    "length": "tokens",
    "supervised_share": "share of tokens supervised",
}
# What the page shows of a long list; the whole list is in the named file.
MOST_PROBLEMS, MOST_SAMPLES, MOST_HAPPENINGS = 20, 20, 200


def write_report(run_dir: Path | str) -> Path:
    """Write the report of a run, whatever its state, and return where it lies.

    Raises:
        RunNotFoundError: There is no run.
        OutputError: The place is not writable.
    """
    summary = summarise(run_dir)
    return RunDirectory.open(run_dir).write_text("report.html", render(summary))


def render(summary: RunSummary) -> str:
    """The page of one run."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    charts = [
        (title, Markup(to_html(figure, f"chart-{index}")))
        for index, (title, figure) in enumerate(figures(summary).items())
    ]
    # plotly.js is the one script; it is a part of the installed package, not of the data.
    script = Markup(get_plotlyjs()) if charts else None
    return page("report.html.j2", s=summary, charts=charts, script=script, **_tables(summary))


def _tables(summary: RunSummary) -> dict[str, Any]:
    """Every table of the page as rows of text, so that the template only lays out."""
    columns = list(dict.fromkeys(name for row in summary.evaluations for name in row.values))
    of_rows = {f"eval_{metric.name}": metric.rows for metric in summary.metrics if metric.rows}
    return {
        "facts": _facts(summary),
        "predictions": [_prediction(item) for item in summary.predictions],
        "has_probe": any(item.probed is not None for item in summary.predictions),
        "memory_terms": [
            (name.replace("_", " "), format_bytes(size))
            for name, size in sorted(summary.memory_terms.items(), key=lambda item: -item[1])
        ],
        "metrics": [
            (
                metric.name.replace("_", " "),
                _measure(metric.base, metric.rows),
                _measure(metric.tuned, metric.rows),
                _difference(metric.base, metric.tuned, metric.rows),
            )
            for metric in summary.metrics
        ],
        "evaluation_columns": [name.replace("_", " ") for name in columns],
        "evaluation_rows": [
            (
                row.step,
                row.step == (summary.best or {}).get("step"),
                [
                    _measure(row.values.get(name), rows)
                    if (rows := of_rows.get(name))
                    else shown(name, row.values.get(name))
                    for name in columns
                ],
            )
            for row in summary.evaluations
        ],
        "plan_rows": [(row.choice, shown(row.choice, row.value), row.reason, row.source) for row in summary.plan],
        "plan_changes": [
            (change.plan, change.choice, shown("", change.before), shown("", change.after), change.reason)
            for change in summary.plan_changes
        ],
        "happenings": [
            (item.step, _moment(item.time), item.event.replace("_", " "), item.text)
            for item in summary.happenings[-MOST_HAPPENINGS:]
        ],
        "num_happenings_left_out": max(0, len(summary.happenings) - MOST_HAPPENINGS),
        "samples": summary.samples[:MOST_SAMPLES],
        "flaws": {flaw: of_one for flaw, (of_one, _) in FLAW_WORDS.items()},
        "num_samples_left_out": max(0, len(summary.samples) - MOST_SAMPLES),
        "num_data_warnings": sum(notice.severity == "warning" for notice in summary.data_account.notices),
        "data": _data(summary.data_account),
        "data_rows": [
            (_title(name), shown(name, value)) for name, value in summary.data if not _TOLD_ELSEWHERE.match(name)
        ],
        "data_problems": summary.data_problems[:MOST_PROBLEMS],
        "num_problems_left_out": max(0, len(summary.data_problems) - MOST_PROBLEMS),
        "environment_rows": [(_title(name), shown(name, value)) for name, value in summary.environment],
    }


def _data(account: DataAccount) -> dict[str, Any]:
    """The tables of the section about the data."""
    columns = [name for name in QUANTILES if any(name in spread.values for spread in account.spreads)]
    return {
        "notices": account.notices,
        "facts": _data_facts(account),
        "columns": ["median" if name == "p50" else name for name in columns],
        "spreads": [
            (
                _PER_ROW.get(spread.name, _title(spread.name)),
                [_quantity(spread.name, spread.values.get(name)) for name in columns],
            )
            for spread in account.spreads
        ],
        "text": [(_title(name), _quantity(name, value)) for name, value in account.text],
        "supervision": [(_title(name), _quantity(name, value)) for name, value in account.supervision],
        "complexity": [
            (_title(part.name), f"{part.value:.3g}", part.score, f"{part.score:.2f}", _percent(part.weight))
            for part in account.complexity_parts
        ],
        "complexity_score": "" if account.complexity is None else f"{account.complexity:.2f}",
        "complexity_definition": account.complexity_definition,
        "repeats": [(item.where, item.of, "nearly" if item.near else "exactly") for item in account.repeats],
    }


def _data_facts(account: DataAccount) -> list[tuple[str, str]]:
    """The few things to know about the data at a glance."""
    tokens, supervised = account.tokens, account.supervised_tokens
    share = f", {_percent(supervised / tokens)} supervised" if tokens and supervised is not None else ""
    found = [
        ("format", f"{account.format} ({account.reason})" if account.format and account.reason else account.format),
        ("rows", None if account.rows is None else f"{account.rows:,}"),
        ("size", None if account.bytes is None else format_bytes(account.bytes)),
        ("tokens", None if tokens is None else format_count(tokens) + share),
        ("size class", account.size_class and _title(account.size_class)),
        ("complexity", None if account.complexity is None else f"{account.complexity:.2f} on a scale from 0 to 1"),
        ("duplicates", _duplicates(account.duplicates)),
        ("evaluation rows also in training", _leakage(account.leakage)),
    ]
    return [(name, text) for name, text in found if text]


def _duplicates(counts: Mapping[str, float]) -> str | None:
    told = []
    for kind, word in (("exact", "exact"), ("near", "near")):
        rows, groups = counts.get(f"{kind}_rows"), counts.get(f"{kind}_groups")
        if rows:
            told.append(f"{rows:,.0f} {word}" + (f" in {groups:,.0f} groups" if groups else ""))
    return ", ".join(told) or ("none" if counts else None)


def _leakage(counts: Mapping[str, float]) -> str | None:
    exact, near, rows = (counts.get(name) for name in ("exact_rows", "near_rows", "rows"))
    if exact is None and near is None:
        return None
    if not (exact or near):
        return "none"
    return f"{exact or 0:,.0f} exact, {near or 0:,.0f} near" + (f" of {rows:,.0f}" if rows else "")


def _quantity(name: str, value: Any) -> str:
    """A figure about the data: what is called a share, or is a fraction in an object, in per cent."""
    if isinstance(value, Mapping):
        pieces = (f"{_title(str(key))}: {_quantity('share', item)}" for key, item in value.items())
        return ", ".join(pieces)
    if isinstance(value, float) and name.endswith("share") and 0 <= value <= 1:
        return _percent(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and not name.endswith(("bytes", "seconds")):
        return f"{value:,}"
    return "" if value is None else shown(name, value)


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %" if 0 < share < 0.1 else f"{share * 100:.0f} %"


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    """The few things to know at a glance."""
    steps = f"{summary.steps}" + (f" of {summary.steps_planned}" if summary.steps_planned else "")
    best = summary.best
    found = [
        ("model", summary.model),
        ("data", summary.data_name),
        ("preset", summary.preset),
        ("steps", steps),
        ("best", f"{best.get('metric')} {_best_value(summary)} at step {best.get('step')}" if best else None),
        ("tokens", _tokens(summary)),
        ("speed", f"{format_count(summary.tokens_per_second)} tokens/s" if summary.tokens_per_second else None),
        ("started", _moment(summary.started)),
        ("ended", _moment(summary.finished)),
    ]
    return [(name, text) for name, text in found if text]


def _best_value(summary: RunSummary) -> str:
    best = summary.best or {}
    name, value = str(best.get("metric")).removeprefix("eval_"), best.get("value")
    rows = next((metric.rows for metric in summary.metrics if metric.name == name), None)
    return _measure(value, rows) if rows and isinstance(value, float) else shown("", value)


def _tokens(summary: RunSummary) -> str | None:
    if summary.tokens is None:
        return None
    supervised = summary.supervised_tokens
    return format_count(summary.tokens) + (f", {format_count(supervised)} supervised" if supervised is not None else "")


def _prediction(item: Prediction) -> tuple[str, str, str, str, str, str]:
    """Name, first prediction, prediction after the probe, measured, and measured over each prediction."""
    form = format_bytes if item.unit == "bytes" else _duration
    predicted, probed, measured = (
        absent if value is None else form(value)
        for value, absent in ((item.predicted, "not predicted"), (item.probed, ""), (item.measured, "not measured"))
    )
    return item.name, predicted, probed, measured, _times(item.ratio), _times(item.probed_ratio)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×"


def _duration(seconds: float) -> str:
    """A duration precise enough to compare two short ones."""
    return f"{seconds:.3g} s" if seconds < 10 else format_seconds(seconds)


def _difference(base: float | None, tuned: float | None, rows: int | None) -> str:
    if base is None or tuned is None:
        return ""
    difference = tuned - base
    return f"{round(difference * rows):+,}" if rows and math.isfinite(difference) else f"{difference:+.4g}"


def _measure(value: float | None, rows: int | None) -> str:
    """A measure; a share of rows as a count."""
    return "" if value is None else format_rows_right(value, rows) if rows else f"{value:.5g}"


def _moment(text: str | None) -> str | None:
    return text.replace("T", " ")[:19] + " UTC" if text else None


def _title(name: str) -> str:
    return name.replace("_", " ").replace(".", " · ")


def shown(name: str, value: Any) -> str:
    """A value for people: sizes and durations by the unit in their name, lists joined."""
    if value is None:
        return "none" if name else "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(shown("", item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(str(key), item)}" for key, item in value.items())
    if isinstance(value, int | float):
        if name.endswith("bytes"):
            return format_bytes(value)
        if name.endswith("seconds"):
            return format_seconds(value)
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return str(value)
