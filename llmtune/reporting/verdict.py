"""Whether tuning helped: the one place that decides it and says it, for eval, the report, results and the demo."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.evaluation.flaws import AnswerCheck, Flaw
from llmtune.evaluation.interval import LEAST_ROWS, Interval
from llmtune.reporting.facts import EvaluationRow, FailureNote, Verdict
from llmtune.reporting.reading import count, mapping, numbers
from llmtune.runs import number

# exp() of a larger loss says nothing to anyone.
_LARGEST_LOSS_WITH_PERPLEXITY = 20.0
# A rise of the held-out loss above its minimum smaller than this (relative) is noise between evaluations.
_RISE_WORTH_TELLING = 0.02
# A flaw of one answer, and of several.
FLAW_WORDS: dict[Flaw, tuple[str, str]] = {
    "empty": ("is empty", "are empty"),
    "repeats": ("repeats itself", "repeat themselves"),
    "endless": ("never ends", "never end"),
}
_NOT_BETTER = "Not better than the base model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict rests on.

    Attributes:
        base_loss: Mean loss per token of the base model, in nats; None where it was not measured.
        loss: The same of the tuned model.
        rows: Rows that both are of; those that are also trained on are left out.
        tokens: Their supervised tokens.
        interval: Of tuned minus base; None where the losses of single rows are not known.
        answers: Flaws of answers to some of the rows.
        leaked: Rows that were left out because they are also trained on.
        is_held_out: Whether the rows are known to be held out of training.
    """

    base_loss: float | None
    loss: float | None
    rows: int | None = None
    tokens: int | None = None
    interval: Interval | None = None
    answers: AnswerCheck | None = None
    leaked: int = 0
    is_held_out: bool = True


def judge(evidence: Evidence, *, is_over: bool = True) -> Verdict:
    """Compare base and tuned model: by the interval of the loss difference, and by flaws of the answers.

    Args:
        evidence: What was measured.
        is_over: Whether the run is finished; else the verdict is the one so far.
    """
    kind, words = _decide(evidence)
    if kind == "no_evaluation":
        return Verdict(kind="no_evaluation", text=words, rows=evidence.rows)
    so_far = "" if is_over else " so far"
    text = f"{words}{so_far}: {_numbers(evidence)}."
    more = (_basis(evidence), _answers(evidence), _left_out(evidence), _advice(kind, evidence))
    return Verdict(
        kind=kind,
        text=" ".join([text, *filter(None, more)]),
        rows=evidence.rows,
        tokens=evidence.tokens,
        base_loss=evidence.base_loss,
        loss=evidence.loss,
        interval=evidence.interval,
        answers=evidence.answers,
    )


def _decide(evidence: Evidence) -> tuple[Any, str]:
    """The kind of the verdict, and its first words; the whole text where nothing was measured."""
    base, loss, interval, answers = evidence.base_loss, evidence.loss, evidence.interval, evidence.answers
    if evidence.leaked and not evidence.rows:
        rows = "the evaluation row is" if evidence.leaked == 1 else f"all {evidence.leaked:,} evaluation rows are"
        told = f"Not measured: {rows} also trained on, so nothing is held out. Name other data with --eval-data."
        return "no_evaluation", told
    if loss is None:
        return "no_evaluation", "Not measured: no evaluation on held-out rows, so nothing can be said about quality."
    if base is None:
        told = f"Held-out loss is {loss:.4g}; the base model was not measured, so there is no comparison."
        return "no_evaluation", told
    if not math.isfinite(loss):
        return "not_better", _NOT_BETTER
    if interval is not None and interval.low > 0:
        return "worse", "Worse than the base model"
    if answers is not None and answers.spoils_the_verdict:
        return "not_better", f"{_NOT_BETTER}, whatever the loss, because of its answers"
    if not math.isfinite(base):
        return "better", "Better than the base model"
    if evidence.rows is not None and evidence.rows < LEAST_ROWS:
        return "too_few_rows", "Too few rows to tell whether the tuned model is better"
    if interval is None:
        return ("no_interval", "Not known to be more than chance") if loss < base else ("not_better", _NOT_BETTER)
    return (
        ("better", "Better than the base model")
        if interval.high < 0
        else ("not_better", "No better than the base model")
    )


def _numbers(evidence: Evidence) -> str:
    base, loss = evidence.base_loss, evidence.loss
    assert base is not None
    assert loss is not None
    name = "held-out loss" if evidence.is_held_out else "loss"
    if not math.isfinite(loss):
        return f"{name} is {loss}"
    told = f"{name} went from {base:.4g} to {loss:.4g}{_change(base, loss)}"
    if max(base, loss) <= _LARGEST_LOSS_WITH_PERPLEXITY:
        told += f", perplexity from {math.exp(base):.4g} to {math.exp(loss):.4g}"
    return told


