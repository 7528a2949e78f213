"""What a resumed run brings back beyond what the Trainer restores, and what it proves before its first update.

The Trainer restores weights, optimizer, schedule, random states and its own log. It does not restore callbacks in
place, lets a checkpoint's learning rate win over the configured one, and never asks whether the data still come in the
order in which they were consumed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from llmtune.console import speaker
from llmtune.data import Part, epoch_order, epoch_rows
from llmtune.errors import ConfigError
from llmtune.training.guards import EarlyStopping


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far a run has come in its data.

    Attributes:
        epoch: Whole epochs that were consumed.
        update: Updates made in the epoch after them.
        rows: Rows consumed since the beginning, over all ranks; a row counts as often as it was seen.
        global_batch_size: Rows of one update over all ranks.
        order: SHA-256 of the row numbers of the present epoch, in their order.
    """

    epoch: int
    update: int
    rows: int
    global_batch_size: int
    order: str

    @classmethod
    def after(cls, updates: int, *, parts: Sequence[Part], seed: int, global_batch_size: int) -> Cursor:
        """Where the order of the data is after so many updates: a function of the arguments alone."""
        per_epoch = epoch_rows(parts)
        epoch, update = divmod(updates, math.ceil(per_epoch / global_batch_size))
        return cls(
            epoch=epoch,
            update=update,
            rows=epoch * per_epoch + update * global_batch_size,
            global_batch_size=global_batch_size,
            order=_digest(tuple(parts), seed, epoch),
        )

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """What differs from the cursor in a checkpoint, each with both values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [f"{name} {kept.get(name)} -> {value}" for name, value in values.items() if kept.get(name) != value]


@lru_cache(maxsize=1)
def _digest(parts: tuple[Part, ...], seed: int, epoch: int) -> str:
    return hashlib.sha256(epoch_order(parts, seed, epoch).astype("<i8").tobytes()).hexdigest()


class Continuity(TrainerCallback, ExportableState):
    """The first of all callbacks: every checkpoint gets the cursor, and a resumed run gets everything back.

    Args:
        cursor: The position in the data after so many updates.
        callbacks: All callbacks of the run.
        control: The Trainer's control.
        preempted: Whether a signal is what stops the run.
    """

    def __init__(
        self,
        *,
        cursor: Callable[[int], Cursor],
        callbacks: Callable[[], Iterable[TrainerCallback]],
        control: Callable[[], TrainerControl],
        preempted: Callable[[], bool],
    ) -> None:
        self._cursor, self._callbacks, self._control, self._preempted = cursor, callbacks, control, preempted
        self._step, self._of = 0, 0
        self._schedule: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: cursor, schedule, evaluations waited, and whether the user's code ended the run."""
        early = [callback for callback in self._callbacks() if isinstance(callback, EarlyStopping)]
        stopped = self._control().should_training_stop and self._step < self._of
        kept = {
            "cursor": asdict(self._cursor(self._step)),
            "schedule": self._schedule,
            "ended": stopped and not self._preempted() and not any(callback.is_over for callback in early),
            "waited": max((callback.bad_evaluations for callback in early), default=0),
        }
        return {"args": {}, "attributes": kept}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the cursor, bring back the callbacks, lay the schedule.

        Raises:
            ConfigError: The data do not come in the order in which they were consumed; a schedule that cannot change.
        """
        self._step, self._of, self._schedule = state.global_step, state.max_steps, _schedule_of(args)
        own = [callback for callback in self._callbacks() if isinstance(callback, ExportableState)]
        if state.global_step > 0:
            kept = _kept_by(Continuity.__name__, state.stateful_callbacks)
            if kept:
                require_cursor(self._cursor(state.global_step), kept["cursor"], state.global_step)
                if kept["schedule"] != self._schedule:
                    lay_schedule(kwargs["optimizer"], kwargs["lr_scheduler"], args, kept["schedule"])
            restore([callback for callback in own if callback is not self], state.stateful_callbacks)
            state.compute_steps(args, state.max_steps)  # else the checkpoint's own cadence would go on
            find_best(state, Path(args.output_dir))
        state.stateful_callbacks = exported([*own, self._control()])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the position, for the checkpoint that may follow."""
        self._step = state.global_step


