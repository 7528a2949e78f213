"""``model="auto"``: the best catalogued model that fits this machine and trains in reasonable time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

from llmtune.errors import PlanError
from llmtune.planning.choice import Choice
from llmtune.planning.memory import USABLE_SHARE
from llmtune.planning.plan import Plan
from llmtune.presets import CatalogueEntry, catalogue
from llmtune.units import format_bytes, format_count, format_seconds

# How long people wait for what they asked: over a coffee, over an afternoon, over a night. llmtune: chosen.
TIME_BUDGET_SECONDS = {"highspeed": 1800, "quality": 2 * 3600, "bestaccuracy": 8 * 3600}
BUILTIN_FAMILY = "tiny"
# Models between two of these sizes take about as much, and the newer does better: TinyLlama with 1.1B parameters is
# behind Qwen3 with 0.6B. llmtune: chosen in the gaps of what is published: 0.1-0.4B, 0.5-1.2B, 1.4-1.7B, 2.6-4B, 7-9B,
# 12-15B and more.
SIZE_CLASSES = (0, 0.45e9, 1.3e9, 2.2e9, 5.5e9, 10e9, float("inf"))


def choose_model(
    plan_of: Callable[[CatalogueEntry], Plan],
    longest_row: Callable[[CatalogueEntry], int] = lambda entry: 0,
    *,
    gated: bool = False,
) -> tuple[CatalogueEntry, Choice[str]]:
    """Pick the catalogue's best entry for this machine and data.

    Instruction-tuned models come before base models. Of each, the largest class that fits memory and the time budget
    wins, and in it the newest model, then the largest. Never the builtin model.

    Args:
        plan_of: Makes the plan of one entry; memory and time are read from it.
        longest_row: Tokens that one row may have with an entry's tokenizer; a shorter context rules the entry out.
        gated: Whether there is a token for models whose licence has to be accepted first.

    Raises:
        PlanError: Nothing in the catalogue fits.
    """
    entries = [entry for entry in contenders(gated=gated) if longest_row(entry) <= entry.context]
    if not entries:
        raise PlanError(
            "no catalogued model has a context as long as the longest row; shorten it, or drop it with "
            "--set data.too_long=drop --set data.max_length=N"
        )
    least: tuple[CatalogueEntry, Plan] | None = None
    missed, missed_class = "", -1
    smallest = sys.maxsize
    for entry in entries:
        plan = plan_of(entry)
        took, needed = format_seconds(plan.time.total_seconds), format_bytes(plan.memory.peak_bytes / USABLE_SHARE)
        shortage = f"{entry.id} would take about {took}" if plan.fits else f"{entry.id} would need {needed} free"
        if plan.fits and plan.time.total_seconds <= (budget := TIME_BUDGET_SECONDS[plan.preset.value]):
            return entry, _chosen(entry, plan, budget, missed, gated=gated)
        if plan.fits and (least is None or plan.time.total_seconds < least[1].time.total_seconds):
            least = entry, plan
        smallest = min(smallest, plan.memory.peak_bytes)
        if _size_class(entry) != missed_class:  # the best of the next larger ones
            missed, missed_class = shortage, _size_class(entry)
    if least is None:
        raise PlanError(
            f"no catalogued model fits this machine: the smallest would need {format_bytes(smallest / USABLE_SHARE)} "
            f"free, {format_bytes(plan.memory.free_bytes)} are. Free memory, name a smaller model with --model, or try "
            "llmtune with --model builtin:tiny"
        )
    entry, plan = least
    took, goal = format_seconds(plan.time.total_seconds), plan.preset.value
    reason = (
        f"the fastest open model that fits; it will take about {took} here, more than the "
        f"{format_seconds(TIME_BUDGET_SECONDS[goal])} meant for {goal}"
    )
    return entry, Choice(entry.id, reason, "derived", "--set train.max_steps=N for less time")


def contenders(*, gated: bool) -> list[CatalogueEntry]:
    """What may be chosen without being named, the best first.

    Gated models only on request, and none whose licence is for research alone.
    """
    entries = [
        entry
        for entry in catalogue()
        if entry.family != BUILTIN_FAMILY and (gated or not entry.gated) and "research" not in entry.licence.lower()
    ]
    return sorted(
        sorted(entries, key=lambda entry: (entry.released, entry.parameters), reverse=True),
        key=lambda entry: (not entry.instruct, -_size_class(entry)),
    )


def _chosen(entry: CatalogueEntry, plan: Plan, budget: float, missed: str, *, gated: bool) -> Choice[str]:
    kind = "instruction-tuned" if entry.instruct else "base"
    reason = (
        f"the best {'' if gated else 'open '}{kind} model ({format_count(entry.parameters)} parameters, "
        f"{entry.licence}) that fits {format_bytes(plan.memory.free_bytes)} with {plan.method.value} and trains within "
        f"{format_seconds(budget)}, for {plan.preset.value}"
    )
    return Choice(entry.id, reason, "derived", missed)


def _size_class(entry: CatalogueEntry) -> int:
    bounds = enumerate(pairwise(SIZE_CLASSES))
    return next(number for number, (least, below) in bounds if least <= entry.parameters < below)
