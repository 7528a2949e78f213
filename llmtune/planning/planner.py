"""From facts to a plan. Read ``make_plan`` first; the choices are made in the modules beside this one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmtune.planning import batching, schedule
from llmtune.planning.adapter import choose_adapter
from llmtune.planning.checks import check_request
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.planning.plan import Plan
from llmtune.planning.request import PlanRequest
from llmtune.planning.timing import TimeEstimate, Workload, predict_time


def make_plan(request: PlanRequest) -> Plan:
    """Decide everything about one run.

    Every way to run that the user leaves open is tried: with and without quantised base weights, with and without
    activation checkpointing, with smaller and smaller forward passes. Of those that fit memory the one predicted to be
    fastest wins. When none fits, the plan that needs the least memory is returned with ``fits=False``; the caller
    decides whether that is an error.

    Raises:
        ConfigError: Values that only the plan can judge, such as an unknown schedule or optimizer; all at once.
        DataError: The longest row does not fit the model's context.
    """
    plan = _best(request)
    if plan.fits:
        return plan
    return replace(plan, closest=tuple((flags, near.memory.peak_bytes) for flags, near in variants(request)))


def _best(request: PlanRequest) -> Plan:
    check_request(request)
    batching.require_packable(request)
    plans = [_assemble(request, way) for way in _ways(request)]
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return min(fitting, key=lambda plan: plan.time.total_seconds)
    return min(plans, key=lambda plan: plan.memory.peak_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    method: str
    checkpointing: bool
    token_budget: int


def _ways(request: PlanRequest) -> Iterator[_Way]:
    """Ways to run, the plainest first; what the user fixed stays fixed."""
    train = request.config.train
    for method in ["lora", "qlora"] if train.method is None else [train.method]:
        asked = train.activation_checkpointing
        for checkpointing in [False, True] if asked is None else [asked]:
            for budget in batching.token_budgets(request):
                yield _Way(method=method, checkpointing=checkpointing, token_budget=budget)


def _assemble(request: PlanRequest, way: _Way) -> Plan:
    config, spec = request.config, request.spec
    adapter = choose_adapter(request, way.method)
    precision = _precision(request)
    quantization = _quantization(request, way.method)
    batch, epochs, updates = schedule.schedule_length(request)
    per_epoch = math.ceil(request.rows / batch.value)
    rows_per_pass = batching.micro_batch_size(request, way.token_budget, batch.value)
    passes = batching.accumulation(request, way.token_budget, rows_per_pass.value, batch.value)
    evaluate_every = schedule.every(request, "evaluate.every_steps", "evals_per_epoch", per_epoch, updates.value)
    trainable = spec.parameters
    if way.method != "full":
        trainable = spec.adapter_parameters(adapter.rank.value, adapter.targets.value)
    packing = batching.packing(request, way.token_budget)
    tokens = batching.most_tokens(request, way.token_budget, rows_per_pass.value, batch.value)
    optimizer = asked_or(
        config.train.optimizer,
        "train.optimizer",
        Choice("adamw_torch_fused", "AdamW in one kernel per step", "default"),
    )
    footprint = Footprint(
        method=way.method,
        quantization=quantization.value,
        precision=precision.value,
        rank=adapter.rank.value,
        targets=adapter.targets.value,
        dropout=adapter.dropout.value,
        tokens=tokens,
        width=tokens if packing.value else min(tokens, request.longest),
        packed=packing.value,
        checkpoint_every=int(way.checkpointing),
        offload=False,
        optimizer=optimizer.value,
        sharding=request.sharding,
        processes=request.processes,
    )
    memory = _memory(request, footprint, packing=packing.value)
    workload = Workload(
        tokens_per_update=request.mean_length * batch.value / request.processes,
        # A packed sequence is masked, not cut: every token attends over the whole of it.
        length=footprint.tokens if packing.value else request.mean_length,
        micro_batches=passes.value,
        updates=updates.value,
        evaluated_tokens=_evaluations(request, evaluate_every.value, updates.value) * _eval_tokens(request),
    )
    rate_schedule = asked_or(config.train.schedule, "train.schedule", request.of_preset("schedule"))
    return Plan(
        model=request.model_choice,
        preset=request.setting("train.preset", f"of the {request.preset.family} family"),
        data_size=Choice(request.size, f"{request.stats.rows:,} training rows", "derived"),
        method=_method(request, way.method, fits=memory.fits),
        quantization=quantization,
        precision=precision,
        device=Choice(
            str(request.device), request.device.reason, "user" if config.train.device != "auto" else "derived"
        ),
        processes=Choice(request.processes, "ranks of this launch", "derived"),
        sharding=Choice(request.sharding, "as this launch spreads the model over its ranks", "derived"),
        max_length=_max_length(request),
        epochs=epochs,
        updates=updates,
        global_batch_size=batch,
        token_budget=batching.token_budget(request, way.token_budget, fits=memory.fits),
        micro_batch_size=rows_per_pass,
        packing=packing,
        pad_multiple=batching.pad_multiple(request),
        pass_overhead_tokens=batching.pass_overhead_tokens(request),
        accumulation=passes,
        activation_checkpointing=_checkpointing(request, way.checkpointing, fits=memory.fits),
        checkpoint_every=Choice(int(way.checkpointing), "every layer, where any is recomputed", "derived"),
        activation_offload=Choice(False, "what recomputed layers start from is small beside the rest", "derived"),
        attention=Choice("sdpa", "exact, and picks the fastest kernel for this device by itself", "default"),
        compile=Choice(False, "shapes differ from pass to pass, and each would be compiled anew", "default"),
        optimizer=optimizer,
        learning_rate=schedule.learning_rate(request, way.method),
        schedule=rate_schedule,
        warmup_updates=schedule.warmup(request, rate_schedule.value, updates.value),
        weight_decay=asked_or(config.train.weight_decay, "train.weight_decay", request.of_preset("weight_decay")),
        max_grad_norm=request.setting("train.max_grad_norm", "the Trainer's own default"),
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        evaluate_every_steps=evaluate_every,
        save_every_steps=schedule.every(request, "save.every_steps", "saves_per_epoch", per_epoch, updates.value),
        keep_checkpoints=request.setting("save.keep", "newest ones to fall back on, besides the best"),
        patience=schedule.patience(request),
        threads=batching.threads(request),
        num_workers=asked_or(
            config.train.num_workers,
            "train.num_workers",
            Choice(0, "rows are memory-mapped and already tokenised", "derived"),
        ),
        pin_memory=Choice(
            request.device.type == "cuda", "page-locked memory lets a GPU fetch batches by itself", "derived"
        ),
        seed=request.setting("train.seed", "fixed, so that the same command gives the same result"),
        memory=memory,
        time=_time(request, footprint, trainable, workload),
        disk_bytes=_disk_bytes(trainable, config.save.keep),
        disk_free_bytes=request.hardware.disk_free_bytes,
        fits=memory.fits,
        closest=(),
        notices=_notices(request, way.method),
    )


def _method(request: PlanRequest, method: str, *, fits: bool) -> Choice[str]:
    if request.config.train.method is not None:
        return Choice(method, "you set train.method", "user")
    if not fits:
        return Choice(method, "takes the least memory, and still does not fit", "derived")
    if method == "lora":
        return Choice(method, "fits in memory with unquantised base weights, the fastest way", "derived")
    return Choice(method, "with quantised base weights: the fastest way that fits in memory", "derived")


def _checkpointing(request: PlanRequest, checkpointing: bool, *, fits: bool) -> Choice[bool]:
    if request.config.train.activation_checkpointing is not None:
        return Choice(checkpointing, "you set train.activation_checkpointing", "user")
    if not fits:
        reason = (
            "recomputing activations takes less memory" if checkpointing else "activations are not what is too large"
        )
    elif checkpointing:
        reason = "the fastest way that fits in memory, though recomputing activations costs about a third more time"
    else:
        reason = "activations fit in memory, and recomputing them would cost about a third more time"
    return Choice(checkpointing, reason, "derived")


def _max_length(request: PlanRequest) -> Choice[int]:
    stats, context = request.stats, request.spec.context
    if stats.length_max > context:
        longest = Choice(context, "the model's context; a row is estimated to be longer", "derived")
    else:
        longest = Choice(max(1, stats.length_max), "the longest row; nothing is cut", "derived")
    return asked_or(request.config.data.max_length, "data.max_length", longest)


def _precision(request: PlanRequest) -> Choice[str]:
    asked = request.config.train.precision
    if asked is not None:
        return Choice(asked, "you set train.precision", "user")
    if request.device.type == "cpu":
        cpu = request.hardware.cpu
        if cpu.amx or cpu.avx512_bf16:
            unit = "AMX" if cpu.amx else "AVX512-BF16"
            return Choice("bf16", f"this CPU multiplies bf16 matrices in hardware ({unit})", "derived")
        return Choice("fp32", "this CPU has no bf16 matrix unit", "derived")
    device = next(a for a in request.hardware.accelerators if a.index == request.device.index)
    if device.bf16:
        return Choice("bf16", f"{device.name} computes in bf16, which needs no loss scaling", "derived")
    if device.fp16:
        return Choice("fp16", f"{device.name} has fp16 but no bf16; the loss is scaled dynamically", "derived")
    return Choice("fp32", f"{device.name} has neither bf16 nor fp16 matrix units", "derived")


def _quantization(request: PlanRequest, method: str) -> Choice[str | None]:
    if method != "qlora":
        return Choice(None, f"{method} keeps the base weights as they are", "derived")
    return request.setting("adapter.quantization", "4-bit NormalFloat (arXiv:2305.14314)")


def _memory(request: PlanRequest, footprint: Footprint, *, packing: bool) -> MemoryEstimate:
    """Prediction for one process; processes on a CPU share its memory."""
    device = request.device
    sharing = request.processes if device.type == "cpu" else 1
    memory = predict_memory(
        request.spec,
        footprint,
        device=str(device),
        total_bytes=device.total_bytes,
        free_bytes=device.free_bytes // sharing,
    )
    if not packing:
        return memory
    masks = batching.packing_mask_bytes(request, footprint)
    return replace(
        memory,
        terms={**memory.terms, "packing masks": masks},
        tensor_peak_bytes=memory.tensor_peak_bytes + masks,
        peak_bytes=memory.peak_bytes + masks,
    )


def _time(request: PlanRequest, footprint: Footprint, trainable: int, workload: Workload) -> TimeEstimate:
    return predict_time(
        request.spec,
        footprint,
        workload,
        trainable_parameters=trainable,
        hardware=request.hardware,
        device=request.device,
        processes=request.processes,
    )


def _evaluations(request: PlanRequest, interval: int, updates: int) -> int:
    return updates // interval + request.config.evaluate.base


def _eval_tokens(request: PlanRequest) -> float:
    return request.eval_rows * request.mean_length / request.processes


def _disk_bytes(trainable: int, keep: int) -> int:
    """Weights and Adam's two moments in fp32 for each checkpoint (newest, best, the one being written); the result."""
    return (keep + 2) * 12 * trainable + 4 * trainable


