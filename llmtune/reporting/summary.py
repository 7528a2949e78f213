"""Reads a run directory, whatever parts of it there are, into a :class:`RunSummary`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llmtune.errors import RunNotFoundError
from llmtune.reporting.data_account import data_account
from llmtune.reporting.facts import (
    Curve,
    DataProblem,
    EvaluationRow,
    FailureNote,
    Happening,
    Metric,
    PlanChange,
    PlanRow,
    RunSummary,
    Sample,
)
from llmtune.reporting.predictions import predictions, predictions_note
from llmtune.reporting.reading import count, finite, items, mapping, numbers, text
from llmtune.reporting.verdict import evidence_of, judge, overfitting_note, state_sentence
from llmtune.runs import RunDirectory, number

HAPPENINGS = ("incident", "recovery", "checkpoint_rejected", "early_stop", "preempted", "run_failed")
CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")


def summarise(run_dir: Path | str) -> RunSummary:
    """Tell one run from the files in its directory; parts that are missing or damaged are left out.

    Raises:
        RunNotFoundError: There is no run.
    """
    run = RunDirectory.open(run_dir)
    document = run.run
    events = list(run.events())
    steps, judged = run.steps(), run.evaluations()
    evaluations = _evaluations(judged)
    plans = [mapping(_optional(run, path.name)) for path in run.plans]
    plan = plans[-1] if plans else {}
    happenings = tuple(_happening(event) for event in events if event["event"] in HAPPENINGS)
    failures = tuple(_failures(run))
    metrics = _metrics(mapping(document.get("metrics")), evaluations, _counted(judged))
    done = max((step["step"] for step in steps), default=0)
    planned = _planned_steps(plan)
    status = str(document.get("status", "planned"))
    foretold = predictions(plans, steps, events, is_over=status == "finished")
    data_report = mapping(_optional(run, "data_report.json"))
    return RunSummary(
        name=run.name,
        dir=str(run.path),
        status=status,
        model=text(document.get("model")),
        data_name=text(document.get("data")),
        preset=text(document.get("preset")),
        command=_command(document.get("command")),
        started=text(document.get("started")),
        finished=text(document.get("finished")),
        steps=done,
        steps_planned=planned,
        best=mapping(document.get("best")) or None,
        state=state_sentence(status=status, is_live=run.is_live, step=done, of=planned, failures=failures),
        verdict=judge(evidence_of(document, judged, events), is_over=status == "finished"),
        note=overfitting_note(evaluations),
        metrics=metrics,
        predictions=foretold,
        predictions_note=predictions_note(plans, foretold),
        tokens=_total(steps, "num_tokens"),
        supervised_tokens=_total(steps, "num_supervised_tokens"),
        tokens_per_second=_median(steps, "tokens_per_second"),
        non_finite_steps=sum(_is_non_finite(step) for step in steps),
        happenings=happenings,
        failures=failures,
        plan=tuple(_plan_rows(plan)),
        plan_notices=tuple(str(notice) for notice in items(plan.get("notices"))),
        plan_changes=tuple(_plan_changes(plans, [path.name for path in run.plans])),
        memory_terms=numbers(mapping(mapping(plan.get("memory")).get("terms"))),
        evaluations=evaluations,
        samples=tuple(_samples(events)),
        data_account=data_account(data_report),
        data=tuple(_flat({key: value for key, value in data_report.items() if key != "problems"})),
        data_problems=tuple(_problem(entry) for entry in items(data_report.get("problems"))),
        environment=tuple(_flat(mapping(_optional(run, "environment.json")))),
        next_commands=tuple(_next_commands(run, status)),
        curves=_curves(steps, evaluations),
    )


# ---------------------------------------------------------------------- what was measured


def _evaluations(events: Iterable[Mapping[str, Any]]) -> tuple[EvaluationRow, ...]:
    rows = (EvaluationRow(step=event["step"], values=numbers(event, without=("step", "num_rows"))) for event in events)
    return tuple(row for row in rows if row.values)


def _counted(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Metrics that are shares of rows, and of how many."""
    found = (mapping(event.get("rows_right")) for event in evaluations)
    rows = {name: count(mapping(right).get("rows")) for each in found for name, right in each.items()}
    return {name: of for name, of in rows.items() if of}


def _metrics(
    recorded: Mapping[str, Any], evaluations: tuple[EvaluationRow, ...], counted: Mapping[str, int]
) -> tuple[Metric, ...]:
    """Quality measures, base beside tuned: from ``run.json``, else from the first and last evaluation."""
    known = numbers(recorded)
    if not known and evaluations:
        first, last = evaluations[0], evaluations[-1]
        known = _measures(last) if last.step > 0 else {}
        known |= {f"base_{name}": value for name, value in _measures(first).items() if first.step == 0}
    names = dict.fromkeys(name.removeprefix("base_") for name in known)
    return tuple(
        Metric(name=name, base=known.get(f"base_{name}"), tuned=known.get(name), rows=counted.get(plain_name(name)))
        for name in names
    )


def plain_name(name: str) -> str:
    """Return the name of a metric without the prefix that evaluations put before it."""
    return name.removeprefix("eval_")


