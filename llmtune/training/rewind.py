"""A run that goes on from an earlier checkpoint than its newest: what is written down, put aside and changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoints import set_aside_after, step_of
from llmtune.console import speaker
from llmtune.planning import Choice, Plan
from llmtune.runs import RunDirectory
from llmtune.training.probe import BeforeFirstUpdate
from llmtune.training.recoveries import ROLL_BACK
from llmtune.training.rollback import RollBack
from llmtune.training.trainer import UpdateTrainer

if TYPE_CHECKING:
    from llmtune.training.train import TrainingJob


def go_back(job: TrainingJob, trainer: UpdateTrainer, back: RollBack) -> Path:
    """Prepare everything for training on from ``back.checkpoint``, and return it.

    The lowered learning rate is a new plan and the skipped window an event, so that a process that is killed before the
    next save goes on by them too.
    """
    step, recoveries = trainer.state.global_step, trainer.recoveries
    before = trainer.args.learning_rate
    rate = before * back.learning_rate_factor
    reason = f"{before:g} × {back.learning_rate_factor:g}: rolled back from step {step} to {back.checkpoint.name}"
    recoveries.plan = replace(recoveries.plan, learning_rate=Choice(rate, reason, "derived"))
    if job.ranks.is_main:
        leave_course(job.run, back.checkpoint, step)  # first: what is left there would be resumed
        _write_down(job.run, back, step, recoveries.plan)
    job.ranks.wait()
    trainer.args.learning_rate = rate
    trainer.args.eval_on_start = False
    trainer.skipped |= set(back.skip)
    trainer.remove_callback(BeforeFirstUpdate)  # it has measured this process already
    return back.checkpoint


def skipped_so_far(run: RunDirectory) -> set[int]:
    """Updates, counted from 0, that earlier rollbacks of this run have skipped for good."""
    recoveries = (event for event in run.events() if event["event"] == "recovery")
    gone = [range(*event["skip"]) for event in recoveries if event.get("action") == ROLL_BACK]
    return {step for window in gone for step in window}


def leave_course(run: RunDirectory, checkpoint: Path, at_step: int) -> None:
    """Put checkpoints newer than ``checkpoint`` aside: the run goes on from it, and not to where they lead."""
    for path in set_aside_after(run.checkpoints, step_of(checkpoint)):
        run.event("checkpoint_rejected", at_step, path=path.name, reason=f"the run went back to {checkpoint.name}")


def _write_down(run: RunDirectory, back: RollBack, step: int, plan: Plan) -> None:
    rate, target = plan.learning_rate.value, back.checkpoint.name
    facts = {"checkpoint": target, "learning_rate": rate, "skip": [back.skip.start, back.skip.stop]}
    file = run.add_plan(plan.to_json())
    run.event("recovery", step, action=ROLL_BACK, reason=str(back), file=file.name, **facts)
    skipped = f"updates {back.skip.start + 1} to {back.skip.stop} are skipped"
    speaker.warn(f"step {step + 1}: {back}; back to {target}, learning rate {rate:g}, {skipped}")
