"""Deciding: hardware × model × data × preset × what the user asked → one frozen ``Plan``, every number with its reason.

Pure functions: the same facts give the same plan. Of the ways to run that fit memory, the fastest wins.
"""

from llmtune.planning.choice import Choice
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.planning.model_choice import choose_model
from llmtune.planning.plan import Alternative, Plan
from llmtune.planning.planner import make_plan, variants
from llmtune.planning.request import PlanRequest
from llmtune.planning.timing import TimeEstimate

__all__ = [
    "Alternative",
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
