"""Going back to an earlier checkpoint, and lowering the learning rate: what is raised, and how it is chosen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoints import list_checkpoints
from llmtune.checkpoints.listing import CheckpointInfo

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from torch.optim.optimizer import Optimizer

# Updates with trouble that are no further apart than this are one window; it is skipped as a whole (an estimate).
SAME_WINDOW = 16


class RollBack(Exception):
    """Raised out of the loop: training goes on from ``checkpoint``, in the same process.

    Args:
        reason: Why, in one sentence.
        checkpoint: Verified and healthy.
        learning_rate_factor: What the learning rate is multiplied by.
        skip: Updates, counted from 0, whose rows are not learned from.
    """

    def __init__(self, reason: str, *, checkpoint: Path, learning_rate_factor: float, skip: range) -> None:
        super().__init__(reason)
        self.checkpoint, self.learning_rate_factor, self.skip = checkpoint, learning_rate_factor, skip


def window_of(trouble: Iterable[int], step: int) -> range:
    """The updates that trouble of one kind, which ends at ``step``, spans.

    Args:
        trouble: Updates that had it so far, counted from 0, in any order.
        step: The one that has it now.
    """
    first = step
    for earlier in sorted((one for one in trouble if one < step), reverse=True):
        if first - earlier > SAME_WINDOW:
            break
        first = earlier
    return range(first, step + 1)


def newest_healthy(checkpoints: Path, *, upto: int) -> CheckpointInfo | None:
    """The newest healthy verified checkpoint of at most ``upto`` updates; None where there is none."""
    infos = list_checkpoints(checkpoints)
    return next((info for info in infos if info.healthy and info.step <= upto), None)


def scale_learning_rate(optimizer: Optimizer, scheduler: LRScheduler, factor: float) -> None:
    """Multiply the learning rate of this and all later updates; checkpoints keep it with optimizer and schedule."""
    if hasattr(scheduler, "base_lrs"):  # schedules that go by what they see have none
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * factor
