"""Descriptions of optimizers, schedules and trackers: their names, and what each of them needs."""

from llmtune.registry.availability import Availability, availability, usable_settings
from llmtune.registry.needs import Credential, Package
from llmtune.registry.optimizers import OPTIMIZERS, Optimizer
from llmtune.registry.schedules import SCHEDULES, Schedule
from llmtune.registry.trackers import TRACKERS, Tracker, resolve_trackers, tracker_problems

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "TRACKERS",
    "Availability",
    "Credential",
    "Optimizer",
    "Package",
    "Schedule",
    "Tracker",
    "availability",
    "resolve_trackers",
    "tracker_problems",
    "usable_settings",
]
