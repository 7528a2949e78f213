"""The account of failures: incidents and recoveries as events, a report in ``failures/`` for each that ends a run."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.runs import RunDirectory
from llmtune.training.recovery.failure import KINDS, Attempt, Failure
from llmtune.training.recovery.policy import Remedy
from llmtune.units import format_bytes

# Of every event; evidence of these names would replace them.
_FIELDS = frozenset({"time", "event", "step", "kind", "cause", "action", "reason"})


def note_incident(run: RunDirectory, failure: Failure) -> None:
    """Write an ``incident`` event, unless the last one tells of the same failure."""
    told = [event for event in run.events() if event["event"] in ("incident", "recovery")]
    if told and told[-1]["event"] == "incident":
        last = told[-1]
        if (last.get("kind"), last.get("cause"), last["step"]) == failure.key:
            return
    facts = {name: value for name, value in failure.evidence.items() if name not in _FIELDS}
    run.event("incident", failure.step, kind=failure.kind, cause=failure.cause, **facts)


def note_recovery(run: RunDirectory, failure: Failure, remedy: Remedy) -> None:
    """Write a ``recovery`` event; it belongs to the incident before it."""
    facts = {name: value for name, value in remedy.changes.items() if name not in _FIELDS}
    run.event("recovery", failure.step, action=remedy.action, reason=remedy.reason, **facts)


def attempts_of(events: Iterable[Mapping[str, Any]]) -> list[Attempt]:
    """What was tried in a run, in order: each recovery with the incident before it."""
    attempts: list[Attempt] = []
    incident: Mapping[str, Any] | None = None
    for event in events:
        if event["event"] == "incident" and event.get("kind") in KINDS:
            incident = event
        elif event["event"] == "recovery" and incident is not None:
            evidence = {name: value for name, value in incident.items() if name not in _FIELDS}
            failure = Failure(
                kind=incident["kind"],
                cause=str(incident.get("cause", "")),
                step=incident["step"],
                evidence=evidence,
                remedy="",
            )
            attempts.append(Attempt(failure=failure, action=str(event.get("action", ""))))
            incident = None
    return attempts


def write_failure(
    run: RunDirectory,
    error: BaseException,
    failure: Failure,
    *,
    action: str = "stop",
    tried: Sequence[Attempt] = (),
    checkpoint: Path | None = None,
) -> Path:
    """Write the report of a failure into ``failures/``: JSON for programs, and text with the traceback for people.

    Args:
        run: The run that failed.
        error: What was raised.
        failure: What that means.
        action: ``restart`` where a new process may go on by itself, else ``stop``.
        tried: What was done before about failures of this run.
        checkpoint: The last good one.

    Returns:
        The JSON; the text lies beside it.

    Raises:
        OutputError: The run directory cannot be written any more.
    """
    path = run.write_failure(
        error,
        kind=failure.kind,
        cause=failure.cause,
        evidence=dict(failure.evidence),
        remedy=failure.remedy,
        action=action,
        trace=failure_text(run, error, failure, tried=tried, checkpoint=checkpoint),
    )
    name = f"failures/{path.name}"
    more = {
        "step": failure.step,
        "tried": list(_told(tried)),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "resume": resume_command(run),
    }
    return run.write_json(name, run.read_json(name) | more)


def failure_text(
    run: RunDirectory,
    error: BaseException,
    failure: Failure,
    *,
    tried: Sequence[Attempt] = (),
    checkpoint: Path | None = None,
) -> str:
    """The report for people, traceback at the end."""
    rows = [
        ("what happened", f"{failure.cause} ({failure.kind.replace('_', ' ')}, after {failure.step} updates)"),
        *(("evidence", fact) for fact in _facts(failure.evidence)),
        *(("tried before", one) for one in _told(tried) or ["nothing"]),
        ("what to do", failure.remedy),
        ("last good checkpoint", str(checkpoint) if checkpoint is not None else "none"),
        ("continue with", resume_command(run)),
    ]
    width = max(len(name) for name, _ in rows)
    lines, above = [], ""
    for name, text in rows:
        lines.append(f"{'' if name == above else name:<{width}}  {text}")
        above = name
    return "\n".join([*lines, "", *traceback.format_exception(error)])


def resume_command(run: RunDirectory) -> str:
    """The command that continues a run."""
    return f"llmtune resume {run.path}"


def _told(attempts: Sequence[Attempt]) -> list[str]:
    return [f"step {one.failure.step}: {one.failure.cause}, {one.action.replace('_', ' ')}" for one in attempts]


def _facts(evidence: Mapping[str, Any]) -> Iterator[str]:
    for name, value in evidence.items():
        shown = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        yield f"{name.removesuffix('_bytes').replace('_', ' ')}: {shown}"
