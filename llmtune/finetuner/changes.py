"""The table of what each change does to a begun run: applied and said, or refused and said. Never ignored."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["extends", "applies", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a change of any of ``keys`` does to a begun run.

    Attributes:
        keys: Keys of the configuration, or names of what surrounds a run.
        effect: ``extends`` and ``applies`` take it from the next update on; ``refused`` takes nothing.
        choices: Of the plan in force, what is chosen anew.
        why: What follows from it, or why it cannot be.
    """

    keys: tuple[str, ...]
    effect: Effect
    why: str
    choices: tuple[str, ...] = ()


DATA, BASE_MODEL, PACKAGES = "data", "base model", "packages"
PROCESSES, SHARDING, DEVICE = "processes", "sharding", "device"
NOT_BITWISE = "equal to rounding from here on, not bit for bit"

TABLE = (
    # how long
    Rule(
        keys=("train.epochs", "train.max_steps"),
        effect="extends",
        why="the schedule of the learning rate is laid anew over the whole length",
        choices=("epochs", "updates", "warmup_updates", "schedule_arguments"),
    ),
    # how far the weights move
    Rule(
        keys=("train.learning_rate", "train.schedule", "train.schedule_arguments", "train.warmup_ratio"),
        effect="applies",
        why="the next update has the learning rate that the changed schedule gives at its step",
        choices=("learning_rate", "schedule", "schedule_arguments", "warmup_updates"),
    ),
    Rule(keys=("train.max_grad_norm",), effect="applies", why="from the next update on", choices=("max_grad_norm",)),
    Rule(
        keys=("train.weight_decay", "train.optimizer", "train.optimizer_arguments"),
        effect="refused",
        why="the optimizer's state is of the other",
    ),
    Rule(keys=("train.seed",), effect="refused", why="order of rows, held-out rows and dropout would be another run's"),
    Rule(
        keys=("train.global_batch_size",),
        effect="refused",
        why="rows of the present epoch would be skipped or repeated",
    ),
    Rule(keys=("train.preset",), effect="refused", why="it decides most of what has been decided already"),
    # what is trained
    Rule(
        keys=(
            "train.method",
            "train.precision",
            "adapter.quantization",
            "adapter.rank",
            "adapter.alpha",
            "adapter.targets",
        ),
        effect="refused",
        why="the weights in the checkpoint are of the other shape or kind",
    ),
    Rule(keys=("adapter.dropout",), effect="applies", why="from the next update on", choices=("dropout",)),
    Rule(keys=("model.trust_remote_code",), effect="applies", why="the model's own code may be run or not"),
    Rule(
        keys=("model.id", "model.revision"),
        effect="applies",
        why="it may lie elsewhere or be another revision, as long as its files are the same",
        choices=("model",),
    ),
    Rule(keys=(BASE_MODEL,), effect="refused", why="the adapter or the weights go on from another model"),
    # what it learns from
    Rule(keys=(DATA,), effect="refused", why="it would be another run: rows skipped, repeated, or never seen"),
    Rule(
        keys=(
            "data.sources",
            "data.format",
            "data.columns",
            "data.ignore_columns",
            "data.text_rows",
            "data.max_length",
            "data.too_long",
            "data.supervise",
            "data.duplicates",
            "data.on_bad_row",
            "data.eval_fraction",
            "data.chat_template",
        ),
        effect="refused",
        why="the rows, or what is learned of them, would be other ones",
    ),
    # how it is judged and kept
    Rule(
        keys=("evaluate.metric", "evaluate.greater_is_better"),
        effect="refused",
        why="the best checkpoint so far was chosen by the other",
    ),
    Rule(
        keys=("evaluate.every_steps", "evaluate.patience", "evaluate.min_delta", "save.every_steps", "save.keep"),
        effect="applies",
        why="from the next update on",
        choices=("evaluate_every_steps", "save_every_steps", "keep_checkpoints", "patience"),
    ),
    Rule(
        keys=(
            "evaluate.base",
            "evaluate.num_samples",
            "evaluate.max_new_tokens",
            "evaluate.metric_rows",
            "save.asynchronous",
            "save.compress_optimizer",
        ),
        effect="applies",
        why="from the next evaluation or save on",
    ),
    # how it is computed
    Rule(
        keys=(
            "train.micro_batch_size",
            "train.token_budget",
            "train.packing",
            "train.activation_checkpointing",
            "train.checkpoint_every",
            "train.activation_offload",
            "train.compile",
            "train.num_workers",
            "train.threads",
        ),
        effect="applies",
        why=f"every update holds the same rows; {NOT_BITWISE}",
        choices=(
            "micro_batch_size",
            "token_budget",
            "packing",
            "pad_multiple",
            "pass_overhead_tokens",
            "accumulation",
            "activation_checkpointing",
            "checkpoint_every",
            "activation_offload",
            "compile",
            "num_workers",
            "threads",
        ),
    ),
    Rule(keys=("train.probe",), effect="applies", why="a continued run is not probed again"),
    Rule(
        keys=("train.device", DEVICE),
        effect="applies",
        why=f"another device rounds differently; {NOT_BITWISE}",
        choices=("device", "attention", "compile", "pin_memory"),
    ),
    Rule(
        keys=(PROCESSES,),
        effect="applies",
        why="every update holds the same rows, shared out anew; each process has its own random states, so dropout "
        "draws anew and the run is not bit for bit what it would have been",
        choices=("processes",),
    ),
    Rule(keys=(SHARDING,), effect="refused", why="the files of its checkpoints are laid out for the other"),
    Rule(keys=(PACKAGES,), effect="applies", why=f"other versions may round differently; {NOT_BITWISE}"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that is not what it was when the run was begun."""

    name: str
    before: Any
    now: Any

    @property
    def rule(self) -> Rule:
        """What it does."""
        return next(rule for rule in TABLE if self.name in rule.keys)

    @property
    def flag(self) -> str | None:
        """How it is asked for on the command line; None for what surrounds a run."""
        if "." not in self.name:
            return None
        value = json.dumps(self.now) if isinstance(self.now, Mapping) else _text(self.now)
        return f"--set {self.name}={shlex.quote(value)}"

    def __str__(self) -> str:
        """``train.learning_rate 0.001 -> 0.002 (why)``."""
        return f"{self.name} {_text(self.before)} -> {_text(self.now)} ({self.rule.why})"

    def to_json(self) -> dict[str, Any]:
        """One entry of ``changes`` in ``run.json``."""
        return {"name": self.name, "before": self.before, "now": self.now, "effect": self.rule.effect}


def _text(value: Any) -> str:
    if value is None:
        return "auto"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)
