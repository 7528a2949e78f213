"""From facts to a plan. Read ``make_plan`` first; each choice has a small function below it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from llmtune.config import RunConfig
from llmtune.data import DataStats
from llmtune.errors import ConfigError, DataError, did_you_mean
from llmtune.hardware import DeviceChoice, Hardware
from llmtune.models import ModelSpec
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.memory import Footprint, MemoryEstimate, predict_memory
from llmtune.planning.plan import Plan
from llmtune.planning.timing import flops_per_token, matrix_rate, predict_time
from llmtune.presets import Level, Preset, dataset_size

T = TypeVar("T")

# Padded tokens per forward pass. CPU: 768–1,024 was fastest on 0.1–1B models on two AMX cores; one GPU is bound by
# kernel launches below 16k tokens at 1B.
TOKEN_BUDGET = {"cpu": 1024, "accelerator": 16384}
# A run should have at least this many updates where the data allow it; below, the schedule has no room to act.
WANTED_UPDATES = 100
GLOBAL_BATCH_SIZES = (64, 32, 16, 8)
# Best learning rate of LoRA over that of full fine-tuning (Schulman et al., LoRA Without Regret, 2025).
FULL_LEARNING_RATE_DIVISOR = 10
# Evaluation has no backward pass: a third of the arithmetic of a training token.
EVALUATION_COST = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The facts a plan is made from.

    Attributes:
        eval_rows: Rows of the evaluation set, 0 when there is none.
        processes: Ranks of the launch.
        model_choice: How the model was chosen.
    """

    config: RunConfig
    hardware: Hardware
    device: DeviceChoice
    spec: ModelSpec
    preset: Preset
    stats: DataStats
    eval_rows: int
    processes: int
    model_choice: Choice[str]


