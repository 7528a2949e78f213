"""One run: the facade ``FineTuner``, what it gathers, what it leaves behind, and how a finished run is opened again."""

from typing import TYPE_CHECKING, Any

from llmtune.finetuner.result import RunResult

if TYPE_CHECKING:
    from llmtune.finetuner.facade import FineTuner
    from llmtune.finetuner.tuned import TunedRun, Verdict

__all__ = ["FineTuner", "RunResult", "TunedRun", "Verdict"]


def __getattr__(name: str) -> Any:
    if name == "FineTuner":
        from llmtune.finetuner.facade import FineTuner

        return FineTuner
    if name in ("TunedRun", "Verdict"):
        from llmtune.finetuner import tuned

        return getattr(tuned, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
