"""Plain words for what became of a run and whether tuning helped."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmtune.reporting.facts import EvaluationRow, FailureNote, Metric, Verdict

# exp() of a larger loss says nothing to anyone.
_LARGEST_LOSS_WITH_PERPLEXITY = 20.0
# A rise of the held-out loss above its minimum smaller than this (relative) is noise between evaluations.
_RISE_WORTH_TELLING = 0.02


def judge(metrics: Iterable[Metric], *, is_over: bool) -> Verdict:
    """Compare base and tuned model by their loss on held-out rows.

    Args:
        metrics: Among them ``eval_loss``, where it was measured.
        is_over: Whether the run is finished; else what is told is so far.
    """
    loss = next((metric for metric in metrics if metric.name == "eval_loss"), None)
    if loss is None or loss.tuned is None:
        text = "Not measured: no evaluation on held-out rows, so nothing can be said about quality."
        return Verdict(kind="no_evaluation", text=text)
    so_far = "" if is_over else " so far"
    if loss.base is None:
        text = f"Held-out loss is {loss.tuned:.4g}{so_far}; the base model was not measured, so there is no comparison."
        return Verdict(kind="no_evaluation", text=text)
    if not math.isfinite(loss.tuned):
        text = f"Not better than the base model{so_far}: held-out loss is {loss.tuned}."
        return Verdict(kind="not_better", text=text)
    numbers = f"held-out loss went from {loss.base:.4g} to {loss.tuned:.4g}{_change(loss.base, loss.tuned)}"
    if max(loss.base, loss.tuned) <= _LARGEST_LOSS_WITH_PERPLEXITY:
        numbers += f", perplexity from {math.exp(loss.base):.4g} to {math.exp(loss.tuned):.4g}"
    if loss.tuned < loss.base or not math.isfinite(loss.base):
        return Verdict(kind="better", text=f"Better than the base model{so_far}: {numbers}.")
    return Verdict(kind="not_better", text=f"Not better than the base model{so_far}: {numbers}.")


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
    return f" ({(after / before - 1) * 100:+.0f} %)"
