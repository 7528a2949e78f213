"""From facts to a plan. Read ``make_plan`` first; the choices are made in the modules beside this one."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from llmtune.planning import reasons
from llmtune.planning.adapter import memorises
from llmtune.planning.arguments import choose_optimizer_arguments
from llmtune.planning.batching import choose_batches
from llmtune.planning.cadence import CadenceChoices, Costs, choose_cadence
from llmtune.planning.checks import check_request
from llmtune.planning.choice import Choice
from llmtune.planning.correction import NO_CORRECTION
from llmtune.planning.execution import choose_execution
from llmtune.planning.footprints import time_of, trainable_parameters, workload_of
from llmtune.planning.nearest import nearest_plans
from llmtune.planning.notices import notices_of
from llmtune.planning.plan import Plan
from llmtune.planning.request import PlanRequest
from llmtune.planning.schedule import LengthChoices, choose_length, choose_steps
from llmtune.planning.timing import TimeEstimate
from llmtune.planning.ways import Candidate, Search, search_ways


def make_plan(request: PlanRequest, *, alternatives: bool = True) -> Plan:
    """Decide everything about one run.

    Every way to run that the user leaves open is tried: base weights quantised or not, layers recomputed or not,
    smaller and smaller forward passes, and smaller optimizers where memory asks for them. Of those that fit memory the
    one predicted to be fastest wins. When none fits, the plan that needs the least memory is returned with
    ``fits=False``; the caller decides whether that is an error.

    Args:
        request: The facts.
        alternatives: Whether to say what other amounts of memory would lead to, and, where this plan does not fit,
            which near ones do. Without, it takes a fraction of the time.

    Raises:
        ConfigError: Values that only the plan can judge, such as an unknown schedule or optimizer; all at once.
        DataError: The longest row does not fit the model's context.
    """
    check_request(request)
    plan = _decide(request, alternatives=alternatives)
    if not alternatives:
        return plan
    plan = replace(plan, notices=notices_of(request, plan, _decide))
    if plan.fits:
        return plan
    return replace(plan, closest=tuple(near for near, _ in nearest_plans(request, _decide)))


def variants(request: PlanRequest) -> list[tuple[str, Plan]]:
    """Flags and plan of the nearest ways out that fit, the cheapest first."""
    return [(near.flags, plan) for near, plan in nearest_plans(request, _decide)]


def _decide(request: PlanRequest, *, alternatives: bool = False) -> Plan:
    """The plan itself, without what is said beside it; and without what would change it, unless ``alternatives``."""
    length = choose_length(request)
    updates, batch = length.updates.value, length.global_batch_size.value
    search = search_ways(request, length)
    best, memory = search.best, search.memory(search.best)
    trainable = trainable_parameters(request, best.footprint)
    save_bytes = _save_bytes(trainable, best.way.optimizer)
    cadence = _cadence(request, length, best, trainable, save_bytes)
    time = _time(request, best, updates, cadence, save_bytes)
    execution = choose_execution(
        request,
        best.load,
        rows=request.share(batch),
        step_seconds=time.step_seconds,
        updates=updates,
        quantized=best.footprint.quantization is not None,
    )
    way = reasons.explain(request, search, uncorrected=_uncorrected(request, length), alternatives=alternatives)
    choices = _subject(request)
    for part in (
        way,
        length,
        choose_batches(request, best.load, batch),
        best.precision,
        best.adapter,
        choose_steps(request, best.way.method, length, cadence.patience.value, best.adapter),
        cadence,
        execution,
    ):
        choices |= {field.name: getattr(part, field.name) for field in fields(part)}
    return Plan(
        **choices,
        optimizer_arguments=choose_optimizer_arguments(request, best.way.optimizer),
        seed=request.setting("train.seed", "fixed, so that the same command gives the same result"),
        memory=memory,
        time=time,
        disk_bytes=(request.config.save.keep + 2) * save_bytes + 4 * trainable,
        disk_free_bytes=request.hardware.disk_free_bytes,
        download=request.download,
        fits=memory.fits,
        closest=(),
        notices=(),
    )


def _subject(request: PlanRequest) -> dict[str, Any]:
    """What is trained on what and where, before anything is decided about how."""
    config, device = request.config, request.device
    return {
        "model": request.model_choice,
        "preset": request.setting("train.preset", f"of the {request.preset.family} family"),
        "data_size": Choice(request.size, f"{request.stats.rows:,} training rows", "derived"),
        "device": Choice(str(device), device.reason, "user" if config.train.device != "auto" else "derived"),
        "processes": Choice(request.processes, "ranks of this launch", "derived"),
        "sharding": Choice(request.sharding, _why_sharding(request), "derived"),
        "max_length": _max_length(request),
    }


def _why_sharding(request: PlanRequest) -> str:
    if request.processes == 1:
        return "one process has the whole model"
    return "as this launch spreads the model over its ranks" if request.sharding else "each rank has the whole model"


def _max_length(request: PlanRequest) -> Choice[int]:
    asked, stats, context = request.config.data.max_length, request.stats, request.spec.context
    if asked is not None:
        return Choice(asked, "you set data.max_length", "user")
    if stats.length_max > context:
        return Choice(context, "the model's context; a row is estimated to be longer", "derived")
    return Choice(
        max(1, stats.length_max), "the longest row; nothing is cut", "derived", "less with --set data.max_length=N"
    )


def _cadence(
    request: PlanRequest, length: LengthChoices, best: Candidate, trainable: int, save_bytes: int
) -> CadenceChoices:
    """Evaluations and saves, from what one of each takes."""
    updates = length.updates.value
    one = workload_of(request, best.load, updates, evaluations=1, saves=1, save_bytes=save_bytes)
    time = time_of(request, best.footprint, replace(one, result_bytes=0))
    costs = Costs(
        step=time.step_seconds, evaluation=time.terms.get("evaluation", 0.0), save=time.terms.get("saving", 0.0)
    )
    return choose_cadence(
        request,
        costs,
        per_epoch=math.ceil(request.rows / length.global_batch_size.value),
        updates=updates,
        memorises=memorises(request, trainable, length.epochs.value),
    )


def _time(
    request: PlanRequest, best: Candidate, updates: int, cadence: CadenceChoices, save_bytes: int
) -> TimeEstimate:
    """Seconds of the whole run; each evaluated state may be the best so far, and is saved then."""
    judged, saved = cadence.evaluate_every_steps.value, cadence.save_every_steps.value
    evaluations = updates // judged if request.eval_rows else 0
    both = updates // math.lcm(judged, saved) if request.eval_rows else 0
    saves = updates // saved + evaluations - both + 1
    base = bool(request.eval_rows and request.config.evaluate.base)
    run = workload_of(request, best.load, updates, evaluations=evaluations + base, saves=saves, save_bytes=save_bytes)
    return time_of(request, best.footprint, run)


def _save_bytes(trainable: int, optimizer: str) -> int:
    """One checkpoint: the trained weights in fp32 and the optimizer's two moments."""
    return (4 + (2 if "8bit" in optimizer else 8)) * trainable


def _uncorrected(request: PlanRequest, length: LengthChoices) -> Search | None:
    """What the formulas alone would have led to; None where nothing corrects them."""
    if request.correction.basis == "none":
        return None
    return search_ways(replace(request, correction=NO_CORRECTION), length)