def require_cursor(cursor: Cursor, kept: Mapping[str, Any], step: int) -> None:
    """Refuse to go on where the data would not go on where they stopped.

    Raises:
        ConfigError: Names what differs.
    """
    if differing := cursor.differences(kept):
        raise ConfigError(
            "resume",
            [
                f"after step {step} the data are not where the checkpoint left them ({', '.join(differing)}), so rows "
                "would be skipped or repeated; give the data, seed and global batch size that the run was begun with, "
                "or start a new one with another --output"
            ],
        )


def exported(objects: Sequence[ExportableState]) -> dict[str, Any]:
    """The states of callbacks by class, as the Trainer keeps them: a list where there are several of one class."""
    states: dict[str, Any] = {}
    for one in objects:
        name = type(one).__name__
        if name not in states:
            states[name] = one.state()
        elif isinstance(states[name], list):
            states[name].append(one.state())
        else:
            states[name] = [states[name], one.state()]
    return states


def restore(callbacks: Sequence[ExportableState], kept: Mapping[str, Any]) -> None:
    """Give callbacks the attributes that a checkpoint kept of their class, in place; what cannot be is said.

    The Trainer would make new objects from ``args`` and lose what those cannot hold, and the order of callbacks.
    """
    present = {type(callback).__name__ for callback in callbacks}
    for name in sorted(present):
        same = [callback for callback in callbacks if type(callback).__name__ == name]
        states = kept.get(name, [])
        latest = (states if isinstance(states, list) else [states])[-len(same) :]
        if len(latest) < len(same):
            speaker.warn(f"callback {name} has no state in the checkpoint; it starts afresh")
        for callback, state in zip(same, latest, strict=False):
            for attribute, value in state.get("attributes", {}).items():
                setattr(callback, attribute, value)
            if (now := _as_kept(callback.state().get("args", {}))) != state.get("args", {}):
                speaker.warn(f"callback {name} was made with {state.get('args')} and now with {now}; this is taken")
    for name in sorted(kept.keys() - present - {Continuity.__name__, TrainerControl.__name__}):
        speaker.warn(f"the checkpoint holds the state of a callback {name} that was not handed over")


def lay_schedule(optimizer: Any, scheduler: Any, args: TrainingArguments, kept: Mapping[str, Any]) -> None:
    """Make the learning rate of the next update what the present schedule gives: a checkpoint brings back its own.

    A rate that was lowered on the way stays lowered by the same factor.

    Args:
        optimizer: As the checkpoint has left it.
        scheduler: The same; its formula is the present one.
        args: The present schedule.
        kept: The schedule that the checkpoint was made under.

    Raises:
        ConfigError: The schedule has a memory and no formula, such as ``reduce_lr_on_plateau``.
    """
    now = _schedule_of(args)
    if not isinstance(scheduler, LambdaLR):
        if all(kept.get(name) == value for name, value in now.items() if name != "max_steps"):
            return  # it goes by what it sees, not by how long the run is
        raise ConfigError(
            "train.schedule",
            [f"{now['lr_scheduler_type']} cannot be laid anew in the middle of a run; leave the schedule as it was"],
        )
    change = args.learning_rate / kept["learning_rate"]
    scheduler.base_lrs = [base * change for base in scheduler.base_lrs]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = base
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def find_best(state: TrainerState, checkpoints: Path) -> None:
    """Where the best checkpoint is now: a run directory may have been moved since its path was written."""
    best = checkpoints / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)


def has_ended(checkpoint: Path, *, updates: int, patience: int | None) -> bool:
    """Whether nothing is left to do after ``checkpoint``: all updates are made, or a callback had ended the run.

    Args:
        checkpoint: A verified checkpoint.
        updates: Updates of the whole run.
        patience: Evaluations without improvement after which the run stops early.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["global_step"] >= updates:
        return True
    kept = _kept_by(Continuity.__name__, state.get("stateful_callbacks") or {})
    waited_enough = patience is not None and kept.get("waited", 0) >= patience
    return waited_enough or bool(kept.get("ended", False))


def _kept_by(name: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of the only callback of its class; empty where a checkpoint of an earlier version has none."""
    found = kept.get(name, {})
    attributes: dict[str, Any] = (found[-1] if isinstance(found, list) else found).get("attributes", {})
    return attributes


def _schedule_of(args: TrainingArguments) -> dict[str, Any]:
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "lr_scheduler_kwargs")
    values = {name: getattr(args, name) for name in names}
    kept: dict[str, Any] = _as_kept({name: getattr(value, "value", value) for name, value in values.items()})
    return kept


def _as_kept(values: Any) -> Any:
    return json.loads(json.dumps(values))
