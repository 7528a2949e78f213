"""What would come of a configuration, and what is known when something about it is decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmtune.config import RunConfig
from llmtune.data import DataReport, DataStats, Survey
from llmtune.errors import LlmtuneError, PlanError
from llmtune.models import ModelSpec
from llmtune.planning import Plan
from llmtune.presets import CatalogueEntry, Preset
from llmtune.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a run has to keep to, besides what the machine has.

    Attributes:
        max_bytes: Memory it may take.
        max_seconds: Time it may be predicted to take.
    """

    max_bytes: int | None = None
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What training would come to under a configuration.

    Attributes:
        plan: What it would do, with time and memory.
        stats: Of the training data, in tokens of the model.
        spec: Of the model.
        preset: Of the model's family.
        limits: What it has to keep to.
    """

    plan: Plan
    stats: DataStats
    spec: ModelSpec
    preset: Preset
    limits: Limits

    @property
    def time(self) -> str:
        """Predicted time of the run."""
        return format_seconds(self.plan.time.total_seconds)

    @property
    def memory(self) -> str:
        """Predicted peak memory."""
        return format_bytes(self.plan.memory.peak_bytes)

    @property
    def too_slow(self) -> bool:
        """Whether it is predicted to take longer than it may."""
        most = self.limits.max_seconds
        return most is not None and self.plan.time.total_seconds > most

    @property
    def verdict(self) -> str:
        """In a word, what is against it; empty where nothing is."""
        return "does not fit" if not self.plan.fits else "too slow" if self.too_slow else ""

    @property
    def problem(self) -> str | None:
        """Why it cannot be trained like this, if so."""
        if not self.plan.fits:
            return f"needs {self.memory}, {format_bytes(self.plan.memory.free_bytes)} may be used"
        return f"takes about {self.time}, longer than it may" if self.too_slow else None

    def require(self) -> None:
        """Refuse what does not fit or takes too long.

        Raises:
            PlanError: With what would do.
        """
        with told_of(self.limits):
            self.plan.require_fit()
        most, plan = self.limits.max_seconds, self.plan
        if most is not None and self.too_slow:
            steps = max(1, int(plan.updates.value * most / plan.time.total_seconds))
            faster = "" if plan.preset.value == "highspeed" else "take --preset highspeed, "
            raise PlanError(
                f"{plan.model.value} takes about {self.time} for {plan.updates.value:,} updates, and at most "
                f"{format_seconds(most)} are allowed. Name a smaller model with --model, {faster}or stop early with "
                f"--set max_steps={steps}."
            )


@contextmanager
def told_of(limits: Limits) -> Iterator[None]:
    """A plan that does not fit says so with the limit that keeps it from fitting."""
    try:
        yield
    except PlanError as error:
        if limits.max_bytes is None:
            raise
        raise PlanError(f"with at most {format_bytes(limits.max_bytes)} of memory: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known when a question is put.

    Attributes:
        config: All that was decided so far.
        look: What would come of a configuration.
        survey: Sizes of the training rows.
        report: What was found in the training data.
        offered: Models that are worth proposing, in the order of the catalogue.
        beside: Files beside the data whose names say that they are for evaluation, the likeliest first.
        has_evaluation: The data was given with evaluation data, or has an evaluation split.
    """

    config: RunConfig
    look: Callable[[RunConfig], Outlook]
    survey: Survey
    report: DataReport
    offered: tuple[CatalogueEntry, ...]
    beside: tuple[str, ...]
    has_evaluation: bool = False

    def outlook(self, changes: Mapping[str, Any]) -> Outlook | LlmtuneError:
        """What would come of these changes, or why nothing would."""
        try:
            return self.look(settled(self.config, changes))
        except LlmtuneError as error:
            return error


def settled(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with some full keys set."""
    document = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        group, leaf = key.split(".")
        document.setdefault(group, {})[leaf] = value
    return RunConfig.model_validate(document)


def was_set(config: RunConfig, key: str) -> bool:
    """Whether somebody set this full key."""
    group, leaf = key.split(".")
    return leaf in getattr(config, group).model_fields_set
