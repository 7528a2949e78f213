"""``llmtune init`` between its questions: it looks ahead, keeps to limits, and writes down what was decided."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig
from llmtune.config.write import Planned, commented_yaml, settings_of
from llmtune.data import DataReport
from llmtune.errors import ConfigError
from llmtune.finetuner import facts, rows
from llmtune.finetuner.facts import Machine
from llmtune.finetuner.rows import Inputs
from llmtune.planning import Choice, Plan
from llmtune.planning.model_choice import BUILTIN_FAMILY
from llmtune.presets import CatalogueEntry, Preset, find_entry
from llmtune.presets.custom import SETTINGS
from llmtune.units import format_bytes, format_seconds
from llmtune.wizard.outlook import Limits, Outlook, Situation, settled, told_of
from llmtune.wizard.questions import (
    Question,
    goal_question,
    held_out_beside,
    held_out_question,
    long_rows_question,
    model_question,
    neighbours,
)

# In this order: what is trained depends on how long rows may be, and the model on what is aimed at.
QUESTIONS = (long_rows_question, goal_question, model_question, held_out_question)

# Choices of a plan that are shown as keys to change, by the key that sets them.
PLANNED = {
    "model.id": "model",
    "data.max_length": "max_length",
    "train.preset": "preset",
    "train.method": "method",
    "train.epochs": "epochs",
    "train.learning_rate": "learning_rate",
    "train.schedule": "schedule",
    "train.schedule_arguments": "schedule_arguments",
    "train.weight_decay": "weight_decay",
    "train.optimizer": "optimizer",
    "train.optimizer_arguments": "optimizer_arguments",
    "train.max_grad_norm": "max_grad_norm",
    "train.global_batch_size": "global_batch_size",
    "train.token_budget": "token_budget",
    "train.precision": "precision",
    "train.packing": "packing",
    "train.activation_checkpointing": "activation_checkpointing",
    "train.checkpoint_every": "checkpoint_every",
    "train.activation_offload": "activation_offload",
    "train.compile": "compile",
    "train.device": "device",
    "train.num_workers": "num_workers",
    "train.threads": "threads",
    "train.seed": "seed",
    "adapter.rank": "rank",
    "adapter.alpha": "alpha",
    "adapter.dropout": "dropout",
    "adapter.targets": "targets",
    "adapter.quantization": "quantization",
    "evaluate.every_steps": "evaluate_every_steps",
    "evaluate.patience": "patience",
    "save.every_steps": "save_every_steps",
    "save.keep": "keep_checkpoints",
}
# Of these, the ones that decide how much memory a model takes: set where a run has to keep to a limit.
DECIDE_MEMORY = (
    "train.method",
    "train.token_budget",
    "train.optimizer",
    "train.activation_checkpointing",
    "train.checkpoint_every",
    "train.activation_offload",
    "adapter.quantization",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A configuration that was decided, the text of its file, and the plan that ``llmtune plan`` makes of it."""

    config: RunConfig
    text: str
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """``config`` as nested keys, and the plan."""
        config: dict[str, dict[str, Any]] = {}
        for key, value in settings_of(self.config).items():
            group, leaf = key.split(".")
            config.setdefault(group, {})[leaf] = value
        return {"config": config, "plan": self.plan.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wizard:
    """The facts that stay the same through all questions."""

    machine: Machine
    inputs: Inputs
    report: DataReport
    limits: Limits
    _seen: dict[str, Outlook] = field(default_factory=dict, repr=False)

    def begin(self, config: RunConfig) -> Situation:
        """Where the questions start from, given what was asked on the command line.

        Raises:
            ConfigError: A number that no preset may have, or no model within the limits; all at once.
        """
        return Situation(
            config=config,
            look=self.look,
            survey=rows.surveyed(self.inputs.train),
            report=self.report,
            offered=offered(config, self.limits),
            beside=_beside(self.inputs),
            has_evaluation=self.inputs.evaluation is not None,
        )

    def look(self, config: RunConfig) -> Outlook:
        """What would come of a configuration within the limits; ``model=auto`` keeps to them too.

        Raises:
            LlmtuneError: It cannot be planned.
        """
        key = repr(settings_of(config))
        if key not in self._seen:
            self._seen[key] = self._look(config)
        return self._seen[key]

    def _look(self, config: RunConfig) -> Outlook:
        look = self._limited(config)
        if not look.too_slow or config.model.id != "auto":
            return look
        candidates, limit = offered(config, self.limits), format_seconds(self.limits.max_seconds or 0)
        entry = find_entry(look.plan.model.value)
        while look.too_slow and entry is not None and (entry := neighbours(entry, candidates)[0]) is not None:
            look = self._limited(settled(config, {"model.id": entry.id}))
            reason = f"the largest open model that trains within {limit}, as you asked"
            look = replace(look, plan=replace(look.plan, model=Choice(entry.id, reason, "derived")))
        return look

    def draft(self, config: RunConfig, file: str) -> Draft:
        """What was decided, as a file, with what it takes to keep to the limits.

        Args:
            config: All that was decided.
            file: What the file will be called.

        Raises:
            PlanError: It does not fit the machine, or does not keep to the limits.
            LlmtuneError: It cannot be planned.
        """
        limited = self.look(config)
        limited.require()
        kept = _kept(config, limited.plan, self.limits)
        config = settled(config, {key: value for key, (value, _) in kept.items()})
        look = _outlook(config, self.machine, self.inputs, Limits()) if self.limits != Limits() else limited
        header = (
            f"Made by llmtune init. To train: llmtune train --config {shlex.quote(file)}",
            f"Predicted on {self.machine.hardware.describe()}: {look.memory} of memory, about {look.time}.",
            "A key is something you decided. A #key is what would be taken today, and why; it is decided anew at every "
            "start. Take the # away to fix it. Paths count from where llmtune is started.",
        )
        remarks = _custom(config, look) | {key: why for key, (_, why) in kept.items()}
        choices = planned(config, look, self.report)
        if self.inputs.evaluation is not None:
            choices.pop("data.eval_fraction", None)  # the data has an evaluation split
        text = commented_yaml(config, header=header, remarks=remarks, planned=choices)
        return Draft(config=config, text=text, plan=look.plan)

    def _limited(self, config: RunConfig) -> Outlook:
        device, most = self.machine.device, self.limits.max_bytes
        free = device.free_bytes if most is None else min(device.free_bytes, most)
        machine = replace(self.machine, device=replace(device, free_bytes=free))
        with told_of(self.limits):
            return _outlook(config, machine, self.inputs, self.limits)


def decide(situation: Situation, ask: Callable[[Question], Mapping[str, Any]]) -> Situation:
    """Put the questions that are worth asking; each knows what was answered before.

    Args:
        situation: Where it starts from.
        ask: Returns the keys that the answer sets.

    Raises:
        LlmtuneError: Nothing can be trained, whatever is answered.
    """
    for question_of in QUESTIONS:
        question = question_of(situation)
        if question is not None:
            situation = replace(situation, config=settled(situation.config, ask(question)))
    return situation


def offered(config: RunConfig, limits: Limits) -> tuple[CatalogueEntry, ...]:
    """Models worth proposing: open ones whose least memory is within the limit, with the method that was asked for.

    Raises:
        ConfigError: A number that no preset may have.
    """
    wanted = _requirements(config, limits)
    Preset.custom(wanted)
    entries: list[CatalogueEntry] = []
    for family in Preset.families():
        try:
            entries += Preset.custom({**wanted, "family": family}).catalogue
        except ConfigError:
            continue  # no model of this family is small enough
    return tuple(entry for entry in entries if not entry.gated and entry.family != BUILTIN_FAMILY)


def _requirements(config: RunConfig, limits: Limits) -> dict[str, Any]:
    """What was asked, as `Preset.custom` takes it."""
    numbers = {name: settings_of(config).get(key) for name, key in SETTINGS.items()}
    wanted = {"goal": config.train.preset, "method": config.train.method, "max_memory": limits.max_bytes, **numbers}
    return {name: value for name, value in wanted.items() if value is not None}


def planned(config: RunConfig, look: Outlook, report: DataReport) -> dict[str, Planned]:
    """What will be taken for every key that is worth knowing, and why."""
    plan, num_rows = look.plan, report.rows - report.bad_rows
    found = {key: Planned(value=choice.value, reason=choice.reason) for key, choice in _settable(plan).items()}
    if "adapter.targets" in found:  # a family's targets name modules that only some of its models have
        there = [name for name in plan.targets.value if look.spec.targeted((name,))]
        found["adapter.targets"] = Planned(value=there, reason=plan.targets.reason)
    if look.stats.estimated:
        found.pop("data.max_length", None)  # a limit taken from an estimate would refuse the rows just above it
    if plan.warmup_updates.value > 0:
        ratio = look.preset.settings(plan.preset.value, plan.data_size.value)["train.warmup_ratio"]
        found["train.warmup_ratio"] = Planned(value=ratio, reason=plan.warmup_updates.reason)
    repeated = report.duplicates.exact_rows
    reason = f"{repeated:,} of {num_rows:,} rows repeat another one exactly" if repeated else "no row repeats another"
    found["data.duplicates"] = Planned(value="keep", reason=reason)
    found["data.too_long"] = Planned(
        value="refuse", reason="training does not start with rows that are too long; drop, left and turns make them fit"
    )
    if config.data.eval_path is None:
        share = rows.eval_share(config, num_rows)
        found["data.eval_fraction"] = Planned(
            value=math.ceil(share * 1e6) / 1e6,  # rounded up, so that as many rows come out
            reason=f"{int(share * num_rows):,} of {num_rows:,} rows are not learned from, to judge by",
        )
    return found


def _settable(plan: Plan) -> dict[str, Choice[Any]]:
    """The choices of a plan that a key could set as they are."""
    found = {key: getattr(plan, name) for key, name in PLANNED.items()}
    unused = [key for key, choice in found.items() if choice.value is None or choice.value == {}]
    if plan.method.value == "full":
        unused += [key for key in found if key.startswith("adapter.")]
    if plan.method.value != "qlora":
        unused.append("adapter.quantization")
    if not plan.activation_checkpointing.value:
        unused += ["train.checkpoint_every", "train.activation_offload"]
    return {key: choice for key, choice in found.items() if key not in unused}


def _kept(config: RunConfig, plan: Plan, limits: Limits) -> dict[str, tuple[Any, str]]:
    """The keys that have to be set for a run to keep to the limits, and what to say about them."""
    kept: dict[str, tuple[Any, str]] = {}
    if limits.max_seconds is not None:
        kept["model.id"] = plan.model.value, f"custom: trains within {format_seconds(limits.max_seconds)}"
    if limits.max_bytes is not None:
        settable = _settable(plan)
        said = f"custom: keeps the run within {format_bytes(limits.max_bytes)}"
        kept |= {key: (settable[key].value, said) for key in ("model.id", *DECIDE_MEMORY) if key in settable}
    given = settings_of(config)
    return {key: each for key, each in kept.items() if given.get(key, "auto") == "auto"}


def _custom(config: RunConfig, look: Outlook) -> dict[str, str]:
    """For every number of the family's preset that was replaced: what it would have been."""
    goal, size = config.train.preset, look.plan.data_size.value
    base = look.preset.settings(goal, size)
    given = settings_of(config)
    return {
        key: f"custom: the {look.preset.family} preset has {value} for {goal} on {size} data"
        for key, value in base.items()
        if key in given and given[key] != value
    }


def _outlook(config: RunConfig, machine: Machine, inputs: Inputs, limits: Limits) -> Outlook:
    model = facts.model_of(config, machine, inputs, download=False)
    data = facts.data_of(config, model, inputs)
    plan = facts.plan_of(config, machine, model, data, processes=1)
    return Outlook(plan=plan, stats=data.stats, spec=model.spec, preset=model.preset, limits=limits)


def _beside(inputs: Inputs) -> tuple[str, ...]:
    """Files that lie beside the training data and are named as its evaluation data."""
    source = inputs.train[0].source
    if source.in_memory or len(inputs.train) > 1 or len(source.labels) != 1:
        return ()
    file = Path(source.labels[0])
    names = sorted(path.name for path in file.parent.iterdir() if path.is_file())
    return tuple(str(file.with_name(name)) for name in held_out_beside(file.name, names))