def _measures(row: EvaluationRow) -> dict[str, float]:
    return {name: value for name, value in row.values.items() if not name.endswith("seconds") and name[:4] != "num_"}


def _curves(steps: list[dict[str, Any]], evaluations: tuple[EvaluationRow, ...]) -> dict[str, Curve]:
    curves = {}
    for name in CURVES:
        points = [(step["step"], value) for step in steps if (value := number(step.get(name))) is not None]
        curves[name] = points
    curves["eval_loss"] = [(row.step, row.values["eval_loss"]) for row in evaluations if "eval_loss" in row.values]
    return {
        name: Curve(steps=tuple(x for x, _ in points), values=tuple(y for _, y in points))
        for name, points in curves.items()
        if points
    }


def _is_non_finite(step: Mapping[str, Any]) -> bool:
    values = (number(step.get(name)) for name in ("loss", "grad_norm"))
    return any(value is not None and not math.isfinite(value) for value in values)


def _total(steps: list[dict[str, Any]], name: str) -> int | None:
    values = finite(steps, name)
    return int(sum(values)) if values else None


def _median(steps: list[dict[str, Any]], name: str) -> float | None:
    values = finite(steps, name)
    return median(values) if values else None


# ---------------------------------------------------------------------- what happened


def _happening(event: Mapping[str, Any]) -> Happening:
    told = {key: value for key, value in event.items() if key not in ("time", "event", "step") and value is not None}
    text = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in _flat(told))
    return Happening(time=str(event.get("time", "")), step=event["step"], event=str(event["event"]), text=text)


def _failures(run: RunDirectory) -> Iterator[FailureNote]:
    for path in sorted((run.path / "failures").glob("*.json")):
        document = mapping(_optional(run, f"failures/{path.name}"))
        yield FailureNote(
            file=f"failures/{path.name}",
            kind=str(document.get("kind", "unknown")),
            cause=str(document.get("cause", "the report cannot be read")),
            remedy=str(document.get("remedy", "")),
            tried=tuple(str(one) for one in items(document.get("tried"))),
        )


def _samples(events: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """The last sample of each prompt, in the order in which prompts first came."""
    last = {}
    for event in events:
        if event["event"] == "sample" and "prompt" in event:
            last[str(event["prompt"])] = event
    for prompt, event in last.items():
        yield Sample(
            prompt=prompt,
            base=text(event.get("base")),
            tuned=text(event.get("tuned")),
            reference=text(event.get("reference")),
            base_flaw=text(event.get("base_flaw")),
            tuned_flaw=text(event.get("tuned_flaw")),
        )


def _problem(entry: Any) -> DataProblem:
    row = mapping(entry)
    kept = {key: str(row.get(key) or "") for key in ("file", "line", "field", "problem", "hint")}
    return DataProblem(**kept)


# ---------------------------------------------------------------------- what was planned


def _planned_steps(plan: Mapping[str, Any]) -> int | None:
    value = number(mapping(mapping(plan.get("choices")).get("updates")).get("value"))
    return int(value) if value is not None and math.isfinite(value) else None


def _plan_rows(plan: Mapping[str, Any]) -> Iterator[PlanRow]:
    for name, entry in mapping(plan.get("choices")).items():
        choice = mapping(entry)
        reason, source = str(choice.get("reason", "")), str(choice.get("source", ""))
        yield PlanRow(choice=name.replace("_", " "), value=choice.get("value"), reason=reason, source=source)


def _plan_changes(plans: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[PlanChange]:
    for earlier, later, name in zip(plans, plans[1:], names[1:], strict=False):
        before = {row.choice: row.value for row in _plan_rows(earlier)}
        for row in _plan_rows(later):
            if row.choice not in before or before[row.choice] != row.value:
                was = before.get(row.choice)
                yield PlanChange(plan=name, choice=row.choice, before=was, after=row.value, reason=row.reason)


def _next_commands(run: RunDirectory, status: str) -> Iterator[tuple[str, str]]:
    place = shlex.quote(str(run.path))
    if status != "finished":
        yield "continue this run", f"llmtune resume {place}"
    if run.final is not None:
        yield "try it", f"llmtune chat {place}"
        yield "measure it again", f"llmtune eval {place}"
    yield "make this page again", f"llmtune report {place}"


# ---------------------------------------------------------------------- reading what may be missing


def _optional(run: RunDirectory, name: str) -> Any:
    try:
        return run.read_json(name)
    except RunNotFoundError:  # a run that stopped early lacks parts; the report tells what there is
        return None


def _command(value: Any) -> str | None:
    return shlex.join(str(part) for part in value) if isinstance(value, list) else text(value)


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Rows of a nested document: ``supervision.rows_truncated``; lists of plain values stay lists."""
    for key, item in value.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(item, dict):
            yield from _flat(item, name)
        elif isinstance(item, list) and any(isinstance(part, dict | list) for part in item):
            for index, part in enumerate(item):
                yield from _flat(part if isinstance(part, dict) else {"": part}, f"{name}.{index}")
        else:
            yield name, item