def make_plan(request: PlanRequest) -> Plan:
    """Decide everything about one run.

    The first feasible candidate wins, in the order of what it costs: a smaller token budget, then activation
    checkpointing, then 4-bit base weights. When none fits, the plan of the last candidate is returned with
    ``fits=False``; the caller decides whether that is an error.

    Raises:
        ConfigError: A value that only the plan can judge, such as an unknown schedule or optimizer.
        DataError: The longest row does not fit the model's context.
    """
    _validate_names(request.config)
    candidates = [_assemble(request, candidate) for candidate in _candidates(request)]
    return next((plan for plan in candidates if plan.fits), candidates[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    method: Choice[str]
    checkpointing: Choice[bool]
    token_budget: Choice[int]


def _candidates(request: PlanRequest) -> Iterator[_Candidate]:
    """Ways to run, cheapest in time first; what the user fixed stays fixed."""
    config = request.config.train
    longest = _max_length(request).value
    methods: list[Choice[str]] = [
        Choice("lora", "fits in memory with unquantised base weights, which train fastest", "derived"),
        Choice("qlora", "lora with unquantised base weights does not fit; 4-bit base weights do", "derived"),
    ]
    if config.method is not None:
        methods = [Choice(config.method, "you set train.method", "user")]
    for method in methods:
        for checkpointing in _checkpointing_options(request):
            for budget in _budgets(request, longest):
                yield _Candidate(method=method, checkpointing=checkpointing, token_budget=budget)


def _checkpointing_options(request: PlanRequest) -> list[Choice[bool]]:
    asked = request.config.train.activation_checkpointing
    if asked is not None:
        return [Choice(asked, "you set train.activation_checkpointing", "user")]
    return [
        Choice(False, "activations fit in memory, and recomputing them costs about a third more time", "derived"),
        Choice(True, "activations do not fit in memory; they are recomputed in the backward pass", "derived"),
    ]


def _budgets(request: PlanRequest, longest: int) -> list[Choice[int]]:
    asked = request.config.train.token_budget
    if asked is not None:
        return [Choice(asked, "you set train.token_budget", "user")]
    kind = "cpu" if request.device.type == "cpu" else "accelerator"
    full = TOKEN_BUDGET[kind]
    where = "this CPU" if kind == "cpu" else "this accelerator"
    options = [Choice(max(full, longest), f"fills {where} without waiting on overhead; no row is longer", "derived")]
    budget = full // 2
    while budget > longest:
        options.append(Choice(budget, "the largest power-of-two share of the usual budget that fits memory", "derived"))
        budget //= 2
    if longest < full:
        options.append(Choice(longest, "one longest row at a time is all that fits memory", "derived"))
    return options


def _assemble(request: PlanRequest, candidate: _Candidate) -> Plan:
    config, stats, spec = request.config, request.stats, request.spec
    size = dataset_size(stats.rows)
    level = request.preset.level(config.train.preset, size)
    adapter = _Adapter.of(request, level)
    precision = _precision(request)
    quantization = _quantization(config, candidate.method.value)
    batch, epochs, updates = _schedule_length(request, level)
    per_epoch = math.ceil(stats.rows / batch.value)
    budget = candidate.token_budget
    rows_per_pass = _micro_batch_size(request, budget.value, batch.value)
    passes = _passes(request, budget.value, rows_per_pass.value, batch.value)
    evaluate_every = _every(
        config.evaluate.every_steps, "evaluate.every_steps", per_epoch, level.evals_per_epoch, updates
    )
    footprint = Footprint(
        method=candidate.method.value,
        quantization=quantization.value,
        precision=precision.value,
        rank=adapter.rank.value,
        targets=adapter.targets.value,
        tokens=min(budget.value, rows_per_pass.value * _max_length(request).value),
        checkpointing=candidate.checkpointing.value,
    )
    memory = _memory(request, footprint)
    tokens_per_update = stats.tokens / max(stats.rows, 1) * batch.value / request.processes
    trainable = spec.adapter_parameters(footprint.rank, footprint.targets)
    flops = tokens_per_update * flops_per_token(
        spec, method=footprint.method, adapter_parameters=trainable, length=stats.tokens / max(stats.rows, 1)
    )
    evaluations = updates.value / evaluate_every.value + 1
    trained_rows = max(1, updates.value * batch.value)
    time = predict_time(
        flops_per_update=flops * (4 / 3 if footprint.checkpointing else 1),
        rate=matrix_rate(request.hardware, request.device.type, precision.value),
        micro_batches=passes.value,
        layers=spec.shape.layers,
        updates=updates.value,
        evaluation_share=EVALUATION_COST * evaluations * request.eval_rows / trained_rows,
    )
    return Plan(
        model=request.model_choice,
        preset=_preset_choice(request),
        data_size=Choice(size, f"{stats.rows:,} training rows", "derived"),
        method=candidate.method,
        quantization=quantization,
        precision=precision,
        device=Choice(
            str(request.device), request.device.reason, "user" if config.train.device != "auto" else "derived"
        ),
        processes=Choice(request.processes, "ranks of this launch", "derived"),
        max_length=_max_length(request),
        epochs=epochs,
        updates=updates,
        global_batch_size=batch,
        token_budget=budget,
        micro_batch_size=rows_per_pass,
        accumulation=passes,
        activation_checkpointing=candidate.checkpointing,
        attention=Choice("sdpa", "exact, and picks the fastest kernel for this device by itself", "default"),
        optimizer=_optimizer(config),
        learning_rate=_learning_rate(request, level, candidate.method.value),
        schedule=asked_or(config.train.schedule, "train.schedule", _of(level, "schedule", request)),
        warmup_updates=_warmup(request, level, updates.value),
        weight_decay=asked_or(config.train.weight_decay, "train.weight_decay", _of(level, "weight_decay", request)),
        max_grad_norm=_default(config.train.max_grad_norm, 1.0, "train.max_grad_norm", "the Trainer's own default"),
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        evaluate_every_steps=evaluate_every,
        save_every_steps=_every(config.save.every_steps, "save.every_steps", per_epoch, level.saves_per_epoch, updates),
        keep_checkpoints=_default(config.save.keep, 3, "save.keep", "newest ones to fall back on, besides the best"),
        patience=_patience(config, request.eval_rows),
        num_workers=asked_or(
            config.train.num_workers,
            "train.num_workers",
            Choice(0, "rows are memory-mapped and already tokenised", "derived"),
        ),
        seed=_default(config.train.seed, 42, "train.seed", "fixed, so that the same command gives the same result"),
        memory=memory,
        time=time,
        disk_bytes=_disk_bytes(trainable if footprint.method != "full" else spec.parameters, config.save.keep),
        fits=memory.fits,
        notices=_notices(request),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    rank: Choice[int]
    alpha: Choice[int]
    dropout: Choice[float]
    targets: Choice[tuple[str, ...]]

    @classmethod
    def of(cls, request: PlanRequest, level: Level) -> _Adapter:
        asked = request.config.adapter
        rank = asked_or(asked.rank, "adapter.rank", _of(level, "rank", request))
        alpha = _of(level, "alpha", request)
        if asked.rank is not None and asked.alpha is None:
            ratio = level.alpha / level.rank
            alpha = Choice(
                max(1, round(asked.rank * ratio)), f"keeps the preset's ratio of {ratio:g} to your rank", "derived"
            )
        targets = request.preset.lora_targets
        found = {module.name for module in request.spec.linears}
        if request.spec.known_from == "config" and "all-linear" not in targets and not found & set(targets):
            chosen: Choice[tuple[str, ...]] = Choice(
                ("all-linear",), "none of the preset's module names occur in this model", "derived"
            )
        else:
            chosen = Choice(tuple(targets), f"the {request.preset.family} preset", "preset")
        return cls(
            rank=rank,
            alpha=asked_or(asked.alpha, "adapter.alpha", alpha),
            dropout=asked_or(asked.dropout, "adapter.dropout", _of(level, "dropout", request)),
            targets=asked_or(tuple(asked.targets) if asked.targets else None, "adapter.targets", chosen),
        )


def _of(level: Level, name: str, request: PlanRequest) -> Choice:  # type: ignore[type-arg]
    """A number of the preset, with the source the preset gives for it."""
    train = request.config.train
    where = f"{request.preset.family} preset, {train.preset}, {dataset_size(request.stats.rows)} data"
    return Choice(getattr(level, name), f"{where}: {level.sources[name]}", "preset")


def _default(value: T, default: T, key: str, reason: str) -> Choice[T]:
    return Choice(value, reason, "default") if value == default else Choice(value, f"you set {key}", "user")


def _preset_choice(request: PlanRequest) -> Choice[str]:
    goal = request.config.train.preset
    return Choice(goal, f"of the {request.preset.family} family", "default" if goal == "quality" else "user")


def _max_length(request: PlanRequest) -> Choice[int]:
    asked, stats, context = request.config.data.max_length, request.stats, request.spec.context
    if asked is not None and asked > context:
        raise ConfigError("data.max_length", [f"got {asked}, but the context of {request.spec.id} is {context} tokens"])
    if asked is None and not stats.estimated and stats.length_max > context:
        raise DataError(
            f"the longest row has {stats.length_max:,} tokens, but the context of {request.spec.id} is {context:,}. "
            "Shorten it, pick a model with a longer context, or pass --set data.too_long=drop"
        )
    longest = Choice(min(stats.length_max, context), "the longest row; nothing is cut", "derived")
    return asked_or(asked, "data.max_length", longest)


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


def _quantization(config: RunConfig, method: str) -> Choice[str | None]:
    if method != "qlora":
        return Choice(None, f"{method} keeps the base weights as they are", "derived")
    return _default(config.adapter.quantization, "nf4", "adapter.quantization", "4-bit NormalFloat (arXiv:2305.14314)")


def _schedule_length(request: PlanRequest, level: Level) -> tuple[Choice[int], Choice[float], Choice[int]]:
    """Global batch size, epochs and number of updates; they depend on each other."""
    train, rows = request.config.train, request.stats.rows
    epochs = asked_or(train.epochs, "train.epochs", _of(level, "epochs", request))
    size = next(
        (b for b in GLOBAL_BATCH_SIZES if math.ceil(rows / b) * epochs.value >= WANTED_UPDATES), GLOBAL_BATCH_SIZES[-1]
    )
    size = max(1, min(size, rows))
    sizes = ", ".join(map(str, reversed(GLOBAL_BATCH_SIZES)))
    reason = f"the largest of {sizes} that leaves {WANTED_UPDATES} updates or more"
    batch = asked_or(train.global_batch_size, "train.global_batch_size", Choice(size, reason, "derived"))
    per_epoch = math.ceil(rows / batch.value)
    total = max(1, math.ceil(per_epoch * epochs.value))
    count = f"{rows:,} rows / {batch.value} per update × {epochs.value:g} epochs"
    if train.max_steps is not None:
        return batch, epochs, Choice(train.max_steps, "you set train.max_steps", "user")
    return batch, epochs, Choice(total, count, "derived")


def _micro_batch_size(request: PlanRequest, budget: int, batch: int) -> Choice[int]:
    per_rank = max(1, math.ceil(batch / request.processes))
    median = max(1, request.stats.length_p50)
    rows = max(1, min(per_rank, budget // median))
    derived = Choice(
        rows, f"{budget:,} tokens hold {budget // median or 1} rows of the median {median} tokens", "derived"
    )
    return asked_or(request.config.train.micro_batch_size, "train.micro_batch_size", derived)


def _passes(request: PlanRequest, budget: int, rows_per_pass: int, batch: int) -> Choice[int]:
    per_rank = max(1, math.ceil(batch / request.processes))
    mean = request.stats.tokens / max(request.stats.rows, 1)
    passes = max(math.ceil(per_rank / rows_per_pass), math.ceil(per_rank * mean / budget), 1)
    return Choice(
        passes, f"micro-batches that make up {per_rank} rows per process; the global batch stays exact", "derived"
    )


def _learning_rate(request: PlanRequest, level: Level, method: str) -> Choice[float]:
    preset: Choice[float] = _of(level, "learning_rate", request)
    if method == "full":
        reason = (
            "a tenth of the preset's, which is for adapters: full fine-tuning does best there (LoRA Without Regret)"
        )
        preset = Choice(preset.value / FULL_LEARNING_RATE_DIVISOR, reason, "derived")
    return asked_or(request.config.train.learning_rate, "train.learning_rate", preset)


def _warmup(request: PlanRequest, level: Level, updates: int) -> Choice[int]:
    asked = request.config.train.warmup_ratio
    ratio = level.warmup_ratio if asked is None else asked
    reason = "you set train.warmup_ratio" if asked is not None else f"preset: {level.sources['warmup_ratio']}"
    return Choice(
        round(ratio * updates), f"{ratio:.0%} of {updates} updates; {reason}", "user" if asked is not None else "preset"
    )


def _every(asked: int | None, key: str, per_epoch: int, per_epoch_wanted: float, updates: Choice[int]) -> Choice[int]:
    steps = max(1, min(round(per_epoch / per_epoch_wanted), updates.value))
    return asked_or(
        asked, key, Choice(steps, f"preset: {per_epoch_wanted:g} times per epoch of {per_epoch} updates", "preset")
    )


def _patience(config: RunConfig, eval_rows: int) -> Choice[int | None]:
    if config.evaluate.patience is not None:
        return Choice(config.evaluate.patience, "you set evaluate.patience", "user")
    if eval_rows == 0:
        return Choice(None, "there is nothing to evaluate on", "derived")
    if config.train.preset == "highspeed":
        return Choice(None, "a highspeed run is short; it always runs to its end", "derived")
    return Choice(3, f"stop when {config.evaluate.metric} has not improved in three evaluations", "default")


def _optimizer(config: RunConfig) -> Choice[str]:
    return asked_or(
        config.train.optimizer,
        "train.optimizer",
        Choice("adamw_torch_fused", "AdamW in one kernel per step", "default"),
    )


def _memory(request: PlanRequest, footprint: Footprint) -> MemoryEstimate:
    device = request.device
    return predict_memory(
        request.spec, footprint, device=str(device), total_bytes=device.total_bytes, free_bytes=device.free_bytes
    )


def _disk_bytes(trainable: int, keep: int) -> int:
    """Weights and Adam's two moments in fp32 for each checkpoint (newest, best, the one being written); the result."""
    return (keep + 2) * 12 * trainable + 4 * trainable


def _notices(request: PlanRequest) -> tuple[str, ...]:
    notices = []
    if request.preset.notice:
        notices.append(request.preset.notice)
    if request.stats.estimated:
        notices.append("Token counts are estimated from bytes: the model's tokenizer has not been downloaded.")
    if request.eval_rows == 0:
        notices.append("No rows are held out, so there is no evaluation, no best checkpoint and no early stopping.")
    return tuple(notices)


def _validate_names(config: RunConfig) -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    problems = []
    schedules = {str(kind.value) for kind in SchedulerType}
    optimizers = {str(kind.value) for kind in OptimizerNames}
    if config.train.schedule is not None and config.train.schedule not in schedules:
        problems.append(
            f"train.schedule: got '{config.train.schedule}'{did_you_mean(config.train.schedule, schedules)}"
        )
    if config.train.optimizer is not None and config.train.optimizer not in optimizers:
        problems.append(
            f"train.optimizer: got '{config.train.optimizer}'{did_you_mean(config.train.optimizer, optimizers)}"
        )
    if problems:
        raise ConfigError("configuration", problems)


def variants(request: PlanRequest) -> list[tuple[str, Plan]]:
    """Ready flags and the plan each would give, for the message of a plan that does not fit; only what fits."""
    found = []
    train, data = request.config.train, request.config.data
    if train.method != "qlora":
        asked = request.config.model_copy(update={"train": train.model_copy(update={"method": "qlora"})})
        found.append(("--method qlora", make_plan(replace(request, config=asked))))
    if train.activation_checkpointing is False:
        asked = request.config.model_copy(update={"train": train.model_copy(update={"activation_checkpointing": None})})
        found.append(("--set train.activation_checkpointing=true", make_plan(replace(request, config=asked))))
    if train.token_budget is not None:
        asked = request.config.model_copy(update={"train": train.model_copy(update={"token_budget": None})})
        found.append(("without train.token_budget", make_plan(replace(request, config=asked))))
    for share in (2, 4, 8):
        length = _max_length(request).value // share
        if length >= 128:
            asked = request.config.model_copy(update={"data": data.model_copy(update={"max_length": length})})
            found.append(
                (f"--set data.max_length={length} --set data.too_long=drop", make_plan(replace(request, config=asked)))
            )
    return [(flags, plan) for flags, plan in found if plan.fits]
