"""Fine-tune language models: data file in, trustworthy model and an honest account of it out.

    from llmtune import FineTuner

    result = FineTuner("data.jsonl", preset="quality").train()

Importing this package loads neither torch nor transformers; that happens when something is trained.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.data import DataReport
    from llmtune.finetuner import FineTuner, RunResult
    from llmtune.hardware import Hardware
    from llmtune.planning import Plan
    from llmtune.presets import Preset
    from llmtune.study import Study

__all__ = ["DataReport", "FineTuner", "Hardware", "Plan", "Preset", "RunResult", "Study"]

_HOME = {
    "DataReport": "llmtune.data",
    "FineTuner": "llmtune.finetuner",
    "Hardware": "llmtune.hardware",
    "Plan": "llmtune.planning",
    "Preset": "llmtune.presets",
    "RunResult": "llmtune.finetuner",
    "Study": "llmtune.study",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'llmtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
