"""Deciding: hardware × model × data × preset × what the user asked → one frozen ``Plan``, every number with its reason.

Pure functions; nothing here imports torch.
"""

from llmtune.planning.choice import Choice
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.planning.model_choice import choose_model
from llmtune.planning.plan import Plan
from llmtune.planning.planner import PlanRequest, make_plan, variants
from llmtune.planning.timing import TimeEstimate

__all__ = [
    "Choice",
    "Footprint",
    "MemoryEstimate",
    "Plan",
    "PlanRequest",
    "TimeEstimate",
    "choose_model",
    "make_plan",
    "predict_memory",
    "variants",
]
