"""What the plans said a run would take, beside what it took."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from llmtune.reporting.facts import Prediction
from llmtune.reporting.reading import count, finite, mapping
from llmtune.runs import number

_WHOLE = "time of the whole run"
# What the predicted time rests on, in words; of plans that do not say, nothing is told.
_BASIS = {
    "nominal": "The time was first predicted from data sheets and common experience: nothing had been measured on this "
    "machine.",
    "calibrated": "The time was first predicted from the speed that was measured on this machine.",
    "measured": "The time was predicted from this run's own passes.",
}


def predictions(
    plans: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    *,
    is_over: bool,
) -> tuple[Prediction, ...]:
    """Memory and time: by the first plan, by the plan after the probe, and as measured.

    Args:
        plans: The plans of the run in order.
        steps: Its updates.
        events: All its events.
        is_over: Whether it ended as planned; until then totals are not measured.
    """
    found = _rows(plans, steps, events, is_over=is_over)
    return tuple(row for row in found if (row.predicted, row.probed, row.measured) != (None, None, None))


def predictions_note(plans: Sequence[Mapping[str, Any]], found: Sequence[Prediction]) -> str | None:
    """What the predictions rest on and what to bear in mind, in a few sentences."""
    if not plans:
        return None
    told = [_BASIS.get(str(mapping(plans[0].get("time")).get("basis")))]
    if _probed(plans):
        told.append("After the probe, at most two passes before the first update, memory and time were predicted anew.")
    whole = next((row for row in found if row.name == _WHOLE), None)
    if whole is not None and whole.measured:
        told.append("The whole run counts from loaded weights to the saved result.")
    if whole is not None and not whole.comparable:
        told.append("The run ended before its last planned update, so that totals cannot be compared.")
    if whole is not None and whole.low is not None and whole.high is not None and whole.measured and whole.comparable:
        told.append(
            "It took as long as the last plan held possible."
            if whole.low <= whole.measured <= whole.high
            else "It took longer than the last plan held possible; other programs may have used the machine."
            if whole.measured > whole.high
            else "It took less than the last plan held possible."
        )
    return " ".join(filter(None, told)) or None


def _probed(plans: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The plan that followed the probe, which holds what the probe measured; empty without one."""
    return next((plan for plan in plans[1:] if mapping(plan.get("measured"))), {})


def _rows(
    plans: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    *,
    is_over: bool,
) -> Iterator[Prediction]:
    first, probed = plans[0] if plans else {}, _probed(plans)
    planned = count(mapping(mapping((probed or first).get("choices")).get("updates")).get("value"))
    complete = planned is None or max((step["step"] for step in steps), default=0) >= planned
    last = mapping((probed or first).get("time"))

    def row(name: str, unit: Any, place: tuple[str, ...], measured: float | None, **more: Any) -> Prediction:
        return Prediction(
            name=name,
            unit=unit,
            predicted=_at(first, place),
            probed=_at(probed, place),
            measured=measured,
            **more,
        )

    peaks = finite(steps, "memory_bytes")
    device = mapping(first.get("memory")).get("device", "the device")
    yield row(f"peak memory on {device}", "bytes", ("memory", "peak_bytes"), max(peaks, default=None))
    seconds = finite(steps, "step_seconds")
    usual = median(seconds) if seconds else None
    yield row("time of one step (median)", "seconds", ("time", "step_seconds"), usual)
    for name, event, term in (
        ("evaluations", "evaluation", "evaluation"),
        ("checkpoints saved", "checkpoint_saved", "saving"),
    ):
        took = finite([e for e in events if e["event"] == event], "seconds")
        measured = sum(took) if took and is_over else None
        label = f"{name}, {len(took)} in all" if measured is not None else f"{name}, in all"
        yield row(label, "seconds", ("time", "terms", term), measured, comparable=complete)
    yield row(
        _WHOLE,
        "seconds",
        ("time", "total_seconds"),
        _active_seconds(events) if is_over else None,
        comparable=complete,
        low=number(last.get("low_seconds")),
        high=number(last.get("high_seconds")),
    )


def _at(plan: Mapping[str, Any], place: tuple[str, ...]) -> float | None:
    value: Any = plan
    for key in place:
        value = mapping(value).get(key)
    return number(value)


def _active_seconds(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds in which the run was worked on: from each start to the last event before the next."""
    total, begun, last = 0.0, None, None
    for event in events:
        moment = _moment(event.get("time"))
        if moment is None:
            continue
        if begun is None or last is None or event["event"] == "run_started":
            total += (last - begun).total_seconds() if begun and last else 0.0
            begun = moment
        last = moment
    return total + (last - begun).total_seconds() if begun and last else None


def _moment(value: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
