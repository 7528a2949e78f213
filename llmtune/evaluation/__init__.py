"""Measuring: loss and perplexity, answers to held-out prompts, exact match and the user's own metrics."""

from typing import TYPE_CHECKING, Any

from llmtune.evaluation.metrics import Metric, exact_match

if TYPE_CHECKING:
    from llmtune.evaluation.generation import Prompt, answer, as_base, prompts_of
    from llmtune.evaluation.loss import Scores, score

__all__ = ["Metric", "Prompt", "Scores", "answer", "as_base", "exact_match", "prompts_of", "score"]


def __getattr__(name: str) -> Any:
    if name in ("Scores", "score"):  # these import torch
        from llmtune.evaluation import loss

        return getattr(loss, name)
    if name in ("Prompt", "answer", "as_base", "prompts_of"):
        from llmtune.evaluation import generation

        return getattr(generation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
