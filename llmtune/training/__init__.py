"""Doing: the thin Trainer subclass, its data loader of updates, callbacks that watch and guards that may stop."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtune.training.ranks import Ranks
    from llmtune.training.train import TrainingJob, TrainingOutcome, run_training

__all__ = ["Ranks", "TrainingJob", "TrainingOutcome", "run_training"]


def __getattr__(name: str) -> object:
    if name == "Ranks":
        from llmtune.training import ranks

        return ranks.Ranks
    if name in ("TrainingJob", "TrainingOutcome", "run_training"):
        from llmtune.training import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
