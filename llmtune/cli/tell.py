"""What the training commands print when they are done."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from llmtune.console import speaker
from llmtune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from llmtune.finetuner import RunResult
    from llmtune.planning import Plan
    from llmtune.reporting import RunSummary
    from llmtune.study import StudyResult

_BAR_WIDTH = 30


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
    rows = [(m.name.replace("_", " "), _number(m.base), _number(m.tuned)) for m in summary.metrics]
    if rows:
        speaker.table("", ("measure", "base", "tuned"), rows)


def show_next(commands: Iterable[tuple[str, str]]) -> None:
    """The commands that make sense now, each on a line of its own so that it can be copied whole."""
    for purpose, command in commands:
        speaker.show(f"To {purpose}:\n  {command}")


def introduce_demo() -> None:
    """What the demo is about to do."""
    speaker.say(
        "A small language model that ships with llmtune learns to turn requests, written as people write them, into "
        "JSON.\nIt is judged on 80 requests it has not seen, about names that do not occur in its training data."
    )


def tell_demo(result: RunResult, as_json: bool) -> None:
    """Answers before and after side by side, the scores, the files, and what to try next."""
    from llmtune.reporting import summarise

    summary = summarise(result.run_dir)
    if as_json:
        samples = [
            {"prompt": s.prompt, "reference": s.reference, "base": s.base, "tuned": s.tuned} for s in summary.samples
        ]
        speaker.emit(result.to_json() | {"samples": samples})
        return
    for sample in summary.samples:
        rows = [("prompt", sample.prompt), ("base", sample.base), ("tuned", sample.tuned), ("right", sample.reference)]
        speaker.table("", ("", "held-out request"), rows)
    show_metrics(summary)
    metrics = result.metrics
    if metrics.keys() >= {"base_exact_match", "exact_match"}:
        speaker.show(
            f"Held-out requests answered exactly right: {metrics['base_exact_match']:.0%} before, "
            f"{metrics['exact_match']:.0%} after."
        )
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


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if math.isfinite(value) else str(value)
