"""What to do about the failures of a run, decided by the policy and written down: one history for all who ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmtune.console import speaker
from llmtune.planning import Choice, Plan
from llmtune.training.recovery import (
    Attempt,
    Budgets,
    Failure,
    Remedy,
    attempts_of,
    note_incident,
    note_recovery,
    recovery,
)

if TYPE_CHECKING:
    from llmtune.runs import RunDirectory
    from llmtune.training.ranks import Ranks

ROLL_BACK = "roll_back"
# Numbers of a failure that a line on the terminal shows, in these words.
_SHOWN = {"loss": "loss", "grad_norm": "gradient norm", "evaluation_loss": "evaluation loss", "best": "best"}


class Recoveries:
    """Decides about each failure of a run, and keeps the plan in force. Every rank has one and decides alike.

    Args:
        run: Gets an event for each incident and each recovery, and the next plan where one changes it.
        plan: The plan in force; the probe and a rollback replace it.
        ranks: The processes of this launch; the main one writes.
        budgets: What the user allows.
        step: Updates that were made when this process took the run up.
    """

    def __init__(self, run: RunDirectory, plan: Plan, *, ranks: Ranks, budgets: Budgets, step: int) -> None:
        self.plan = plan
        self._run, self._writes, self._budgets = run, ranks.is_main, budgets
        self._history: list[Attempt] = ranks.from_main(history_at(run.events(), step) if ranks.is_main else [])

    def decide(self, failure: Failure) -> Remedy:
        """What to do; the same on every rank that was told of the same failures. The incident is written down."""
        remedy = recovery(failure, self.plan, self._history, self._budgets)
        self._history.append(Attempt(failure=failure, action=remedy.action))
        if self._writes:
            note_incident(self._run, failure)
        return remedy

    def took(self, failure: Failure, remedy: Remedy, changes: Mapping[str, Any]) -> None:
        """A remedy was applied: an event, a line, and the next plan with those ``changes`` that are choices of it."""
        chosen: dict[str, Any] = {
            name: Choice(value, f"{remedy.reason} (step {failure.step + 1})", "measured")
            for name, value in changes.items()
            if isinstance(before := getattr(self.plan, name, None), Choice) and before.value != value
        }
        self.plan = replace(self.plan, **chosen)
        if not self._writes:
            return
        note_recovery(self._run, failure, replace(remedy, changes=changes))
        if chosen:
            memory, updates = self.plan.memory.peak_bytes, self.plan.updates.value
            path = self._run.add_plan(self.plan.to_json())
            self._run.event("plan", failure.step, file=path.name, memory_bytes=memory, updates=updates)
        speaker.warn(f"step {failure.step + 1}: {remedy.reason}{briefly(failure, changes)}")


def history_at(events: Iterable[Mapping[str, Any]], step: int) -> list[Attempt]:
    """What was tried before in the course that leads to ``step``, for a process that takes the run up there.

    What happened after the checkpoint of ``step`` was saved is repeated now, so it does not count; what a rollback
    ended does, or the same would be tried for ever.
    """
    told = list(events)
    kept = 0
    for number, event in enumerate(told, start=1):
        saved = event["event"] == "checkpoint_saved" and event["step"] == step
        if saved or (event["event"] == "recovery" and event.get("action") == ROLL_BACK):
            kept = number
    return attempts_of(told[:kept])


def briefly(failure: Failure, changes: Mapping[str, Any] | None = None) -> str:
    """Numbers and places of a failure and what changes, in brackets, for a line on the terminal."""
    evidence = failure.evidence
    parts = [", ".join(f"{word} {evidence[name]:.4g}" for name, word in _SHOWN.items() if name in evidence)]
    if layer := evidence.get("layer"):
        parts.append(f"first in {layer}")
    if places := evidence.get("places"):
        parts.append(f"rows {', '.join(places)}")
    parts.append(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (changes or {}).items()))
    told = "; ".join(part for part in parts if part)
    return f" ({told})" if told else ""
