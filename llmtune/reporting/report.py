"""Writes ``report.html``: one file that needs no network, made from the run directory alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.reporting.charts import figures, to_html
from llmtune.reporting.facts import Prediction, RunSummary
from llmtune.reporting.summary import summarise
from llmtune.runs import RunDirectory
from llmtune.units import format_bytes, format_count, format_seconds

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
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("llmtune.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = [
        (title, Markup(to_html(figure, f"chart-{index}")))
        for index, (title, figure) in enumerate(figures(summary).items())
    ]
    # plotly.js is the one script; it is a part of the installed package, not of the data.
    script = Markup(get_plotlyjs()) if charts else None
    page: str = environment.get_template("report.html.j2").render(
        s=summary, charts=charts, script=script, **_tables(summary)
    )
    return page


def _tables(summary: RunSummary) -> dict[str, Any]:
    """Every table of the page as rows of text, so that the template only lays out."""
    columns = list(dict.fromkeys(name for row in summary.evaluations for name in row.values))
    return {
        "facts": _facts(summary),
        "predictions": [_prediction(item) for item in summary.predictions],
        "memory_terms": [
            (name.replace("_", " "), format_bytes(size))
            for name, size in sorted(summary.memory_terms.items(), key=lambda item: -item[1])
        ],
        "metrics": [
            (
                metric.name.replace("_", " "),
                _number(metric.base),
                _number(metric.tuned),
                _difference(metric.base, metric.tuned),
            )
            for metric in summary.metrics
        ],
        "evaluation_columns": [name.replace("_", " ") for name in columns],
        "evaluation_rows": [
            (
                row.step,
                row.step == (summary.best or {}).get("step"),
                [shown(name, row.values.get(name)) for name in columns],
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
        "num_samples_left_out": max(0, len(summary.samples) - MOST_SAMPLES),
        "data_rows": [(_title(name), shown(name, value)) for name, value in summary.data],
        "data_problems": summary.data_problems[:MOST_PROBLEMS],
        "num_problems_left_out": max(0, len(summary.data_problems) - MOST_PROBLEMS),
        "environment_rows": [(_title(name), shown(name, value)) for name, value in summary.environment],
    }


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    """The few things to know at a glance."""
    steps = f"{summary.steps}" + (f" of {summary.steps_planned}" if summary.steps_planned else "")
    best = summary.best
    found = [
        ("model", summary.model),
        ("data", summary.data_name),
        ("preset", summary.preset),
        ("steps", steps),
        ("best", f"{best.get('metric')} {shown('', best.get('value'))} at step {best.get('step')}" if best else None),
        ("tokens", _tokens(summary)),
        ("speed", f"{format_count(summary.tokens_per_second)} tokens/s" if summary.tokens_per_second else None),
        ("started", _moment(summary.started)),
        ("ended", _moment(summary.finished)),
    ]
    return [(name, text) for name, text in found if text]


def _tokens(summary: RunSummary) -> str | None:
    if summary.tokens is None:
        return None
    supervised = summary.supervised_tokens
    return format_count(summary.tokens) + (f", {format_count(supervised)} supervised" if supervised is not None else "")


def _prediction(item: Prediction) -> tuple[str, str, str, str]:
    form = format_bytes if item.unit == "bytes" else _duration
    told = [form(value) if value is not None else "not measured" for value in (item.predicted, item.measured)]
    error = "" if item.error is None else f"{item.error * 100:+.0f} %"
    return item.name, told[0] if item.predicted is not None else "not predicted", told[1], error


def _duration(seconds: float) -> str:
    """A duration precise enough to compare two short ones."""
    return f"{seconds:.3g} s" if seconds < 10 else format_seconds(seconds)


def _difference(base: float | None, tuned: float | None) -> str:
    return "" if base is None or tuned is None else f"{tuned - base:+.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


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
