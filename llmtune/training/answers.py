"""Answers of the model in training: the base model's before step 1, those that metrics judge, the samples at last.

Their size is their own: where memory runs out, fewer prompts are answered at once from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.errors import RecoveryExhausted
from llmtune.evaluation import Answer, Prompt, answers_to, as_base, counts_rows, prompts_of
from llmtune.evaluation.generation import ROWS_AT_ONCE
from llmtune.training.meter import free_caches, is_out_of_memory
from llmtune.training.recovery import Failure
from llmtune.training.shortage import first_line

if TYPE_CHECKING:
    from llmtune.training.train import TrainingJob
    from llmtune.training.trainer import UpdateTrainer

CAUSE = "memory ran out while prompts were answered"


class Answers:
    """Greedy answers of the model of one trainer.

    Args:
        job: Names tokenizer and most new tokens.
        trainer: Its model answers, its policy decides where memory runs out.
    """

    def __init__(self, job: TrainingJob, trainer: UpdateTrainer) -> None:
        self._job, self._trainer = job, trainer
        self._rows = ROWS_AT_ONCE

    def of(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """The answers, in the order of ``prompts``.

        Raises:
            RecoveryExhausted: Memory does not hold one prompt and its answer.
        """
        job, trainer = self._job, self._trainer
        device, limit = trainer.args.device, job.config.evaluate.max_new_tokens
        while True:
            try:
                with trainer.watched():
                    return answers_to(
                        trainer.model,
                        job.tokenizer,
                        prompts,
                        max_new_tokens=limit,
                        device=device,
                        rows_at_once=self._rows,
                    )
            except Exception as error:
                if trainer.is_sharded or not is_out_of_memory(error):
                    raise
                failed = str(error)
            free_caches(device)  # the error is gone by now, and with it the frames that held the cache
            self._rows = self._fewer(failed, prompts)

    def _fewer(self, error: str, prompts: Sequence[Prompt]) -> int:
        recoveries, rows = self._trainer.recoveries, min(self._rows, len(prompts))
        longest = max(len(prompt.input_ids) for prompt in prompts)
        failure = Failure(
            kind="evaluation_out_of_memory",
            cause=CAUSE,
            step=self._trainer.state.global_step,
            evidence={
                "phase": "evaluation",
                "rows": rows,
                "longest_prompt_tokens": longest,
                "error": first_line(error),
            },
            remedy="Lower --set evaluate.max_new_tokens, shorten the prompts, or use --set evaluate.num_samples=0.",
        )
        remedy = recoveries.decide(failure)
        if remedy.action != "smaller_evaluation":
            raise RecoveryExhausted(failure, remedy.reason)
        fewer = int(remedy.changes["rows"])
        recoveries.took(failure, remedy, {"prompts_at_once": fewer})
        return fewer


def attach_metrics(job: TrainingJob, trainer: UpdateTrainer, answers: Answers) -> None:
    """Have ``trainer`` compute the user's metrics on the first rows of the evaluation data."""
    assert job.eval_data is not None
    prompts = prompts_of(job.eval_data, job.tokenizer, job.config.evaluate.metric_rows)
    references = [prompt.reference for prompt in prompts]

    def measure() -> dict[str, float]:
        given = [each.text for each in answers.of(prompts)]
        return {name: float(metric(given, references)) for name, metric in job.metrics.items()}

    trainer.measures = measure
    trainer.counted = {name: len(prompts) for name, metric in job.metrics.items() if counts_rows(metric)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAnswer:
    """What the base model answered to a prompt, and what is wrong with it as an answer."""

    text: str
    flaw: str | None


def base_answers(job: TrainingJob, answers: Answers, prompts: list[Prompt]) -> list[BaseAnswer]:
    """Answers of the untouched base model. Full fine-tuning changes it, so they are noted before step 1."""
    if not prompts or job.ranks.is_sharded or not job.ranks.is_main:
        return []
    known = {event["prompt"]: event for event in job.run.events() if event["event"] == "sample"}
    if all(prompt.text in known for prompt in prompts):
        found = [known[prompt.text] for prompt in prompts]
        return [BaseAnswer(text=event["base"], flaw=event.get("base_flaw")) for event in found]
    with as_base(job.model):
        given = answers.of(prompts)
    base = [BaseAnswer(text=each.text, flaw=each.flaw(prompt)) for prompt, each in zip(prompts, given, strict=True)]
    for prompt, before in zip(prompts, base, strict=True):
        _tell(job, 0, prompt, before, None)
    return base


def tell_samples(job: TrainingJob, answers: Answers, prompts: list[Prompt], base: list[BaseAnswer], step: int) -> None:
    """Note what the model of ``step`` answers now, beside what the base model did."""
    if not base:
        return
    for prompt, before, after in zip(prompts, base, answers.of(prompts), strict=True):
        _tell(job, step, prompt, before, after)


def _tell(job: TrainingJob, step: int, prompt: Prompt, base: BaseAnswer, tuned: Answer | None) -> None:
    texts = {"reference": prompt.reference, "base": base.text, "tuned": None if tuned is None else tuned.text}
    flaws = {"base_flaw": base.flaw, "tuned_flaw": None if tuned is None else tuned.flaw(prompt)}
    job.run.event("sample", step, prompt=prompt.text, **texts, **flaws)
