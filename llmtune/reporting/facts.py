"""What a report tells, as frozen facts. How it is read from a run is in ``summary``, how it is drawn in ``charts``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from llmtune.evaluation.flaws import AnswerCheck
from llmtune.evaluation.interval import Interval
from llmtune.reporting.data_account import DataAccount
from llmtune.runs import as_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether tuning helped, in plain words, and what that rests on.

    Attributes:
        kind: ``better`` or ``worse`` where the interval excludes zero; ``not_better`` where it does not, or where the
            answers are flawed; ``too_few_rows``; ``no_interval`` where the losses of single rows are not known;
            ``no_evaluation``.
        text: The same for people.
        rows: Rows that were held out of training.
        tokens: Their supervised tokens.
        base_loss: Mean loss per token of the base model on them, in nats.
        loss: The same of the tuned model.
        interval: Of tuned minus base.
        answers: Flaws of the answers to some of them.
    """

    kind: Literal["better", "worse", "not_better", "too_few_rows", "no_interval", "no_evaluation"]
    text: str
    rows: int | None = None
    tokens: int | None = None
    base_loss: float | None = None
    loss: float | None = None
    interval: Interval | None = None
    answers: AnswerCheck | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        plain: dict[str, Any] = as_json(self)
        return plain | {"answers": None if self.answers is None else self.answers.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One predicted quantity beside what was measured; None where there is nothing to tell.

    Attributes:
        predicted: By the first plan.
        probed: By the plan that followed the probe.
        comparable: Whether what was measured is all that was predicted; not in a run that ended early.
        low, high: The range that the last prediction held possible.
    """

    name: str
    unit: Literal["bytes", "seconds"]
    predicted: float | None
    probed: float | None
    measured: float | None
    comparable: bool = True
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted: 1.1 when it was 10 % more than the first plan said."""
        return self._over(self.predicted)

    @property
    def probed_ratio(self) -> float | None:
        """Measured over what the plan after the probe said."""
        return self._over(self.probed)

    def _over(self, predicted: float | None) -> float | None:
        return self.measured / predicted if self.comparable and predicted and self.measured else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One choice of the plan in force."""

    choice: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """One value that a later plan changed."""

    plan: str
    choice: str
    before: Any
    after: Any
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something that did not go as planned, or what was done about it."""

    time: str
    step: int
    event: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureNote:
    """One report in ``failures/``; ``tried`` is what was done before about failures of the run."""

    file: str
    kind: str
    cause: str
    remedy: str
    tried: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One quality measure of the base model and of the result; ``rows``: what a share of rows is a share of."""

    name: str
    base: float | None
    tuned: float | None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One evaluation during training."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the base model and the tuned model answered to the same prompt, and what is wrong with that."""

    prompt: str
    base: str | None
    tuned: str | None
    reference: str | None
    base_flaw: str | None = None
    tuned_flaw: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the tuned model gave the reference, white space at the ends aside."""
        return None not in (self.tuned, self.reference) and str(self.tuned).strip() == str(self.reference).strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One quantity over steps; NaN and infinities are kept."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProblem:
    """One problem that was found in the data."""

    file: str
    line: str
    field: str
    problem: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run, told from its directory alone.

    Attributes:
        state: What became of the run, in one sentence.
        non_finite_steps: Steps whose loss or gradient norm was NaN or infinite.
        note: What the evaluations say about overfitting, or None.
        predictions_note: What the predictions rest on, or None.
        data, environment: Rows of name and value.
        next_commands: Rows of purpose and command.
        data_account: What the rows of ``data`` say, in order; not part of ``to_json``.
        curves: By name of the quantity; not part of ``to_json``.
    """

    name: str
    dir: str
    status: str
    model: str | None
    data_name: str | None
    preset: str | None
    command: str | None
    started: str | None
    finished: str | None
    steps: int
    steps_planned: int | None
    best: Mapping[str, Any] | None
    state: str
    verdict: Verdict
    note: str | None
    metrics: tuple[Metric, ...]
    predictions: tuple[Prediction, ...]
    predictions_note: str | None
    tokens: int | None
    supervised_tokens: int | None
    tokens_per_second: float | None
    non_finite_steps: int
    happenings: tuple[Happening, ...]
    failures: tuple[FailureNote, ...]
    plan: tuple[PlanRow, ...]
    plan_notices: tuple[str, ...]
    plan_changes: tuple[PlanChange, ...]
    memory_terms: Mapping[str, float]
    evaluations: tuple[EvaluationRow, ...]
    samples: tuple[Sample, ...]
    data_account: DataAccount
    data: tuple[tuple[str, Any], ...]
    data_problems: tuple[DataProblem, ...]
    environment: tuple[tuple[str, Any], ...]
    next_commands: tuple[tuple[str, str], ...]
    curves: Mapping[str, Curve]

    def to_json(self) -> dict[str, Any]:
        """The summary as ``show --json`` prints it; the keys of ``runs --json`` are among its keys."""
        left_out = ("curves", "data_account")
        document = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        data_name, rows = document.pop("data_name"), document.pop("data")
        document |= {"data": data_name, "data_report": dict(rows), "environment": dict(self.environment)}
        document["next_commands"] = dict(self.next_commands)
        plain: dict[str, Any] = as_json(document)
        return plain
