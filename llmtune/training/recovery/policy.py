"""``recovery(failure, plan, history) -> Remedy``: a pure function over one table of remedies.

Each kind of failure has a ladder. The first rung that applies and has budget left is taken; below the last one there is
``stop``. Budgets are counted by (kind, cause, step) and by (kind, cause) since training last made progress, so that
nothing is repeated without progress:

- At one (kind, cause, step) a rung is taken once. Only what there is less of each time (``shrinks``) is taken again.
- Since progress, a rung is taken at most ``times`` times for one (kind, cause).
- Since progress, `MOST_ATTEMPTS` attempts are made whatever the failures are.

Progress is a failure at a later step than any before it. Where the remedy itself moves the step on (a skipped update)
or the trouble tends to come back (numbers), it has to be later by `HEALTHY_UPDATES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtune.training.recovery.failure import Attempt, Failure, FailureKind

if TYPE_CHECKING:
    from llmtune.planning import Plan

Action = Literal[
    "split",
    "checkpoint_activations",
    "offload_activations",
    "chunk_loss",
    "smaller_evaluation",
    "skip_update",
    "clip",
    "roll_back",
    "lower_learning_rate",
    "previous_checkpoint",
    "free_disk",
    "restart_loader",
    "restart",
    "stop",
]

# Updates without trouble after which a run that had trouble with its numbers counts as healthy again (an estimate).
HEALTHY_UPDATES = 100
# More halvings than rows that anyone puts into one pass (2 ** 16).
MOST_HALVINGS = 16
# Attempts without progress after which it is over, whatever kinds of failures take turns.
MOST_ATTEMPTS = 48
# Rows of logits that are there at once where memory is that short (an estimate: fewer make products slow).
SMALL_LOSS_CHUNK = 64
# What a learning rate is multiplied by when training is unstable at it (an estimate; each rollback does it again).
LEARNING_RATE_FACTOR = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What the user allows, see ``recover.*`` of the configuration.

    Attributes:
        skips: Updates that may be dropped for non-finite numbers before training rolls back.
        rollbacks: Rollbacks before training stops.
    """

    skips: int = 10
    rollbacks: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """What to do about a failure.

    Attributes:
        action: The name of what to do; ``stop`` ends the run.
        changes: What it changes: choices of the plan by name, or arguments of the action.
        reason: Why this and not another, in one sentence.
    """

    action: Action
    changes: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One remedy of a ladder.

    Attributes:
        why: What it does, in words that follow "<cause>: ".
        times: Most often since progress; a name is that of a field of `Budgets`.
        shrinks: Whether there is less each time, so that taking it again is no repetition.
        applies: Whether it can help here.
        changes: What it changes, given when it was taken before since progress; None where nothing is left to change.
    """

    action: Action
    why: str
    times: int | str = 1
    shrinks: bool = False
    applies: Callable[[Failure, Plan], bool] = lambda failure, plan: True
    changes: Callable[[Failure, Sequence[Attempt]], Mapping[str, Any] | None] = lambda failure, taken: {}

    def most(self, budgets: Budgets) -> int:
        """Most often since progress."""
        return self.times if isinstance(self.times, int) else int(getattr(budgets, self.times))


def recovery(failure: Failure, plan: Plan, history: Sequence[Attempt], budgets: Budgets | None = None) -> Remedy:
    """What to do about ``failure``. Pure: the same arguments give the same answer.

    Args:
        failure: What just went wrong.
        plan: The plan in force.
        history: Every attempt of this run so far, in order.
        budgets: What the user allows.
    """
    allowed = budgets or Budgets()
    if len(_since_progress(failure, history, margin=0)) >= MOST_ATTEMPTS:
        return _stop(failure, f"{MOST_ATTEMPTS} attempts made no progress past step {_furthest(history)}")
    since = _since_progress(failure, history, margin=_MARGIN.get(failure.kind, 0))
    window = [one for one in since if (one.failure.kind, one.failure.cause) == (failure.kind, failure.cause)]
    spent: list[str] = []
    for rung in LADDERS[failure.kind]:
        taken = [one for one in window if one.action == rung.action]
        here = [one for one in taken if one.failure.step == failure.step]
        if not rung.applies(failure, plan):
            continue
        changes = rung.changes(failure, taken)
        if len(taken) >= rung.most(allowed) or (here and not rung.shrinks) or changes is None:
            spent.append(rung.action.replace("_", " "))
            continue
        changes = dict(_NEVER_SAVES.get(failure.kind, {})) | dict(changes)
        return Remedy(action=rung.action, changes=changes, reason=f"{failure.cause}: {rung.why}")
    return _stop(failure, _why_over(failure, spent))


def _stop(failure: Failure, reason: str) -> Remedy:
    return Remedy(action="stop", changes=_NEVER_SAVES.get(failure.kind, {}), reason=reason)


def _why_over(failure: Failure, spent: Sequence[str]) -> str:
    if failure.kind == "out_of_memory" and failure.evidence.get("rows") == 1:
        tried = f"; {', '.join(spent)} did not help" if spent else ""
        return f"{failure.cause} with one row alone in the pass{tried}"
    if spent:
        return f"{failure.cause} came back at step {failure.step} after: {', '.join(spent)}"
    return f"{failure.cause}: nothing that llmtune could do by itself would help"


def _furthest(attempts: Sequence[Attempt]) -> int:
    return max((one.failure.step for one in attempts), default=0)


def _since_progress(failure: Failure, attempts: Sequence[Attempt], *, margin: int) -> list[Attempt]:
    """The attempts since a failure last came more than ``margin`` steps later than all before it."""
    window: list[Attempt] = []
    furthest = -1
    for one in attempts:
        if one.failure.step > furthest + margin:
            window = []
        window.append(one)
        furthest = max(furthest, one.failure.step)
    return [] if failure.step > furthest + margin else window


# ---------------------------------------------------------------------- when a rung can help, and what it changes


def _in_step(failure: Failure) -> bool:
    return bool(failure.evidence.get("phase", "step") == "step")


def _can_split(failure: Failure, plan: Plan) -> bool:
    return _in_step(failure) and failure.evidence.get("rows") != 1


def _keeps_activations(failure: Failure, plan: Plan) -> bool:
    recomputes_all = plan.activation_checkpointing.value and plan.checkpoint_every.value <= 1
    return _in_step(failure) and not recomputes_all


def _keeps_them_on_device(failure: Failure, plan: Plan) -> bool:
    return _in_step(failure) and not plan.activation_offload.value and plan.device.value != "cpu"


def _has_large_chunks(failure: Failure, plan: Plan) -> bool:
    return int(failure.evidence.get("loss_chunk_rows", 0)) > SMALL_LOSS_CHUNK


def _halved(failure: Failure, taken: Sequence[Attempt]) -> Mapping[str, Any] | None:
    """Half the tokens of the pass that failed (rows where they are not known), and less than any attempt before."""
    name = "tokens" if isinstance(failure.evidence.get("tokens"), int) else "rows"
    size = failure.evidence.get(name)
    if not isinstance(size, int):
        return {"pieces": 2 ** (len(taken) + 1)}
    seen = [before for one in taken if isinstance(before := one.failure.evidence.get(name), int)]
    target = max([*seen, size])
    for failed in [*seen, size]:
        target = min(failed, target) // 2
    return {name: target} if target else None


def _lower_rate(failure: Failure, taken: Sequence[Attempt]) -> Mapping[str, Any]:
    return {"learning_rate_factor": LEARNING_RATE_FACTOR}


def _mendable(failure: Failure, plan: Plan) -> bool:
    return failure.evidence.get("mendable") is not False


_CHUNK_LOSS = Rung(
    action="chunk_loss",
    why="logits exist for fewer rows at once",
    applies=_has_large_chunks,
    changes=lambda failure, taken: {"loss_chunk_rows": SMALL_LOSS_CHUNK},
)
_ROLL_BACK = Rung(
    action="roll_back",
    why="back to the last healthy checkpoint with a lower learning rate; the window is skipped",
    times="rollbacks",
    changes=_lower_rate,
)
_RESTART = Rung(action="restart", why="the process starts again from the newest verified checkpoint")

# In the order of the policy table. What is not retried has no rung.
LADDERS: Mapping[FailureKind, tuple[Rung, ...]] = {
    "out_of_memory": (
        Rung(
            action="split",
            why="the update is replayed in smaller pieces",
            times=MOST_HALVINGS,
            shrinks=True,
            applies=_can_split,
            changes=_halved,
        ),
        Rung(
            action="checkpoint_activations",
            why="activations are recomputed instead of kept",
            applies=_keeps_activations,
            changes=lambda failure, taken: {"activation_checkpointing": True, "checkpoint_every": 1},
        ),
        Rung(
            action="offload_activations",
            why="what activations are recomputed from waits in host memory",
            applies=_keeps_them_on_device,
            changes=lambda failure, taken: {"activation_offload": True},
        ),
        _CHUNK_LOSS,
    ),
    "evaluation_out_of_memory": (
        Rung(
            action="smaller_evaluation",
            why="evaluation goes on with half the batch",
            times=MOST_HALVINGS,
            shrinks=True,
            applies=lambda failure, plan: failure.evidence.get("rows") != 1,
            changes=_halved,
        ),
        _CHUNK_LOSS,
    ),
    "non_finite": (
        Rung(action="skip_update", why="the update is dropped, the weights stay", times="skips"),
        _ROLL_BACK,
    ),
    "spike": (
        Rung(action="clip", why="the gradient is clipped to what is usual here", times=3),
        _ROLL_BACK,
    ),
    "divergence": (
        Rung(action="lower_learning_rate", why="the learning rate is lowered", times=3, changes=_lower_rate),
    ),
    "corrupt_checkpoint": (
        Rung(
            action="previous_checkpoint",
            why="the one before it that verifies is taken",
            times=MOST_ATTEMPTS,
            shrinks=True,
            applies=_mendable,
        ),
    ),
    "disk": (
        Rung(
            action="free_disk",
            why="old checkpoints go as far as retention allows, then the write is tried once more",
            applies=_mendable,
        ),
    ),
    "worker": (Rung(action="restart_loader", why="the data loader starts its workers again"), _RESTART),
    "hung": (
        Rung(
            action="restart_loader",
            why="the data loader starts its workers again",
            applies=lambda failure, plan: failure.evidence.get("where") == "loader",
        ),
        _RESTART,
    ),
    "preempted": (),
    "killed": (_RESTART,),
    "hardware": (_RESTART,),
    "user_code": (),
    "refused": (),
    "defect": (),
}

# Kinds whose remedy moves the step on by itself, or whose trouble comes back after a few updates.
_MARGIN: Mapping[FailureKind, int] = {
    "non_finite": HEALTHY_UPDATES,
    "spike": HEALTHY_UPDATES,
    "divergence": HEALTHY_UPDATES,
}
# What a broken device holds must not become a checkpoint.
_NEVER_SAVES: Mapping[FailureKind, Mapping[str, Any]] = {"hardware": {"save": False}}
