"""Lowers the learning rate when evaluations get worse one after the other, or stand still at a constant rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from llmtune.training.recoveries import Recoveries
from llmtune.training.recovery import Failure
from llmtune.training.rollback import scale_learning_rate

DIVERGES = "loss rises from evaluation to evaluation"
STANDS_STILL = "the evaluation loss stands still at a constant learning rate"
# Evaluations in a row; after one of them it may be chance.
IN_A_ROW = 2
# By so much, relatively, the evaluation loss has to be above its best to diverge (an estimate).
MARGIN = 0.05
# Evaluations that differ by less, relatively, are the same (an estimate).
SAME = 0.001
# Schedules that lower nothing by themselves.
CONSTANT = ("constant", "constant_with_warmup")


class DivergenceGuard(TrainerCallback, ExportableState):
    """Compares evaluations, and the training losses between them: both rise where training diverges.

    Where only the evaluation loss rises the model learns its rows by heart, which early stopping ends.

    Args:
        recoveries: Decides what to do about it, and tells.
    """

    def __init__(self, recoveries: Recoveries) -> None:
        self._recoveries = recoveries
        self.seen: dict[str, Any] = {"best": None, "evaluation": None, "training": None, "rises": 0, "still": 0}
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {}, "attributes": {"seen": self.seen, "losses": self.losses}}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take in the loss of an update."""
        if logs and math.isfinite(logs.get("loss", math.nan)):
            self.losses.append(logs["loss"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare with what was seen before; lower the learning rate where the trend is wrong."""
        loss = (metrics or {}).get("eval_loss", math.nan)
        if not math.isfinite(loss) or (state.global_step > 0 and not self.losses):
            return
        cause = self._trend(loss, median(self.losses) if self.losses else None, args)
        self.losses = []
        if cause is None:
            return
        failure = Failure(
            kind="divergence",
            cause=cause,
            step=state.global_step,
            evidence={"evaluation_loss": loss, "best": self.seen["best"], "evaluations": IN_A_ROW},
            remedy="Lower --set train.learning_rate, or stop earlier: --set evaluate.patience=2.",
        )
        remedy = self._recoveries.decide(failure)
        if remedy.action == "lower_learning_rate":  # else it is tried no more, and early stopping ends the run
            factor = float(remedy.changes["learning_rate_factor"])
            scale_learning_rate(kwargs["optimizer"], kwargs["lr_scheduler"], factor)
            self._recoveries.took(failure, remedy, remedy.changes)
        self.seen |= {"rises": 0, "still": 0}

    def _trend(self, loss: float, training: float | None, args: TrainingArguments) -> str | None:
        before = dict(self.seen)
        known = before["evaluation"] is not None and before["training"] is not None and training is not None
        rises = known and loss > before["evaluation"] * (1 + SAME) and training > before["training"] * (1 + SAME)
        better = before["best"] is None or loss < before["best"] * (1 - SAME)
        still = before["best"] is not None and abs(loss / before["best"] - 1) <= SAME
        self.seen = {
            "best": loss if before["best"] is None else min(loss, before["best"]),
            "evaluation": loss,
            "training": training,
            "rises": before["rises"] + 1 if rises else 0,
            "still": before["still"] + 1 if still and not better else 0,
        }
        if self.seen["rises"] >= IN_A_ROW and loss > self.seen["best"] * (1 + MARGIN):
            return DIVERGES
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        return STANDS_STILL if self.seen["still"] >= IN_A_ROW and schedule in CONSTANT else None
