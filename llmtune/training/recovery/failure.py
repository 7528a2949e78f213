"""What went wrong, as a frozen fact: the word for it, the evidence, and what a person can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

FailureKind = Literal[
    "out_of_memory",
    "evaluation_out_of_memory",
    "non_finite",
    "spike",
    "divergence",
    "corrupt_checkpoint",
    "disk",
    "worker",
    "hung",
    "preempted",
    "killed",
    "hardware",
    "user_code",
    "refused",
    "defect",
]
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One thing that went wrong.

    Attributes:
        kind: A row of the recovery policy. ``refused`` is what llmtune itself turned down, with a message that says
            how to mend it; ``defect`` is what no other word fits.
        cause: Short and stable, the same whenever the same thing happens again: budgets are counted by it.
        step: Updates done when it happened.
        evidence: The facts that speak for it, as JSON.
        remedy: What a person can do, in one or two sentences.
    """

    kind: FailureKind
    cause: str
    step: int
    evidence: Mapping[str, Any]
    remedy: str

    @property
    def key(self) -> tuple[str, str, int]:
        """What budgets are counted by."""
        return self.kind, self.cause, self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A failure of this run and the action that was taken on it."""

    failure: Failure
    action: str
