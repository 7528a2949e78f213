"""One training job from loaded model to saved result: watchers and guards attached, the loop run, the best kept."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmtune import collector
from llmtune.checkpoints import newest_verified, replace_directory, step_of, sweep_leftovers
from llmtune.checkpoints.listing import CheckpointInfo
from llmtune.config import RunConfig
from llmtune.console import speaker
from llmtune.data import EncodedDataset
from llmtune.errors import ConfigError, Preempted
from llmtune.evaluation import Metric, prompts_of
from llmtune.planning import Plan, PlanRequest
from llmtune.runs import RunDirectory
from llmtune.training.answers import Answers, attach_metrics, base_answers, tell_samples
from llmtune.training.arguments import greater_is_better, metric_key, optimizer_arguments, training_arguments
from llmtune.training.comparison import BaseComparison
from llmtune.training.continuity import Continuity, Cursor, find_best, has_ended
from llmtune.training.divergence import DivergenceGuard
from llmtune.training.guards import (
    CheckpointCleanup,
    EarlyStopping,
    PreemptionGuard,
    StopSignal,
    early_stop_notice,
)
from llmtune.training.meter import MemoryMeter
from llmtune.training.numerics import NumberGuard
from llmtune.training.probe import BeforeFirstUpdate
from llmtune.training.ranks import Ranks
from llmtune.training.recoveries import Recoveries
from llmtune.training.recovery import Budgets
from llmtune.training.rewind import go_back, skipped_so_far
from llmtune.training.rollback import RollBack
from llmtune.training.saving import unreadable
from llmtune.training.trainer import LoopSettings, UpdateTrainer
from llmtune.training.watchdog import Watchdog
from llmtune.training.watchers import EventLog, ProgressDisplay, Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """Everything a training needs; nothing here is decided any more.

    Attributes:
        model: Base model with adapter, or the whole model to tune.
        checkpoint_facts: Identity of the run for the manifests.
        callbacks: The user's own.
        metrics: The user's own measures of generated answers, by name.
        request: What the plan was made from, to plan again after the probe; None where nothing is probed.
        leaked: Numbers of the evaluation rows that are also trained on: no verdict rests on them.
    """

    plan: Plan
    config: RunConfig
    run: RunDirectory
    ranks: Ranks
    model: Any
    tokenizer: Any
    train_data: EncodedDataset
    eval_data: EncodedDataset | None
    checkpoint_facts: Mapping[str, Any]
    callbacks: Sequence[TrainerCallback]
    metrics: Mapping[str, Metric]
    request: PlanRequest | None
    leaked: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """What came out.

    Attributes:
        steps: Updates done.
        metrics: ``train_loss``; with evaluation data ``eval_loss``, ``perplexity``, ``base_eval_loss`` and the user's.
        best_step: Step whose weights were saved as the result; None without evaluation data.
    """

    steps: int
    metrics: Mapping[str, float]
    best_step: int | None


def run_training(job: TrainingJob, resume_from: Path | None) -> TrainingOutcome:
    """Train, keep the best, answer the sample prompts, save the result.

    Raises:
        ConfigError: Packing, with positions that are not those of the rows alone; a metric of the user's fails.
        PlanError: The probe shows that memory does not hold one row.
        LlmtuneError: A rehearsal before step 1 failed, see `rehearse`.
        Preempted: A signal came; the run was saved at the end of its step.
    """
    if job.plan.packing.value:
        require_own_positions(job.model.config, int(job.train_data.lengths.max()))
    stop = StopSignal()
    trainer = _trainer(job, stop, resume_from)
    guard = PreemptionGuard(stop if job.ranks.size == 1 else lambda: trainer.stop_agreed)
    watchdog = Watchdog(job.run, seconds=job.config.recover.hang_seconds, rank=job.ranks.rank)
    _add_guards(job, trainer, guard, watchdog)
    _add_watchers(job, trainer)
    for callback in job.callbacks:
        trainer.add_callback(callback)
    evaluates = job.eval_data is not None
    answers = Answers(job, trainer)
    if job.metrics and evaluates:
        attach_metrics(job, trainer, answers)
    prompts = prompts_of(job.eval_data, job.tokenizer, job.config.evaluate.num_samples) if job.eval_data else []
    base = base_answers(job, answers, prompts)
    with stop.listening(), watchdog, collector.training():
        _train(job, trainer, resume_from)
    if guard.stopped and trainer.state.global_step < trainer.state.max_steps:
        reason = f"stopped by {stop.received or 'a signal to another rank'} after step {trainer.state.global_step}"
        raise Preempted(reason)
    best = trainer.restore_best() if evaluates else None
    metrics = {"train_loss": _mean_loss(trainer.state.log_history)}
    if evaluates:
        metrics |= _final_metrics(trainer.state.log_history, best)
    tell_samples(job, answers, prompts, base, trainer.state.global_step if best is None else best)
    _save_final(job, trainer)
    return TrainingOutcome(steps=trainer.state.global_step, metrics=metrics, best_step=best)


def _train(job: TrainingJob, trainer: UpdateTrainer, start: Path | None) -> None:
    """The loop around the loop: a run that is rolled back goes on in this process, from where that led."""
    updates, patience = job.plan.updates.value, job.plan.patience.value
    trainer.skipped |= job.ranks.from_main(skipped_so_far(job.run) if job.ranks.is_main else set())
    while True:
        if start is not None and has_ended(start, updates=updates, patience=patience):
            trainer.take_up(start)
            find_best(trainer.state, job.run.checkpoints)
            speaker.say(f"after {start.name} nothing is left to do")
            return
        try:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            return
        except RollBack as back:
            start = go_back(job, trainer, back)


def require_own_positions(config: Any, longest: int) -> None:
    """Refuse packing where the rotary frequencies of a row depend on the longest row beside it.

    Raises:
        ConfigError: ``longrope`` (Phi-3 with 128k context) and rows on both sides of its switch to long frequencies.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and switch is not None and longest > switch:
        problem = (
            f"train.packing: got true, but the longest row has {longest:,} tokens, and above {switch:,} this model "
            "changes the rotary frequencies of all rows of a sequence; leave it out, rows are padded"
        )
        raise ConfigError("configuration", [problem])