def _notices(request: PlanRequest, method: str) -> tuple[str, ...]:
    notices = []
    if request.preset.notice:
        notices.append(request.preset.notice)
    if request.stats.estimated:
        notices.append("Token counts are estimated from bytes: the model's tokenizer has not been downloaded.")
        if request.stats.length_max > request.spec.context:
            notices.append(
                f"The longest row has about {request.stats.length_max:,} tokens, more than the context of "
                f"{request.spec.context:,}: training would refuse it, or drop it with --set data.too_long=drop."
            )
    if request.eval_rows == 0:
        notices.append("No rows are held out, so there is no evaluation, no best checkpoint and no early stopping.")
    asked = request.config.adapter
    set_in_vain = [leaf for leaf in ("rank", "alpha", "dropout", "targets") if getattr(asked, leaf) is not None]
    if method == "full" and set_in_vain:
        notices.append(f"Full fine-tuning has no adapter: adapter.{', adapter.'.join(set_in_vain)} has no effect.")
    return tuple(notices)


def variants(request: PlanRequest) -> list[tuple[str, Plan]]:
    """Ready flags and the plan each would give, for the message of a plan that does not fit; only what fits."""
    train, stats = request.config.train, request.stats
    changes: list[dict[str, Any]] = []
    if train.method == "full":
        changes.append({"train.method": "lora"})
    if train.method not in ("qlora", None):
        changes.append({"train.method": "qlora"})
    if train.activation_checkpointing is False:
        changes.append({"train.activation_checkpointing": True})
    changes += [{f"train.{leaf}": None} for leaf in ("token_budget", "micro_batch_size") if getattr(train, leaf)]
    lengths = {length for length in (stats.length_p99, stats.length_p95, stats.length_p50) if 16 <= length}
    for length in sorted(lengths, reverse=True):
        if length < min(stats.length_max, _max_length(request).value):
            changes.append({"data.max_length": length, "data.too_long": "drop"})
    found = [(_flags(change), _best(replace(request, config=_changed(request, change)))) for change in changes]
    return [(flags, plan) for flags, plan in found if plan.fits]


def _changed(request: PlanRequest, changes: dict[str, Any]) -> Any:
    config = request.config
    for key, value in changes.items():
        group, leaf = key.split(".")
        config = config.model_copy(update={group: getattr(config, group).model_copy(update={leaf: value})})
    return config


def _flags(changes: dict[str, Any]) -> str:
    written = {None: "auto", True: "true"}
    return " ".join(
        f"--method {value}" if key == "train.method" else f"--set {key}={written.get(value, value)}"
        for key, value in changes.items()
    )
