"""From a plan and what the probe measured to the plan that is trained by.

The global batch never changes: where memory is short, the same rows go through the model in smaller passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtune.errors import PlanError
from llmtune.planning.choice import Choice
from llmtune.planning.correction import Correction
from llmtune.planning.measurement import Measurement, Pass
from llmtune.planning.memory import USABLE_SHARE, MemoryEstimate
from llmtune.planning.plan import Plan
from llmtune.planning.planner import variants
from llmtune.planning.request import PlanRequest
from llmtune.planning.timing import RANGE, TimeEstimate
from llmtune.units import format_bytes

# Terms of a prediction that are in memory before the first pass, those that came and went while the model was loaded,
# and those that come after a pass; what remains is the pass, or the optimizer's step where that is the fuller moment.
THERE_BEFORE = frozenset({"weights", "adapter", "interpreter", "context"})
OVER_BEFORE = frozenset({"loading"})
AFTER_A_PASS = frozenset({"optimizer", "evaluation", "save snapshot", "kernels"})
# Share of the memory left that a smaller pass is cut for: what a pass takes is not quite proportional to its tokens.
CAREFUL_SHARE = 0.95


def budget_after(plan: Plan, *, longest: int, base_bytes: int, passes: Sequence[Pass]) -> int | None:
    """The token budget that memory holds, as far as one or two passes tell; None where not even one row fits.

    Args:
        plan: The plan in force.
        longest: Padded tokens of the longest row.
        base_bytes: What is there before a pass: interpreter, weights, adapter, gradients.
        passes: The largest one that the plan's budget allows, and what came after it.
    """
    last, is_first, room = passes[-1], len(passes) == 1, _room(plan, base_bytes)
    if not last.ran_out and max(last.peak_bytes, base_bytes) <= base_bytes + room:
        return last.token_budget
    if last.worst and last.token_budget <= longest:
        return None
    if last.ran_out:  # how much was missing is not known
        return max(longest, _whole(plan, last.tokens / 2)) if is_first or not last.worst else longest
    per_token = (last.peak_bytes - base_bytes) / last.tokens
    first = passes[0]
    if not is_first and not first.ran_out and first.tokens > last.tokens and first.peak_bytes > last.peak_bytes:
        per_token = (first.peak_bytes - last.peak_bytes) / (first.tokens - last.tokens)
    too_much = last.peak_bytes - base_bytes - CAREFUL_SHARE * room
    # A pass that took nothing that could be seen is no help in reckoning with: one row has to show it.
    smaller = _whole(plan, last.tokens - too_much / per_token) if per_token > 0 and too_much > 0 else 0
    if is_first or smaller >= longest:
        return max(smaller, longest)
    one_row = last.peak_bytes - base_bytes - per_token * (last.tokens - longest)
    return longest if max(one_row, 0) <= room else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """What the formulas say, uncorrected, for a measurement to be compared with; see `Measurement`."""

    grown_bytes: int
    pass_bytes: int
    step_seconds: float


def formula_of(plan: Plan, applied: Correction) -> Formula:
    """What ``plan`` was predicted to take before ``applied`` mended it."""
    grown = sum(size for name, size in plan.memory.terms.items() if name not in THERE_BEFORE)
    in_pass = plan.memory.pass_bytes + plan.memory.terms.get("allocator", 0)
    return Formula(
        grown_bytes=round(grown / applied.memory),
        pass_bytes=round(in_pass / applied.memory),
        step_seconds=plan.time.step_seconds / applied.seconds,
    )


def replan(request: PlanRequest, plan: Plan, measured: Measurement) -> Plan:
    """The plan to train by: budget, memory and time as measured, all else as it was.

    Raises:
        PlanError: Not even one row at a time fits; names what it takes and the nearest plans that fit.
    """
    base = measured.loaded_bytes + measured.gradient_bytes
    longest = measured.longest_tokens
    budget = budget_after(plan, longest=longest, base_bytes=base, passes=measured.passes)
    if budget is None:
        raise PlanError(_refusal(request, plan, measured))
    changed: dict[str, Any] = {}
    if budget != plan.token_budget.value:
        changed["token_budget"] = Choice(budget, _why_smaller(plan, measured, budget), "measured")
        passes = max(1, math.ceil(measured.update_passes))
        reason = f"{passes} instead of {plan.accumulation.value} passes of an update, on average; the batch stays exact"
        if passes != plan.accumulation.value:
            changed["accumulation"] = Choice(passes, reason, "measured")
    memory = _memory(plan, measured, budget)
    return replace(plan, **changed, memory=memory, time=_time(request, plan, measured), fits=True, measured=measured)


def _whole(plan: Plan, tokens: float) -> int:
    """Rounded down to what the tokens of passes are multiples of."""
    multiple: int = plan.pad_multiple.value
    return max(0, int(tokens)) // multiple * multiple


def _to_come(plan: Plan) -> dict[str, int]:
    return {name: size for name, size in plan.memory.terms.items() if name in AFTER_A_PASS}


def _room(plan: Plan, base_bytes: int) -> int:
    """Bytes that a pass may take; negative where what is there before it is too much."""
    return int(plan.memory.free_bytes * USABLE_SHARE) - base_bytes - sum(_to_come(plan).values())


def _pass_bytes(plan: Plan, measured: Measurement, budget: int) -> int:
    """What the largest pass of this budget takes beside what is there before it.

    On a CPU at least what is predicted: the heap of the C library grows over many passes, and the probe makes two.
    """
    base = measured.loaded_bytes + measured.gradient_bytes
    worst = [one for one in measured.passes if one.worst and not one.ran_out]
    exact = [one.peak_bytes - base for one in worst if one.token_budget == budget]
    found = exact or [round((one.peak_bytes - base) / one.tokens * budget) for one in worst]
    if plan.device.value == "cpu":
        others = THERE_BEFORE | OVER_BEFORE | AFTER_A_PASS
        predicted = sum(size for name, size in plan.memory.terms.items() if name not in others)
        found.append(round(predicted * min(1.0, budget / plan.token_budget.value)) - measured.gradient_bytes)
    return max(0, *found)


def _memory(plan: Plan, measured: Measurement, budget: int) -> MemoryEstimate:
    terms = {
        "loaded": measured.loaded_bytes,
        "gradients": measured.gradient_bytes,
        "forward and backward": _pass_bytes(plan, measured, budget),
        **_to_come(plan),
    }
    peak = sum(terms.values())
    beside = sum(size for name, size in plan.memory.terms.items() if name in ("interpreter", "context"))
    return replace(plan.memory, terms=terms, peak_bytes=peak, tensor_peak_bytes=max(0, peak - beside))


def _time(request: PlanRequest, plan: Plan, measured: Measurement) -> TimeEstimate:
    """The time of the whole run, reckoned from what its parts took."""
    step = measured.step_seconds
    if step is None:
        return plan.time
    updates = plan.updates.value
    terms = dict(plan.time.terms) | {
        "training": step * updates,
        "saving": measured.save_seconds * (updates // max(plan.save_every_steps.value, 1) + 1),
    }
    if measured.evaluation_seconds is not None:
        times = updates // max(plan.evaluate_every_steps.value, 1) + request.config.evaluate.base
        terms["evaluation"] = measured.evaluation_seconds * times
    total = sum(terms.values())
    low, high = RANGE["measured"]
    return TimeEstimate(
        step_seconds=step,
        total_seconds=total,
        low_seconds=low * total,
        high_seconds=high * total,
        terms=terms,
        basis="measured",
    )


def _why_smaller(plan: Plan, measured: Measurement, budget: int) -> str:
    """Both numbers: what was planned, and what is trained with."""
    usable = int(plan.memory.free_bytes * USABLE_SHARE) - sum(_to_come(plan).values())
    seen = []
    for one in measured.passes:
        if one.worst:
            took = "ran out of memory" if one.ran_out else f"took {format_bytes(one.peak_bytes)}"
            seen.append(f"{one.tokens:,} padded tokens {took}")
    confirmed = any(one.worst and one.token_budget == budget and not one.ran_out for one in measured.passes)
    doubt = "" if confirmed else f"; {budget:,} is reckoned from that"
    return (
        f"{budget:,} instead of {plan.token_budget.value:,}: {', '.join(seen)}, and {format_bytes(usable)} may be used"
        f"{doubt}"
    )


def _refusal(request: PlanRequest, plan: Plan, measured: Measurement) -> str:
    last = measured.passes[-1]
    needed = last.peak_bytes + sum(_to_come(plan).values())
    one_row = f"one row of {last.tokens:,} padded tokens" if last.rows == 1 else f"{last.tokens:,} padded tokens"
    memory = plan.memory
    terms = {
        "loaded": measured.loaded_bytes,
        "gradients": measured.gradient_bytes,
        "forward and backward": last.peak_bytes - measured.loaded_bytes - measured.gradient_bytes,
        **_to_come(plan),
    }
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items() if size > 0)
    what = "memory ran out at" if last.ran_out else "needs"
    near = _nearest(request, plan, measured, needed)
    ways_out = f"Closest that fit: {near}" if near else "Nothing near it fits; name a smaller model with --model"
    return (
        f"{one_row}, forward and backward: {what} {format_bytes(needed)}, {format_bytes(memory.free_bytes)} are free "
        f"on {memory.device} ({named}). {ways_out}."
    )


def _nearest(request: PlanRequest, plan: Plan, measured: Measurement, needed: int) -> str:
    """Flags and peak memory of other plans that fit, now that the formulas are known to be off here."""
    factor = max(1.0, measured.memory_factor)
    found = Correction(memory=factor, seconds=1.0, basis="probe", reason="measured in this run")
    train = request.config.train.model_copy(
        update={
            "method": plan.method.value,
            "activation_checkpointing": plan.activation_checkpointing.value,
            "token_budget": None,
            "micro_batch_size": None,
        }
    )
    pinned = replace(request, config=request.config.model_copy(update={"train": train}), correction=found)
    others = [(flags, other.memory.peak_bytes) for flags, other in variants(pinned)]
    return "; ".join(f"{flags} ({format_bytes(peak)})" for flags, peak in others if peak < needed)