def find_checkpoint(run: RunDirectory) -> Path | None:
    """The newest checkpoint that verifies; what was rejected is an event and a warning. The caller holds the lock.

    Raises:
        CheckpointError: Checkpoints exist and none verifies.
    """

    def rejected(info: CheckpointInfo) -> None:
        run.event("checkpoint_rejected", info.step, path=info.path.name, reason=info.reason)
        speaker.warn(f"{info.path.name} is not used: {info.reason}")

    sweep_leftovers(run.checkpoints)
    return newest_verified(run.checkpoints, rejected, unreadable)


def _trainer(job: TrainingJob, stop: StopSignal, resume_from: Path | None) -> UpdateTrainer:
    plan, config, run = job.plan, job.config, job.run
    resumes, step = resume_from is not None, 0 if resume_from is None else step_of(resume_from)
    budgets = Budgets(skips=config.recover.skip_budget, rollbacks=config.recover.rollback_budget)
    evaluates = job.eval_data is not None
    settings = LoopSettings(
        global_batch_size=plan.global_batch_size.value,
        token_budget=plan.token_budget.value,
        micro_batch_size=plan.micro_batch_size.value,
        packing=plan.packing.value,
        pad_multiple=plan.pad_multiple.value,
        pass_overhead_tokens=plan.pass_overhead_tokens.value,
        checkpoint_facts=job.checkpoint_facts,
        stop_requested=stop,
        recoveries=Recoveries(run, plan, ranks=job.ranks, budgets=budgets, step=step),
        memory_guard=config.recover.memory_guard,
        asynchronous=config.save.asynchronous,
        compress_optimizer=config.save.compress_optimizer,
        optimizer_arguments=optimizer_arguments(plan),
    )
    arguments = training_arguments(plan, config, checkpoints=run.checkpoints, evaluates=evaluates, resumes=resumes)
    trainer = UpdateTrainer(
        model=job.model,
        args=arguments,
        train_data=job.train_data,
        eval_data=job.eval_data,
        tokenizer=job.tokenizer,
        callbacks=[],
        settings=settings,
        ranks=job.ranks,
    )
    return trainer


