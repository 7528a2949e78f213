"""What only the planner can judge: values that contradict the model, the machine or each other. All of it at once."""

from __future__ import annotations

from llmtune.errors import ConfigError, DataError, did_you_mean
from llmtune.planning.request import PlanRequest
from llmtune.presets import SCHEDULES

# Modules beside the decoder's linear layers that an adapter may sit on.
BESIDE_LAYERS = ("lm_head", "embed_tokens")


def check_request(request: PlanRequest) -> None:
    """Refuse what cannot be done.

    Raises:
        ConfigError: Values that cannot be used with this model or machine.
        DataError: The longest row does not fit the model's context.
    """
    problems = [*_name_problems(request), *_machine_problems(request), *_target_problems(request)]
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


def _name_problems(request: PlanRequest) -> list[str]:
    train, problems = request.config.train, []
    if train.schedule is not None and train.schedule not in SCHEDULES:
        problems.append(f"train.schedule: got '{train.schedule}'{did_you_mean(train.schedule, SCHEDULES)}")
    if train.schedule == "constant" and train.warmup_ratio:
        problems.append(
            f"train.warmup_ratio: got {train.warmup_ratio:g}, but the schedule 'constant' has no warm-up; "
            "expected train.schedule=constant_with_warmup"
        )
    if train.optimizer is not None:
        from transformers.training_args import OptimizerNames

        known = {str(kind.value) for kind in OptimizerNames}
        if train.optimizer not in known:
            problems.append(f"train.optimizer: got '{train.optimizer}'{did_you_mean(train.optimizer, known)}")
    return problems


def _machine_problems(request: PlanRequest) -> list[str]:
    precision, device = request.config.train.precision, request.device
    if device.type == "cpu":
        return ["train.precision: got fp16, but a CPU trains in bf16 or fp32"] if precision == "fp16" else []
    accelerator = next((a for a in request.hardware.accelerators if a.index == device.index), None)
    if accelerator is not None and precision in ("bf16", "fp16") and not getattr(accelerator, precision):
        usable = [name for name in ("bf16", "fp16") if getattr(accelerator, name)]
        return [f"train.precision: got {precision}, but {accelerator.name} has {' and '.join([*usable, 'fp32'])}"]
    return []


def _target_problems(request: PlanRequest) -> list[str]:
    targets, spec = request.config.adapter.targets, request.spec
    known = [module.name for module in spec.linears]
    return [
        f"adapter.targets: {spec.id} has no linear module '{target}'{did_you_mean(target, ['all-linear', *known])}"
        for target in targets or ()
        if target != "all-linear" and target not in BESIDE_LAYERS and not spec.targeted((target,))
    ]
