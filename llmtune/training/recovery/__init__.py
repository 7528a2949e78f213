"""Recovery: what went wrong, what to do about it, and the account of it for people. Imports no torch.

``classify(error) -> Failure``, ``recovery(failure, plan, history) -> Remedy``, ``write_failure(run, …)``.
"""

from llmtune.training.recovery.classify import classify, is_out_of_memory
from llmtune.training.recovery.failure import KINDS, Attempt, Failure, FailureKind
from llmtune.training.recovery.policy import Budgets, Remedy, recovery
from llmtune.training.recovery.report import (
    attempts_of,
    note_incident,
    note_recovery,
    write_failure,
)

__all__ = [
    "KINDS",
    "Attempt",
    "Budgets",
    "Failure",
    "FailureKind",
    "Remedy",
    "attempts_of",
    "classify",
    "is_out_of_memory",
    "note_incident",
    "note_recovery",
    "recovery",
    "write_failure",
]
