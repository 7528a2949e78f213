"""Everything that llmtune raises on purpose.

    LlmtuneError                     exit 1   a defect of ours, when nothing below fits
    ├── ConfigError                  exit 2   an option, key or value that cannot be used
    │   └── MissingExtraError        exit 2   an optional package is needed; names the pip command
    ├── ModelError                   exit 2   not found, not causal, gated, Hub unreachable, foreign code
    ├── OutputError                  exit 2   output not writable, or holds another run
    ├── HardwareError                exit 2   a device was asked for that is not there
    ├── RunNotFoundError             exit 2   no run, study or trial of that name
    ├── DataError                    exit 3   rows that cannot be read, recognised or trained on
    │   └── UnknownColumnsError      exit 3   no format has columns of these names; carries them
    ├── PlanError                    exit 4   the plan does not fit this machine
    ├── UserCodeError                exit 1   a callback or metric of the user's raised; names whose code it was
    ├── TrainingError                exit 5   training stopped; names the last good checkpoint
    │   └── RecoveryExhausted        exit 5   what went wrong could not be mended any more; carries the failure
    ├── CheckpointError              exit 6   a checkpoint was asked for and none verifies
    └── Preempted                    exit 75  stopped by a signal after saving; resumable

Every message answers three questions: what happened and where, what was expected, how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from llmtune.training.recovery import Failure


class LlmtuneError(Exception):
    """Base of every error that a user can cause, meet or mend.

    ``exit_code`` is what the command line returns for it (see ``interface`` in the README).
    """

    exit_code: ClassVar[int] = 1


class ConfigError(LlmtuneError):
    """An option, key or value that cannot be used. Lists every problem of one input at once.

    Args:
        where: The file or the flag set that was read, e.g. ``run.yaml`` or ``command line``.
        problems: One sentence per problem.
    """

    exit_code = 2

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems. " if len(self.problems) > 1 else ""
        super().__init__(f"{where}: {count}{' · '.join(self.problems)}")


class MissingExtraError(ConfigError):
    """An optional package is needed for what was asked; the message is the command that installs it."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            needed_for, [f"needs the package '{package}', which is not installed: pip install 'llmtune[{extra}]'"]
        )


class ModelError(LlmtuneError):
    """The model cannot be had or cannot be used: not found, not causal, gated, Hub unreachable, foreign code."""

    exit_code = 2


class OutputError(LlmtuneError):
    """The output directory cannot be written, or holds a run of another identity."""

    exit_code = 2


class HardwareError(LlmtuneError):
    """A device was asked for that this machine does not have."""

    exit_code = 2


class RunNotFoundError(LlmtuneError):
    """No run of that name, prefix or directory."""

    exit_code = 2


class DataError(LlmtuneError):
    """Data that cannot be read, recognised or trained on; the message names file and line."""

    exit_code = 3


class UnknownColumnsError(DataError):
    """No format has columns of these names.

    Args:
        message: What happened, and a command that says what the columns are.
        columns: Names of the columns that hold text, each with the first text in it.
        likely: The columns that the command proposes, by field.
    """

    def __init__(self, message: str, *, columns: Mapping[str, str], likely: Mapping[str, str]) -> None:
        self.columns, self.likely = dict(columns), dict(likely)
        super().__init__(message)


class PlanError(LlmtuneError):
    """The plan does not fit this machine; the message names the terms and what would fit."""

    exit_code = 4


class UserCodeError(LlmtuneError):
    """Code that was handed to llmtune raised: a callback, a metric, code inside a model. Never retried."""


class TrainingError(LlmtuneError):
    """Training stopped and could not be continued; names the last good checkpoint and the failure report."""

    exit_code = 5


class RecoveryExhausted(TrainingError):
    """What went wrong could not be mended any more.

    Args:
        failure: What went wrong at last.
        reason: Why it ends here, e.g. what was tried.
        account: The last good checkpoint, how to continue and where the report is; known when the run is closed.
    """

    def __init__(self, failure: Failure, reason: str, account: str = "") -> None:
        self.failure, self.reason = failure, reason
        told = f"training stopped at step {failure.step}: {reason}. {failure.remedy}"
        super().__init__(f"{told} {account}".strip())


class CheckpointError(LlmtuneError):
    """A checkpoint was asked for and none verifies."""

    exit_code = 6


class Preempted(LlmtuneError):
    """Stopped by a signal after the step was saved; the message is the command that continues the run."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was most likely meant to be, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` when a known name is close to ``name``; else the list of known names."""
    known = sorted(known)
    match = nearest(name, known)
    return f", did you mean '{match}'?" if match else f"; known: {', '.join(known)}"
