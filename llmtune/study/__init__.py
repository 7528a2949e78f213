"""Many runs of one question: which training numbers suit this model and this data best. Each trial is a real run."""

from typing import TYPE_CHECKING, Any

from llmtune.study.result import StudyResult, TrialRecord
from llmtune.study.space import Dimension, default_space, read_space

if TYPE_CHECKING:
    from llmtune.study.search import Study

__all__ = ["Dimension", "Study", "StudyResult", "TrialRecord", "default_space", "read_space"]


def __getattr__(name: str) -> Any:
    if name == "Study":
        from llmtune.study.search import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
