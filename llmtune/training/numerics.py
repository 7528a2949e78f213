"""Judges the numbers of every update before the optimizer sees them. It may drop the update, clip it, or go back.

A loss or gradient that is not finite never reaches the weights: the gradients become None, the step of the optimizer
does nothing, and count and schedule go on. One transfer of two numbers per update tells; without it the log would fetch
them a moment later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from llmtune.data import shard_rows
from llmtune.errors import RecoveryExhausted
from llmtune.training.diagnosis import Finding, diagnose, gradient_layer
from llmtune.training.ranks import Ranks
from llmtune.training.recoveries import Recoveries, briefly
from llmtune.training.recovery import Failure, FailureKind, Remedy
from llmtune.training.rollback import SAME_WINDOW, RollBack, newest_healthy, window_of
from llmtune.training.shortage import drop_gradients
from llmtune.training.spikes import Deviation, Spike, SpikeDetector
from llmtune.training.trainer import UpdateTrainer

# Causes: budgets are counted by them.
NON_FINITE = "loss or gradient is not finite"
COLLAPSED = "the loss scale of fp16 collapsed"
SPIKE = "spike of loss or gradient norm"
# The loss scale begins at 2 ** 16 and halves on every overflow: after so many in a row it is no search any more.
MOST_HALVINGS = 14
LEAST_SCALE = 1.0
# Rows whose file and line an incident names.
MOST_PLACES = 16
# Updates with trouble that are remembered, to tell where a window of it began.
REMEMBERED = 64

_REMEDIES: Mapping[str, str] = {
    NON_FINITE: "Look at the rows named; lower --set train.learning_rate, or use --set train.precision=fp32 or bf16.",
    COLLAPSED: "Use --set train.precision=bf16, or fp32 where the device has none, or lower --set train.learning_rate.",
    SPIKE: "Look at the rows named; lower --set train.learning_rate or --set train.max_grad_norm.",
}


class NumberGuard(TrainerCallback, ExportableState):
    """Every update passes here between backward pass and optimizer, on all ranks alike.

    Args:
        trainer: Whose updates are judged; it asks through ``UpdateTrainer.numbers``.
        recoveries: Decides what is done.
        checkpoints: Where a rollback leads to.
        spike_threshold: See ``recover.spike_threshold`` of the configuration.
    """

    def __init__(
        self,
        *,
        trainer: UpdateTrainer,
        recoveries: Recoveries,
        checkpoints: Path,
        ranks: Ranks,
        spike_threshold: float,
    ) -> None:
        self._trainer, self._recoveries, self._checkpoints, self._ranks = trainer, recoveries, checkpoints, ranks
        self._detector = SpikeDetector(threshold=spike_threshold, wait=recoveries.plan.warmup_updates.value)
        self._dropped: deque[int] = deque(maxlen=REMEMBERED)
        self._spiked: deque[int] = deque(maxlen=REMEMBERED)
        self._halvings = 0

    # ------------------------------------------------------------------ what a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, so that a resumed run decides as one that was never interrupted."""
        return {"args": {}, "attributes": {"recent": self.recent}}

    @property
    def recent(self) -> dict[str, Any]:
        """The recent past: usual values, updates that were dropped or spiked, halvings of the loss scale in a row."""
        return {
            "usual": self._detector.state(),
            "dropped": list(self._dropped),
            "spiked": list(self._spiked),
            "halvings": self._halvings,
        }

    @recent.setter
    def recent(self, kept: Mapping[str, Any]) -> None:
        self._detector.restore(kept["usual"])
        self._dropped = deque(kept["dropped"], maxlen=REMEMBERED)
        self._spiked = deque(kept["spiked"], maxlen=REMEMBERED)
        self._halvings = kept["halvings"]

    def is_open(self, step: int) -> bool:
        """Whether the weights after ``step`` updates are not known to be healthy.

        A dropped update leaves them as they are, so only the last one counts; a spike may show later what it has done.
        """
        return step - 1 in self._dropped or any(step - one <= SAME_WINDOW for one in self._spiked)

    # ------------------------------------------------------------------ one update

    def clip(self, model: torch.nn.Module, upstream: Callable[[torch.nn.Module], Any]) -> float:
        """Clip the gradients of one update, or drop them; returns their norm before that.

        Args:
            model: As the Trainer has wrapped it.
            upstream: The Trainer's own clipping, for models that are spread over ranks.

        Raises:
            RollBack: To go on from an earlier checkpoint.
            RecoveryExhausted: The budgets are spent.
        """
        trainer = self._trainer
        step, planned = trainer.state.global_step, trainer.args.max_grad_norm
        if step in trainer.skipped:
            self._pass_over(model)
            return math.nan
        trained: list[torch.nn.Parameter] = []
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer._has_mixed_mesh_grads(model)
        if sharded:  # their norms take all ranks, so that norm and clipping are one
            total = upstream(model)
        else:
            trainer.accelerator.unscale_gradients()
            trained = [p for p in model.parameters() if p.grad is not None]  # once: it walks through all modules
            total = get_total_norm([p.grad for p in trained if p.grad is not None])
        loss, norm = self._agreed(total)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._drop(model, step, loss, norm, layer=None if sharded else gradient_layer(trainer.model))
            return norm
        self._halvings = 0
        most = min(planned, self._usual(step, loss, norm))
        if not sharded:
            clip_grads_with_norm_(trained, most, total)
        elif most < min(planned, norm):
            _scale(model, most / min(planned, norm))
        return norm

    def _agreed(self, total: Any) -> tuple[float, float]:
        """Loss and gradient norm, the same on all ranks; one of them not finite on any rank is so on all."""
        trainer = self._trainer
        loss = trainer._tr_loss.detach().float()
        norm = torch.as_tensor(math.nan if total is None else total, dtype=torch.float32, device=loss.device)
        numbers = torch.stack([loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm])
        if self._ranks.size > 1:
            numbers = trainer.accelerator.reduce(numbers, "mean")
        loss_number, norm_number = numbers.tolist()
        return loss_number, norm_number

    def _pass_over(self, model: torch.nn.Module) -> None:
        """No gradients, so the optimizer does nothing; and no loss, which the log says."""
        self._trainer._tr_loss.fill_(math.nan)
        scaler = self._trainer.accelerator.scaler
        if scaler is not None:  # it insists on having looked at a gradient
            first = next(p for p in model.parameters() if p.requires_grad)
            scaler.scale(torch.zeros((), device=first.device))  # which makes its scale, if this is its first use
            first.grad = torch.zeros_like(first)
            self._trainer.accelerator.unscale_gradients()
        drop_gradients(model)

    # ------------------------------------------------------------------ not finite

    def _drop(self, model: torch.nn.Module, step: int, loss: float, norm: float, *, layer: str | None) -> None:
        drop_gradients(model)
        numbers: dict[str, Any] = {"loss": loss, "grad_norm": norm}
        scaler = self._trainer.accelerator.scaler
        if scaler is not None and math.isfinite(loss):  # the search for a scale overflows now and then
            self._halvings += 1
            scale = scaler.get_scale() * scaler.get_backoff_factor()
            if scale >= LEAST_SCALE and self._halvings < MOST_HALVINGS:
                return
            self._meet(self._failure("non_finite", COLLAPSED, step, numbers | {"loss_scale": scale}))
            return
        if self._trainer.is_deepspeed_enabled:  # its engine steps within the backward pass
            self._stop(self._failure("non_finite", NON_FINITE, step, numbers), "DeepSpeed had applied it already")
        findings = sorted(self._diagnosed(step), key=lambda one: one.row)
        found = {
            "layer": findings[0].layer if findings else layer,
            "where": findings[0].where if findings else None,
            "bad_rows": [one.row for one in findings],
            "places": self._places([one.row for one in findings]),
        }
        self._meet(self._failure("non_finite", NON_FINITE, step, numbers | found))

    def _diagnosed(self, step: int) -> list[Finding]:
        """Which rows do it alone; nothing where the model is spread over the ranks, which cannot look apart."""
        trainer, ranks = self._trainer, self._ranks
        if ranks.is_sharded:
            return []
        data = trainer.train_dataset
        share = shard_rows(trainer.rows_of(step), data.lengths, ranks.size)[ranks.rank]
        found = diagnose(
            trainer.model, data, share, pad_token_id=trainer.processing_class.pad_token_id, device=trainer.args.device
        )
        if ranks.size == 1:
            return found
        from accelerate.utils import gather_object

        gathered: list[Finding] = gather_object(found)
        return gathered

    # ------------------------------------------------------------------ spikes

    def _usual(self, step: int, loss: float, norm: float) -> float:
        """Up to which norm the gradients of this update may go beside what is planned."""
        spike = self._detector.see(step, loss, norm)
        if spike is None:
            return math.inf
        self._meet(self._failure("spike", SPIKE, step, _told(spike, loss, norm)))
        return math.inf if spike.grad_norm is None else spike.grad_norm.ordinary

    # ------------------------------------------------------------------ what is done about it

    def _failure(self, kind: FailureKind, cause: str, step: int, evidence: Mapping[str, Any]) -> Failure:
        rows = self._trainer.rows_of(step)
        return Failure(
            kind=kind, cause=cause, step=step, evidence=dict(evidence) | {"rows": rows}, remedy=_REMEDIES[cause]
        )

    def _meet(self, failure: Failure) -> None:
        """Write it down, ask the policy, and do what it says."""
        remedy = self._recoveries.decide(failure)
        if remedy.action == "stop":
            self._stop(failure, remedy.reason)
        if remedy.action == "roll_back":
            self._go_back(failure, remedy)
        (self._spiked if failure.kind == "spike" else self._dropped).append(failure.step)
        self._recoveries.took(failure, remedy, remedy.changes)

    def _go_back(self, failure: Failure, remedy: Remedy) -> NoReturn:
        skip = window_of([*self._dropped, *self._spiked], failure.step)
        info = newest_healthy(self._checkpoints, upto=skip.start) if self._ranks.is_main else None
        checkpoint: Path | None = self._ranks.from_main(info.path if info is not None else None)
        if checkpoint is None:
            self._stop(failure, f"{remedy.reason}, but there is no healthy checkpoint before step {skip.start + 1}")
        factor = float(remedy.changes.get("learning_rate_factor", 1.0))
        if self._trainer.args.lr_scheduler_type in _WITHOUT_FORMULA:
            factor = 1.0  # it goes by what it sees, and cannot be laid anew
        raise RollBack(remedy.reason, checkpoint=checkpoint, learning_rate_factor=factor, skip=skip)

    def _stop(self, failure: Failure, reason: str) -> NoReturn:
        raise RecoveryExhausted(failure, f"{reason}{briefly(failure)}")

    def _places(self, rows: Sequence[int]) -> list[str]:
        locations = [self._trainer.train_dataset.location(row) for row in rows[:MOST_PLACES]]
        return [f"{file}:{line}" for file, line in locations]


_WITHOUT_FORMULA = ("reduce_lr_on_plateau", "greedy")


def _scale(model: torch.nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _told(spike: Spike, loss: float, norm: float) -> dict[str, Any]:
    def of(one: Deviation | None) -> dict[str, float] | None:
        return None if one is None else {"z": one.z, "limit": one.limit, "usual": one.level}

    return {"of": spike.of, "loss": loss, "grad_norm": norm} | {
        f"{name}_spike": told
        for name, told in (("loss", of(spike.loss)), ("grad_norm", of(spike.grad_norm)))
        if told is not None
    }