def _basis(evidence: Evidence) -> str:
    """How much the verdict knows: rows, tokens and the interval."""
    interval, rows, tokens = evidence.interval, evidence.rows, evidence.tokens
    if rows is None:
        return ""
    of = f"{rows:,} {'held-out ' if evidence.is_held_out else ''}row{'' if rows == 1 else 's'}"
    told = f"That rests on {of}" + (f" with {tokens:,} tokens" if tokens is not None else "")
    if interval is None:
        return told + "."
    zero = ", which includes zero" if interval.low <= 0 <= interval.high else ""
    return (
        f"{told}: tuned minus base is {interval.value:+.4g} per token, "
        f"{interval.confidence * 100:.0f} % interval {interval.low:+.4g} to {interval.high:+.4g}{zero}."
    )


def _answers(evidence: Evidence) -> str:
    check = evidence.answers
    if check is None or not check.checked:
        return ""
    of = f"Of {check.checked:,} answer{'' if check.checked == 1 else 's'}"
    base = f"base model: {sum(check.base.values()):,} of {check.checked:,}"
    if not check.flawed:
        return f"{of} none is empty, repeats itself or never ends ({base})."
    kinds = [f"{n:,} {words[n > 1]}" for flaw, words in FLAW_WORDS.items() if (n := check.tuned.get(flaw, 0))]
    return f"{of} {', '.join(kinds)} ({base})."


def _left_out(evidence: Evidence) -> str:
    if not evidence.leaked:
        return ""
    rows = "1 evaluation row is" if evidence.leaked == 1 else f"{evidence.leaked:,} evaluation rows are"
    return f"{rows} also trained on and left out of this verdict."


def _advice(kind: str, evidence: Evidence) -> str:
    if kind == "too_few_rows":
        return (
            f"At least {LEAST_ROWS} rows are needed: hold out more with data.eval_fraction, or name some: --eval-data."
        )
    if kind == "no_interval":
        return "The losses of single rows are not known here; llmtune eval measures them."
    return ""


def evidence_of(
    document: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Evidence:
    """Read what a run measured from its own files.

    Args:
        document: ``run.json``.
        evaluations: The ``evaluation`` events, by rising step.
        events: All events.
    """
    metrics, best = numbers(mapping(document.get("metrics"))), mapping(document.get("best")).get("step")
    trained = [event for event in evaluations if event["step"] > 0]
    judged = next((event for event in trained if event["step"] == best), trained[-1] if trained else {})
    first = next((event for event in evaluations if event["step"] == 0), {})
    base_loss = metrics.get("base_eval_loss", number(first.get("eval_loss")))
    loss = metrics.get("eval_loss", number(judged.get("eval_loss")))
    held_out, of = mapping(judged.get("held_out")), count(judged.get("num_rows"))
    rows = count(held_out.get("rows"))
    if rows is not None:
        loss, base_loss = number(held_out.get("loss")), number(held_out.get("base_loss", base_loss))
    return Evidence(
        base_loss=base_loss,
        loss=loss,
        rows=of if rows is None else rows,
        tokens=count(held_out.get("tokens", judged.get("eval_tokens"))),
        interval=_interval(mapping(held_out.get("difference"))),
        answers=_checked(events),
        leaked=0 if rows is None or of is None else of - rows,
    )


def _interval(document: Mapping[str, Any]) -> Interval | None:
    found = numbers(document)
    names = ("value", "low", "high", "confidence")
    return Interval(**{name: found[name] for name in names}) if found.keys() >= set(names) else None


def _checked(events: Iterable[Mapping[str, Any]]) -> AnswerCheck | None:
    """The flaws of the last answer to each prompt; None where answers were not checked."""
    last = {
        str(event["prompt"]): (event.get("base_flaw"), event["tuned_flaw"])
        for event in events
        if event["event"] == "sample" and event.get("tuned") is not None and {"prompt", "tuned_flaw"} <= event.keys()
    }
    return AnswerCheck.of(last.values()) if last else None


def state_sentence(*, status: str, is_live: bool, step: int, of: int | None, failures: tuple[FailureNote, ...]) -> str:
    """What became of the run."""
    progress = f"step {step} of {of}" if of else f"step {step}"
    if status == "finished":
        return f"Finished after {step} steps." if of is None or step >= of else f"Finished early, at {progress}."
    if status == "running":
        return f"Running, at {progress}." if is_live else f"Stopped without a word at {progress}; it can be resumed."
    if status == "preempted":
        return f"Stopped by a signal at {progress}, saved; it can be resumed."
    if status == "failed":
        return f"Failed at {progress}{f': {failures[-1].cause}' if failures else '.'}"
    return "Planned; training has not begun."


def overfitting_note(evaluations: tuple[EvaluationRow, ...]) -> str | None:
    """Where the held-out loss was lowest, when it rose clearly afterwards."""
    losses = [(row.values["eval_loss"], row.step) for row in evaluations if "eval_loss" in row.values]
    finite = [(loss, step) for loss, step in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    (lowest, at), (last, end) = min(finite), finite[-1]
    if end <= at or last <= lowest * (1 + _RISE_WORTH_TELLING):
        return None
    return (
        f"Held-out loss was lowest at step {at} ({lowest:.4g}) and rose to {last:.4g} by step {end}: "
        "the later steps fitted the training rows better and new rows worse."
    )


def _change(before: float, after: float) -> str:
    if not math.isfinite(before) or before <= 0:
        return ""
    change = (after / before - 1) * 100
    return f" ({change:+.0f} %)" if abs(change) >= 1 else f" ({change:+.2f} %)"
