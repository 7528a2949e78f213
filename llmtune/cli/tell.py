"""What the training commands print when they are done."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from llmtune.console import speaker
from llmtune.units import format_bytes, format_rows_right, format_seconds

if TYPE_CHECKING:
    from llmtune.finetuner import RunResult
    from llmtune.planning import Plan
    from llmtune.reporting import RunSummary
    from llmtune.study import StudyResult

_BAR_WIDTH = 30
# Hits and misses of the demo that a terminal shows, of each; --json has all.
DEMO_SAMPLES = 2


def tell_plan(plan: Plan, as_json: bool) -> None:
    """The plan, as a table or as JSON.

    Raises:
        PlanError: It does not fit; it is shown all the same.
    """
    if as_json:
        speaker.emit(plan.to_json())
    else:
        show_plan(plan.rows())
        _show_terms("Memory", {name: (size, format_bytes(size)) for name, size in plan.memory.terms.items()})
        _show_terms("Time", {name: (spent, format_seconds(spent)) for name, spent in plan.time.terms.items()})
        speaker.show(plan.summary())
        for notice in plan.notices:
            speaker.warn(notice)
    plan.require_fit()


def show_plan(rows: Iterable[tuple[str, object, str, str]]) -> None:
    """Name, value, source and reason of every choice; a long value is broken, to leave room for the reasons."""
    broken = [(name, textwrap.fill(_shown(value), 24), source, reason) for name, value, source, reason in rows]
    speaker.table("Plan", ("name", "value", "source", "reason"), broken)


def _show_terms(title: str, terms: Mapping[str, tuple[float, str]]) -> None:
    """What adds up to a total, the largest first, each with a bar as long as its share."""
    total = sum(value for value, _ in terms.values())
    rows = [
        (name, shown, f"{value / total:.0%}", "█" * round(_BAR_WIDTH * value / total))
        for name, (value, shown) in sorted(terms.items(), key=lambda term: -term[1][0])
        if value > 0
    ]
    speaker.table(title, ("term", "predicted", "share", ""), rows)


def tell_result(result: RunResult, as_json: bool) -> None:
    """What came out of a run and what can be done with it."""
    from llmtune.reporting import summarise

    if as_json:
        speaker.emit(result.to_json())
        return
    summary = summarise(result.run_dir)
    show_metrics(summary)
    speaker.show(summary.verdict.text)
    if summary.best:
        speaker.show(f"Best step: {summary.best['step']} of {summary.steps}.")
    _show_places(result)
    show_next(summary.next_commands)


def show_metrics(summary: RunSummary) -> None:
    """Every quality measure, base beside tuned."""
    rows = [(m.name.replace("_", " "), _measure(m.base, m.rows), _measure(m.tuned, m.rows)) for m in summary.metrics]
    if rows:
        speaker.table("", ("measure", "base", "tuned"), rows)


def show_next(commands: Iterable[tuple[str, str]]) -> None:
    """The commands that make sense now, each on a line of its own so that it can be copied whole."""
    for purpose, command in commands:
        speaker.show(f"To {purpose}:\n  {command}")


def introduce_demo(*, held_out: int, judged: int) -> None:
    """Say what the demo is about to do.

    Args:
        held_out: Requests that the loss is measured on.
        judged: The first of them, to which answers are judged.
    """
    speaker.say(
        "A small language model that ships with llmtune learns to turn requests, written as people write them, into "
        f"JSON.\nThe loss is measured on {held_out} requests it has not seen, about names that do not occur in its "
        f"training data; the answers to the first {min(judged, held_out)} of them are judged."
    )


def tell_demo(result: RunResult, as_json: bool) -> None:
    """Show answers before and after side by side, misses beside hits, the scores, the files, and what to try next."""
    from llmtune.reporting import summarise

    summary = summarise(result.run_dir)
    if as_json:
        samples = [
            {"prompt": s.prompt, "reference": s.reference, "base": s.base, "tuned": s.tuned, "right": s.is_right}
            for s in summary.samples
        ]
        speaker.emit(result.to_json() | {"samples": samples})
        return
    hits = [sample for sample in summary.samples if sample.is_right]
    misses = [sample for sample in summary.samples if not sample.is_right]
    for kind, found in (("hit", hits), ("miss", misses)):
        for number, sample in enumerate(found[:DEMO_SAMPLES], start=1):
            answers = [("prompt", sample.prompt), ("base", sample.base), ("tuned", sample.tuned)]
            title = f"{kind} {number} of {len(found)}, held-out request"
            speaker.table("", ("", title), [*answers, ("right", sample.reference)])
    show_metrics(summary)
    for metric in summary.metrics:
        if metric.name == "exact_match" and metric.rows and metric.base is not None and metric.tuned is not None:
            before, after = (format_rows_right(value, metric.rows) for value in (metric.base, metric.tuned))
            speaker.show(f"Held-out requests answered exactly right: {before} before, {after} after.")
    speaker.show(summary.verdict.text)
    _show_places(result)
    place = shlex.quote(str(result.run_dir))
    request = shlex.quote("Please send the parcel of Veska to Ormin in Taldor.")
    show_next(
        [
            ("ask it", f"llmtune chat {place} --once {request}"),
            ("see what was planned, and why", f"llmtune show {place}"),
            ("train on your own data", "llmtune train YOUR.jsonl"),
        ]
    )


def tell_study(result: StudyResult, as_json: bool) -> None:
    """The trials, best first, and the file that repeats the best."""
    if as_json:
        speaker.emit(result.to_json())
        return
    speaker.table("Trials", ("trial", "state", result.metric.replace("_", " "), "parameters"), result.rows())
    speaker.show(result.text)
    show_next([("train the best configuration", f"llmtune train --config {shlex.quote(str(result.config_path))}")])


def _show_places(result: RunResult) -> None:
    places = [("result", result.adapter_dir), ("run", result.run_dir)]
    report = result.run_dir / "report.html"
    if report.exists():
        places.append(("report", report))
    for name, place in places:
        speaker.show(f"{name + ':':8}{place}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _measure(value: float | None, rows: int | None) -> str:
    """A measure; a share of rows as a count."""
    return format_rows_right(value, rows) if rows and value is not None else _number(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if math.isfinite(value) else str(value)
