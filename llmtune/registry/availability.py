"""Availability of optimizers, schedules and trackers, as ``llmtune doctor`` lists it."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.registry.optimizers import OPTIMIZERS
from llmtune.registry.schedules import SCHEDULES
from llmtune.registry.trackers import TRACKERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """Availability of a name. ``why`` is the reason; ``needs`` is empty where the name needs nothing."""

    available: bool
    why: str
    needs: str = ""


def availability(problem: str | None, needs: str = "") -> Availability:
    """Return the availability for a problem of the registry; None means that there is none."""
    if problem is None:
        return Availability(available=True, why=needs or "nothing else is needed", needs=needs)
    return Availability(available=False, why=problem.removeprefix("which ").removeprefix("llmtune does not run: it "))


def usable_settings(device: str) -> dict[str, dict[str, Availability]]:
    """Return the availability of every name by the key that takes it.

    Args:
        device: Type of the device that would train, such as ``cuda``.
    """
    goes_by = "goes by evaluations: needs held-out rows"
    return {
        "train.optimizer": {name: availability(one.problem(device)) for name, one in OPTIMIZERS.items()},
        "train.schedule": {
            name: availability(None, goes_by if one.needs_evaluation else "") for name, one in SCHEDULES.items()
        },
        "monitor.report_to": {name: availability(one.problem()) for name, one in TRACKERS.items()},
    }
