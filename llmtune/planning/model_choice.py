"""``model="auto"``: the best catalogued model that fits this machine and trains in reasonable time."""

from __future__ import annotations

from collections.abc import Callable

from llmtune.errors import PlanError
from llmtune.planning.choice import Choice
from llmtune.planning.plan import Plan
from llmtune.presets import CatalogueEntry, catalogue
from llmtune.units import format_bytes, format_count, format_seconds

# How long people wait for what they asked: over a coffee, over an afternoon, over a night. llmtune: chosen.
TIME_BUDGET_SECONDS = {"highspeed": 1800, "quality": 2 * 3600, "bestaccuracy": 8 * 3600}
BUILTIN_FAMILY = "tiny"


def choose_model(
    plan_of: Callable[[CatalogueEntry], Plan], longest_row: Callable[[CatalogueEntry], int] = lambda entry: 0
) -> tuple[CatalogueEntry, Choice[str]]:
    """Pick the catalogue's best entry for this machine and data.

    Open entries only (a gated one needs a licence accepted first) and never the builtin one. The largest that fits
    memory and the time budget wins; instruction-tuned before base, newer before older.

    Args:
        plan_of: Makes the plan of one entry; memory and time are read from it.
        longest_row: Tokens that one row may have with an entry's tokenizer; a shorter context rules the entry out.

    Raises:
        PlanError: Nothing in the catalogue fits.
    """
    open_entries = [entry for entry in catalogue() if entry.family != BUILTIN_FAMILY and not entry.gated]
    entries = [entry for entry in open_entries if longest_row(entry) <= entry.context]
    if not entries:
        raise PlanError(
            "no catalogued model has a context as long as the longest row; shorten it, or drop it with "
            "--set data.too_long=drop --set data.max_length=N"
        )
    # Generations of a family are listed oldest first; of two models of one size the newer wins.
    ranked = sorted(reversed(entries), key=lambda entry: (-entry.parameters, not entry.instruct))
    smallest: tuple[CatalogueEntry, Plan] | None = None
    larger: str | None = None
    for entry in ranked:
        plan = plan_of(entry)
        if not plan.fits:
            larger = f"{entry.id} would need {format_bytes(plan.memory.peak_bytes)}"
            continue
        smallest = (entry, plan)
        budget = TIME_BUDGET_SECONDS[plan.preset.value]
        if plan.time.total_seconds <= budget:
            size = format_count(entry.parameters)
            reason = f"the largest open model ({size} parameters) that fits {format_bytes(plan.memory.free_bytes)}"
            reason += f" and trains within {format_seconds(budget)}, for {plan.preset.value}"
            return entry, Choice(entry.id, f"{reason}; {larger}" if larger else reason, "derived")
        larger = f"{entry.id} would take about {format_seconds(plan.time.total_seconds)}"
    if smallest is None:
        raise PlanError(
            f"no catalogued model fits this machine ({larger}). Free memory, or name a smaller model with --model"
        )
    entry, plan = smallest
    took = format_seconds(plan.time.total_seconds)
    return entry, Choice(entry.id, f"the smallest open model that fits; it will take about {took} here", "derived")
