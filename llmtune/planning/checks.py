"""What only the planner can judge: values that contradict the model, the machine or each other. All of it at once."""

from __future__ import annotations

from llmtune.config import RunConfig
from llmtune.errors import ConfigError, DataError, did_you_mean
from llmtune.planning.arguments import problems_of_arguments
from llmtune.planning.batching import packing_problem
from llmtune.planning.precision import accelerator_of
from llmtune.planning.request import PlanRequest
from llmtune.registry import OPTIMIZERS, SCHEDULES, tracker_problems

# Modules beside the decoder's linear layers that an adapter may sit on.
BESIDE_LAYERS = ("lm_head", "embed_tokens")


def check_request(request: PlanRequest) -> None:
    """Refuse what cannot be done.

    Raises:
        ConfigError: Values that cannot be used with this model or machine.
        DataError: The longest row does not fit the model's context.
    """
    problems = [
        *name_problems(request.config, request.device.type),
        *_evaluation_problems(request),
        *problems_of_arguments(request),
        *_machine_problems(request),
        *_checkpointing_problems(request),
        *packing_problem(request),
        *_target_problems(request),
    ]
    asked, stats, spec = request.config.data.max_length, request.stats, request.spec
    if asked is not None and asked > spec.context:
        problems.append(f"data.max_length: got {asked}, but the context of {spec.id} is {spec.context} tokens")
    if problems:
        raise ConfigError("configuration", problems)
    if asked is None and not stats.estimated and stats.length_max > spec.context:
        raise DataError(
            f"the longest row has {stats.length_max:,} tokens, but the context of {spec.id} is {spec.context:,}. "
            "Shorten it, pick a model with a longer context, or pass --set data.too_long=drop"
        )


def name_problems(config: RunConfig, device: str) -> list[str]:
    """Return one sentence for each schedule, optimizer or tracker that a run could not use.

    Args:
        config: What was asked.
        device: Type of the device that trains, such as ``cuda``.
    """
    train, problems = config.train, []
    if train.schedule is not None and train.schedule not in SCHEDULES:
        problems.append(f"train.schedule: got '{train.schedule}'{did_you_mean(train.schedule, SCHEDULES)}")
    elif train.schedule is not None and not SCHEDULES[train.schedule].has_warmup and train.warmup_ratio:
        expected = "train.schedule=constant_with_warmup" if train.schedule == "constant" else "train.warmup_ratio=0"
        problems.append(
            f"train.warmup_ratio: got {train.warmup_ratio:g}, but the schedule '{train.schedule}' has no warm-up; "
            f"expected {expected}"
        )
    if train.optimizer is not None and train.optimizer not in OPTIMIZERS:
        problems.append(f"train.optimizer: got '{train.optimizer}'{did_you_mean(train.optimizer, OPTIMIZERS)}")
    elif train.optimizer is not None and (problem := OPTIMIZERS[train.optimizer].problem(device)) is not None:
        problems.append(f"train.optimizer: got '{train.optimizer}', {problem}")
    return [*problems, *tracker_problems(config.monitor.report_to)]


def _evaluation_problems(request: PlanRequest) -> list[str]:
    asked = request.config.train.schedule
    described = SCHEDULES.get(asked) if asked is not None else None
    if described is None or (problem := described.problem(request.eval_rows)) is None:
        return []
    return [f"train.schedule: got '{asked}', {problem}"]


def _checkpointing_problems(request: PlanRequest) -> list[str]:
    train, problems = request.config.train, []
    if train.activation_checkpointing is False:
        problems += [
            f"train.{leaf}: got {shown}, but train.activation_checkpointing=false recomputes no layer; leave one out"
            for leaf, shown in (("checkpoint_every", train.checkpoint_every), ("activation_offload", "true"))
            if getattr(train, leaf)
        ]
    if train.activation_offload and request.device.type not in ("cuda", "xpu"):
        problems.append(
            f"train.activation_offload: got true, but there is no memory beside that of the {request.device.type} to "
            "move to; leave it out"
        )
    return problems


def _machine_problems(request: PlanRequest) -> list[str]:
    return [*_precision_problems(request), *_compiler_problems(request)]


def _compiler_problems(request: PlanRequest) -> list[str]:
    if request.config.train.compile and not request.hardware.can_compile:
        return ["train.compile: got true, but what torch.compile calls is not installed; llmtune doctor says what"]
    return []


def _precision_problems(request: PlanRequest) -> list[str]:
    precision, accelerator = request.config.train.precision, accelerator_of(request)
    if request.device.type == "cpu":
        wrong = precision in ("fp16", "tf32")
        return [f"train.precision: got {precision}, but a CPU trains in bf16 or fp32"] if wrong else []
    if accelerator is None or precision is None or precision in accelerator.precisions:
        return []
    return [f"train.precision: got {precision}, but {accelerator.name} has {', '.join(accelerator.precisions)}"]


def _target_problems(request: PlanRequest) -> list[str]:
    targets, spec = request.config.adapter.targets, request.spec
    known = [module.name for module in spec.linears]
    return [
        f"adapter.targets: {spec.id} has no linear module '{target}'{did_you_mean(target, ['all-linear', *known])}"
        for target in targets or ()
        if target != "all-linear" and target not in BESIDE_LAYERS and not spec.targeted((target,))
    ]