def _add_guards(job: TrainingJob, trainer: UpdateTrainer, guard: PreemptionGuard, watchdog: Watchdog) -> None:
    """Those that restore, refuse, decide or stop; what a checkpoint keeps is brought back before any other is told."""
    plan, config, run = job.plan, job.config, job.run
    trainer.add_first_callback(
        Continuity(
            cursor=lambda updates: Cursor.after(
                updates,
                parts=job.train_data.parts,
                seed=trainer.args.seed,
                global_batch_size=plan.global_batch_size.value,
            ),
            callbacks=lambda: trainer.callback_handler.callbacks,
            control=lambda: trainer.control,
            preempted=lambda: guard.stopped,
        )
    )
    trainer.numbers = NumberGuard(
        trainer=trainer,
        recoveries=trainer.recoveries,
        checkpoints=run.checkpoints,
        ranks=job.ranks,
        spike_threshold=config.recover.spike_threshold,
    )
    trainer.add_callback(trainer.numbers)
    trainer.add_callback(watchdog)
    trainer.add_callback(guard)
    if job.eval_data is None:
        return
    trainer.add_callback(DivergenceGuard(trainer.recoveries))
    if plan.patience.value is not None:
        trainer.add_callback(
            EarlyStopping(
                metric=metric_key(config),
                greater_is_better=greater_is_better(config),
                patience=plan.patience.value,
                min_delta=config.evaluate.min_delta,
                on_stop=early_stop_notice(run) if job.ranks.is_main else lambda step, reason: None,
            )
        )


def _add_watchers(job: TrainingJob, trainer: UpdateTrainer) -> None:
    """The probe of a new run, the account, and what clears away old checkpoints once that has told of the new one."""
    meter = MemoryMeter(trainer.args.device, job.plan.memory.terms.get("context", 0))
    if job.request is not None and trainer.is_deepspeed_enabled:
        speaker.say("probe: none under DeepSpeed, whose engine keeps the gradients of a pass")
    elif job.request is not None:
        trainer.add_first_callback(BeforeFirstUpdate(job, trainer, job.request, meter))
    if job.ranks.is_main:
        comparison = BaseComparison(job.run, 0 if job.eval_data is None else len(job.eval_data), job.leaked)
        events = EventLog(job.run, trainer, meter.peak_of_tensors, comparison)
        trainer.add_callback(Watcher(events, ProgressDisplay(trainer, meter.peak_of_tensors)))
        trainer.add_callback(CheckpointCleanup(job.run, job.plan.keep_checkpoints.value))


def _mean_loss(history: list[dict[str, Any]]) -> float:
    """Mean loss over all updates of the run that counted, those before an interruption included."""
    losses = [entry["loss"] for entry in history if math.isfinite(entry.get("loss", math.nan))]
    return float(sum(losses) / len(losses)) if losses else math.nan


def _final_metrics(history: list[dict[str, Any]], best: int | None) -> dict[str, float]:
    evaluations = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    metrics: dict[str, float] = {}
    if 0 in evaluations:
        metrics["base_eval_loss"] = evaluations[0]["eval_loss"]
        metrics |= {f"base_{name}": value for name, value in _by_name(evaluations[0]).items()}
    trained = {step: entry for step, entry in evaluations.items() if step > 0}
    if trained:
        entry = trained.get(best if best is not None else max(trained), trained[max(trained)])
        metrics |= {"eval_loss": entry["eval_loss"]} | _by_name(entry)
    return metrics


def _by_name(evaluation: Mapping[str, float]) -> dict[str, float]:
    """Perplexity and the user's metrics of one evaluation, without the Trainer's prefix."""
    named = {key.removeprefix("eval_"): value for key, value in evaluation.items() if key.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in ("loss", "tokens")}


def _save_final(job: TrainingJob, trainer: UpdateTrainer) -> None:
    target = job.run.model if job.plan.method.value == "full" else job.run.adapter
    staged = job.ranks.from_main(target.parent / f".staging-{target.name}-{uuid.uuid4().hex[:8]}")
    trainer.save_final(staged)
    job.ranks.wait()
    if job.ranks.is_main:
        replace_directory(staged, target)


__all__ = ["TrainingJob", "TrainingOutcome", "find_checkpoint", "run_training"]
