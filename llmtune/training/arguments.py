"""From a plan to ``TrainingArguments``; what the loop does itself is switched off there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from llmtune.config import RunConfig
from llmtune.planning import Plan
from llmtune.registry import SCHEDULES, resolve_trackers


def greater_is_better(config: RunConfig) -> bool:
    """Direction of ``evaluate.metric``: as set, else smaller for losses and perplexity, greater for all else."""
    if config.evaluate.greater_is_better is not None:
        return config.evaluate.greater_is_better
    return not config.evaluate.metric.endswith(("loss", "perplexity"))


def metric_key(config: RunConfig) -> str:
    """``evaluate.metric`` as evaluations name it: with the prefix ``eval_``."""
    name = config.evaluate.metric
    return name if name.startswith("eval_") else f"eval_{name}"


def training_arguments(
    plan: Plan, config: RunConfig, *, checkpoints: Path, evaluates: bool, resumes: bool
) -> TrainingArguments:
    """The Trainer's settings for this plan.

    ``gradient_accumulation_steps`` stays 1 (one item is one update), rotation is off (a callback cleans up), NaN is
    never filtered from the logs, and ``auto_find_batch_size`` is never used: it restarts a half-trained model.
    """
    precision, on_cpu = plan.precision.value, plan.device.value == "cpu"
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_train_epochs=plan.epochs.value,
        max_steps=plan.updates.value,
        learning_rate=plan.learning_rate.value,
        lr_scheduler_type=plan.schedule.value,
        lr_scheduler_kwargs=_schedule_arguments(plan, config),
        warmup_steps=plan.warmup_updates.value,
        weight_decay=plan.weight_decay.value,
        max_grad_norm=plan.max_grad_norm.value,
        optim=plan.optimizer.value,
        bf16=plan.autocast and precision == "bf16",
        fp16=plan.autocast and precision == "fp16",
        # `tf32_products` decides; left out here, transformers turns it on for what torch compiles.
        tf32=False,
        **_checkpointing(plan),
        torch_compile=plan.compile.value,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and plan.processes.value > 1 else None,
        ddp_find_unused_parameters=False if plan.processes.value > 1 else None,
        # The same on all ranks; one that runs out of memory in its first forward pass would broadcast them alone.
        ddp_broadcast_buffers=False if plan.processes.value > 1 else None,
        dataloader_num_workers=plan.num_workers.value,
        dataloader_pin_memory=plan.pin_memory.value,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=plan.evaluate_every_steps.value if evaluates else None,
        eval_on_start=evaluates and config.evaluate.base and not resumes,
        save_strategy="steps",
        save_steps=plan.save_every_steps.value,
        save_total_limit=None,
        metric_for_best_model=metric_key(config),
        greater_is_better=greater_is_better(config),
        restore_callback_states_from_checkpoint=False,
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",
        report_to=list(resolve_trackers(config.monitor.report_to)) or "none",
        disable_tqdm=True,
        seed=plan.seed.value,
        data_seed=plan.seed.value,
    )


def optimizer_arguments(plan: Plan) -> dict[str, Any]:
    """Return the keyword arguments of the optimizer's class, without learning rate and weight decay."""
    return dict(plan.optimizer_arguments.value)


def _schedule_arguments(plan: Plan, config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of the schedule; a schedule that uses evaluations gets the metric's direction."""
    arguments = dict(plan.schedule_arguments.value)
    if SCHEDULES[plan.schedule.value].needs_evaluation:
        arguments["mode"] = "max" if greater_is_better(config) else "min"
    return arguments


def _checkpointing(plan: Plan) -> dict[str, Any]:
    """Which layers are recomputed in the backward pass, and where what they start from waits.

    Without reentrance, so that inputs need no gradient and hooks of DDP see each parameter once.
    """
    # transformers 5.23 calls activation checkpointing what was gradient checkpointing before; 5.17 knows the same keys.
    name = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
    if not plan.activation_checkpointing.value:
        return {f"{name}_checkpointing": False}
    how = {
        "use_reentrant": False,
        "every_n_layers": plan.checkpoint_every.value,
        "offload": plan.activation_offload.value,
    }
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": how}
