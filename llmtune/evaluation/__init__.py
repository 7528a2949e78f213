"""Measuring: loss and its interval, answers to held-out prompts and their flaws, exact match, metrics of the user."""

from typing import TYPE_CHECKING, Any

from llmtune.evaluation.metrics import Metric, counts_rows, exact_match

if TYPE_CHECKING:
    from llmtune.evaluation.flaws import AnswerCheck
    from llmtune.evaluation.generation import Answer, Prompt, answer, answers_to, as_base, prompts_of
    from llmtune.evaluation.interval import LEAST_ROWS, Interval, paired_interval
    from llmtune.evaluation.loss import RowLosses, Scores, perplexity_of, score

__all__ = [
    "LEAST_ROWS",
    "Answer",
    "AnswerCheck",
    "Interval",
    "Metric",
    "Prompt",
    "RowLosses",
    "Scores",
    "answer",
    "answers_to",
    "as_base",
    "counts_rows",
    "exact_match",
    "paired_interval",
    "perplexity_of",
    "prompts_of",
    "score",
]


# Where each name is: torch or numpy are loaded when one is first asked for.
_PLACES = {
    "flaws": ("AnswerCheck",),
    "interval": ("LEAST_ROWS", "Interval", "paired_interval"),
    "loss": ("RowLosses", "Scores", "perplexity_of", "score"),
    "generation": ("Answer", "Prompt", "answer", "answers_to", "as_base", "prompts_of"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"llmtune.evaluation.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
