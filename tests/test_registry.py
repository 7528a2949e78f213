"""Names of optimizers, schedules and trackers: each one trains for real, or is refused by name with what it needs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import machine, planned, problems, request_for
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.training_args import OptimizerNames
from tuning import ROWS, SignalAt, evaluations, history, losses, tune, weights

from llmtune import FineTuner
from llmtune.config.aliases import VALUES
from llmtune.errors import ConfigError, OutputError, Preempted
from llmtune.planning import Plan, make_plan
from llmtune.planning.signatures import load, schedule_refusal
from llmtune.registry import (
    OPTIMIZERS,
    SCHEDULES,
    TRACKERS,
    Credential,
    Package,
    Tracker,
    resolve_trackers,
    usable_settings,
)
from llmtune.registry import optimizers as of_optimizers
from llmtune.registry import schedules as of_schedules

Model = Callable[[str], Path]
QUICK: dict[str, Any] = {"probe": False, "evaluate.base": False}
RUNNABLE = sorted(name for name, one in OPTIMIZERS.items() if one.problem("cpu") is None)


def plan_in(run: Path) -> Plan:
    return Plan.from_json(json.loads((run / "plan.json").read_text(encoding="utf-8")))


# ------------------------------------------------------------------ optimizers


def test_every_optimizer_of_transformers_is_described() -> None:
    assert {str(kind.value) for kind in OptimizerNames} == set(OPTIMIZERS)
    assert set(RUNNABLE) >= {"adamw_torch", "sgd", "adafactor", "adamw_bnb_8bit", "lion_32bit", "ademamix_8bit"}


# Of each kind one is tried by default; CI tries all.
TRIED = ("adamw_torch", "adafactor", "sgd", "rmsprop", "lion_8bit", "ademamix")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TRIED else [pytest.mark.slow]) for name in RUNNABLE]
)
def test_an_optimizer_that_is_accepted_trains(name: str, family_model: Model, tmp_path: Path) -> None:
    plan = planned("builtin:tiny", hardware=machine(), optimizer=name)
    assert (plan.optimizer.value, plan.optimizer.source) == (name, "user")
    run = tmp_path / "run"
    tune(family_model("llama"), run, method="full", optimizer=name, max_steps=3, learning_rate=1e-2, **QUICK)
    first, *_, last = losses(run)
    assert last < first or name.startswith("rmsprop")  # whose first update is ten times as long as the others
    assert plan_in(run).optimizer_arguments.value == OPTIMIZERS[name].defaults


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_class_and_its_arguments_are_those_that_the_trainer_takes(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True, report_to="none")
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    described = OPTIMIZERS[name]
    assert kind is load(described.factory)
    assert {key: keywords[key] for key in described.fixed} == described.fixed
    parameters = inspect.signature(kind).parameters
    assert set(described.defaults) <= set(parameters) - set(of_optimizers.DECIDED_ELSEWHERE)
    if not name.startswith(("lion", "paged_lion")):  # transformers gives it Adam's second beta
        assert {key: keywords[key] for key in described.defaults if key in keywords} == {
            key: value for key, value in described.defaults.items() if key in keywords
        }


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(RUNNABLE)))
def test_an_optimizer_that_cannot_train_is_refused_by_name_with_what_it_needs(name: str) -> None:
    (problem,) = problems(hardware=machine(), optimizer=name)
    assert problem.startswith(f"train.optimizer: got '{name}', which ")
    assert "need" in problem
    described = OPTIMIZERS[name]
    if described.packages:
        assert problem.endswith(described.packages[0].command)
    else:
        instead = problem.rpartition(" ")[2]
        assert OPTIMIZERS[instead].problem("cpu") is None


def test_momentum_reaches_the_optimizer(family_model: Model, tmp_path: Path) -> None:
    how = {"method": "full", "optimizer": "sgd", "max_steps": 4, "learning_rate": 0.1, **QUICK}
    plain = tune(family_model("llama"), tmp_path / "plain", **how)
    pushed = tune(family_model("llama"), tmp_path / "momentum", optimizer_arguments={"momentum": 0.9}, **how)
    without, within = losses(plain.run_dir), losses(pushed.run_dir)
    assert without[:2] == within[:2]
    assert without[2:] != within[2:]
    choice = plan_in(pushed.run_dir).optimizer_arguments
    assert (choice.value, choice.source) == ({"momentum": 0.9}, "user")


def test_lion_has_betas_of_its_own(family_model: Model, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tune(family_model("llama"), run, optimizer="lion_32bit", max_steps=2, **{"save.every_steps": 1}, **QUICK)
    state = torch.load(next((run / "checkpoints").glob("checkpoint-*/optimizer.pt")), weights_only=True)
    assert {tuple(group["betas"]) for group in state["param_groups"]} == {(0.9, 0.99)}


@pytest.mark.parametrize(
    ("optimizer", "arguments", "says"),
    [
        ("sgd", {"momentumm": 0.9}, "momentumm: unknown argument, did you mean 'momentum'?"),
        ("sgd", {"momentum": "high"}, "momentum: got 'high', expected a number"),
        ("sgd", {"nesterov": 1}, "nesterov: got 1, expected true or false"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires a momentum"),
        ("adamw_torch", {"betas": 0.9}, "betas: got 0.9, expected a list of 2 numbers"),
        ("adamw_torch", {"betas": [0.9, 1.5]}, "Invalid beta parameter at index 1: 1.5"),
        ("adamw_torch", {"lr": 1e-3}, "lr: cannot be given here; give train.learning_rate"),
        ("adamw_torch", {"weight_decay": 0.1}, "weight_decay: cannot be given here; give train.weight_decay"),
        ("adamw_torch", {"maximize": True}, "maximize: cannot be given here"),
        ("adafactor", {"relative_step": True}, "relative_step: cannot be given here"),
        ("adamw_bnb_8bit", {"optim_bits": 32}, "optim_bits: cannot be given here"),
        (None, {"amsgrad": True}, "amsgrad: memory decides which AdamW is taken"),
    ],
)
def test_a_wrong_argument_of_an_optimizer_is_explained(
    optimizer: str | None, arguments: dict[str, Any], says: str
) -> None:
    (problem,) = problems(optimizer=optimizer, optimizer_arguments=arguments, hardware=machine())
    assert problem.startswith("train.optimizer_arguments")
    assert says in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"report_to": ["no-such-tracker"]},
        {"report_to": ["flyte"]},
        {"optimizer": "lomo"},
        {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "sgd", "optimizer_arguments": {"momentum": -1}},
        {"schedule": "reduce_lr_on_plateau", "eval_fraction": 0},
        {"schedule": "polynomial", "schedule_arguments": {"lr_end": 1}},
    ],
    ids=str,
)
def test_what_cannot_be_used_leaves_nothing_behind(
    settings: dict[str, Any], family_model: Model, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    with pytest.raises(ConfigError) as refused:
        tune(family_model("llama"), run, **settings)
    assert refused.value.exit_code == 2
    assert not run.parent.exists()


def test_other_names_of_optimizers_and_schedules_are_names_that_exist() -> None:
    assert set(VALUES["train.optimizer"].values()) <= set(OPTIMIZERS)
    assert not set(VALUES["train.optimizer"]) & set(OPTIMIZERS)
    assert set(VALUES["train.schedule"].values()) <= set(SCHEDULES)
    assert not set(VALUES["train.schedule"]) & set(SCHEDULES)
    for name in ("adamw", "adam", "sgd", "lion", "adafactor", "adamw_8bit"):
        assert planned("builtin:tiny", hardware=machine(), optimizer=name).optimizer.value in RUNNABLE


# ------------------------------------------------------------------ schedules


def test_every_schedule_of_transformers_is_described() -> None:
    assert {str(kind.value) for kind in SchedulerType} == set(SCHEDULES)
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        described = SCHEDULES[kind.value]
        real = load(described.factory)
        if not described.needs_evaluation:  # those pass all arguments on to a class
            assert real is function
        parameters = inspect.signature(real).parameters
        assert set(described.arguments) <= set(parameters) - set(of_schedules.DECIDED_ELSEWHERE)
        required = {name for name, one in parameters.items() if one.default is inspect.Parameter.empty}
        assert required <= set(of_schedules.DECIDED_ELSEWHERE) | set(described.arguments)
        has_warmup = "num_warmup_steps" in parameters
        assert described.has_warmup is has_warmup


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_trains_to_its_end(name: str, family_model: Model, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tune(family_model("llama"), run, schedule=name, max_steps=6, **QUICK)
    plan = plan_in(run)
    assert set(plan.schedule_arguments.value) == set(SCHEDULES[name].arguments)
    assert (plan.schedule_arguments.source, len(history(run))) == ("default", 6)
    assert all(0 <= step[3] <= 1e-3 * (1 + 1e-9) for step in history(run))


def rates(model: Path, run: Path, **changes: Any) -> list[float]:
    """The learning rate of each update."""
    tune(model, run, **({"warmup_ratio": 0, "max_steps": 12, "learning_rate": 1e-3} | changes), **QUICK)
    return [step[3] for step in history(run)]


def test_cosine_with_restarts_restarts(family_model: Model, tmp_path: Path) -> None:
    model = family_model("llama")
    for number, (asked, peaks) in enumerate(((None, 2), ({"num_cycles": 3}, 3))):
        arguments = {"schedule_arguments": asked} if asked else {}
        found = rates(model, tmp_path / f"run{number}", schedule="cosine_with_restarts", **arguments)
        assert found.count(found[0]) == peaks
        assert plan_in(tmp_path / f"run{number}").schedule_arguments.value == {"num_cycles": peaks}


def test_the_arguments_of_a_schedule_are_followed(family_model: Model, tmp_path: Path) -> None:
    model = family_model("llama")
    squared = rates(model, tmp_path / "squared", schedule="polynomial", schedule_arguments={"power": 2, "lr_end": 0.0})
    assert squared == pytest.approx([1e-3 * (1 - n / 12) ** 2 for n in range(12)])
    least = rates(model, tmp_path / "least", schedule="cosine_with_min_lr", schedule_arguments={"min_lr": 5e-4})
    assert min(least) > 5e-4
    assert plan_in(tmp_path / "least").schedule_arguments.value == {"min_lr": 5e-4}
    stable = rates(
        model,
        tmp_path / "stable",
        schedule="warmup_stable_decay",
        schedule_arguments={"num_decay_steps": 4, "decay_type": "linear"},
    )
    assert stable == pytest.approx([1e-3] * 9 + [7.5e-4, 5e-4, 2.5e-4])


def test_a_plateau_lowers_the_learning_rate(family_model: Model, tmp_path: Path) -> None:
    """With a threshold that no evaluation reaches, the rate falls at every second evaluation after the first."""
    arguments = {"factor": 0.5, "threshold": 0.99, "patience": 1}
    found = rates(
        family_model("llama"),
        tmp_path / "run",
        schedule="reduce_lr_on_plateau",
        schedule_arguments=arguments,
        **{"evaluate.every_steps": 2, "evaluate.patience": 4},
    )
    assert len(evaluations(tmp_path / "run")) == 6
    assert found == pytest.approx([1e-3] * 6 + [5e-4] * 4 + [2.5e-4] * 2)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy", "cosine_with_restarts"])
def test_a_resumed_schedule_goes_on_as_if_nothing_had_happened(name: str, family_model: Model, tmp_path: Path) -> None:
    how = {"schedule": name, "schedule_arguments": {} if "cosine" in name else {"threshold": 0.5, "patience": 0}}
    how |= {"max_steps": 8, "evaluate.every_steps": 2, **QUICK}
    whole = tune(family_model("llama"), tmp_path / "whole", **how)
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(5)], **how)
    again = tune(family_model("llama"), tmp_path / "cut", **how)
    assert history(again.run_dir) == history(whole.run_dir)
    expected, found = weights(whole.run_dir), weights(again.run_dir)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_begun_run_takes_another_schedule_and_no_other_optimizer(family_model: Model, tmp_path: Path) -> None:
    model, run = family_model("llama"), tmp_path / "run"
    how = {"schedule": "polynomial", "warmup_ratio": 0, "max_steps": 8, **QUICK}
    with pytest.raises(Preempted):
        tune(model, run, callbacks=[SignalAt(4)], **how)
    with pytest.raises(OutputError, match=r"train\.optimizer_arguments"):
        FineTuner.resume(run, ROWS, flags=["train.optimizer_arguments.eps=1e-6"])
    FineTuner.resume(run, ROWS, flags=["train.schedule_arguments.power=2", "train.schedule_arguments.lr_end=0"])
    found = [step[3] for step in history(run)]
    assert found[:4] == pytest.approx([1e-7 + (1e-3 - 1e-7) * (1 - n / 8) for n in range(4)])
    assert found[4:] == pytest.approx([1e-3 * (1 - n / 8) ** 2 for n in range(4, 8)])


@pytest.mark.parametrize(
    ("schedule", "arguments", "says"),
    [
        ("polynomial", {"powr": 2}, "powr: unknown argument, did you mean 'power'?"),
        ("polynomial", {"power": "two"}, "power: got 'two', expected a number"),
        ("polynomial", {"power": -1.5}, "the learning rate of"),
        ("polynomial", {"lr_end": 0.5}, "must be smaller than initial lr"),
        ("cosine_with_restarts", {"num_cycles": 2.5}, "num_cycles: got 2.5, expected an integer"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.1}, "min_lr: got 0.1, but the peak"),
        ("warmup_stable_decay", {"decay_type": "sudden"}, "Unknown decay type: sudden"),
        ("warmup_stable_decay", {"num_decay_steps": 10_000}, "num_decay_steps: got 10000, but"),
        ("warmup_stable_decay", {"num_stable_steps": 3}, "num_stable_steps: cannot be given here; leave it out"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("linear", {"num_warmup_steps": 5}, "num_warmup_steps: cannot be given here; give train.warmup_ratio"),
        ("constant", {"power": 2}, "power: unknown argument; this one takes no arguments"),
        ("constant_with_warmup", {"power": 2}, "power: unknown argument; this one takes no arguments"),
        ("reduce_lr_on_plateau", {"patience": 9}, "patience: 9 means that the learning rate changes after 10"),
        ("reduce_lr_on_plateau", {"mode": "max"}, "mode: cannot be given here; give evaluate.greater_is_better"),
        ("greedy", {"max_lr": 1e-9}, "max_lr: got 1e-09, but the peak"),
        ("greedy", {"factor": 2.0}, "Factor should be < 1.0"),
    ],
)
def test_a_wrong_argument_of_a_schedule_is_explained(schedule: str, arguments: dict[str, Any], says: str) -> None:
    (problem,) = problems(schedule=schedule, schedule_arguments=arguments)
    assert problem.startswith("train.schedule_arguments")
    assert says in problem


def test_a_schedule_that_goes_by_evaluations_acts_before_the_run_stops() -> None:
    for name in ("reduce_lr_on_plateau", "greedy"):
        plan = planned(schedule=name)
        assert plan.schedule_arguments.value["patience"] + 1 < plan.patience.value
        (problem,) = problems(schedule=name, eval_rows=0)
        assert "goes by the results of evaluations, and no rows are held out" in problem
        (problem,) = problems(schedule=name, patience=1)
        assert "give a larger evaluate.patience" in problem


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_chosen_arguments_suit_runs_of_every_length(name: str) -> None:
    for steps in (1, 2, 5, 17, 1000):
        for ratio in (0.0, 0.5) if SCHEDULES[name].has_warmup else (0.0,):
            plan = make_plan(request_for(schedule=name, max_steps=steps, warmup_ratio=ratio), alternatives=False)
            course = {"learning_rate": plan.learning_rate.value, "warmup": plan.warmup_updates.value, "updates": steps}
            assert schedule_refusal(name, plan.schedule_arguments.value, **course) is None


# ------------------------------------------------------------------ trackers


def test_every_tracker_of_transformers_is_described() -> None:
    assert set(INTEGRATION_TO_CALLBACK) == set(TRACKERS)


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_reports_or_is_refused_by_name(name: str, family_model: Model, tmp_path: Path) -> None:
    if TRACKERS[name].problem() is None:
        tune(family_model("llama"), tmp_path / "run", report_to=[name], max_steps=2, **QUICK)
        assert len(losses(tmp_path / "run")) == 2
        return
    (problem,) = problems(report_to=[name])
    assert problem.startswith(f"monitor.report_to: got '{name}', which needs ")
    packages = TRACKERS[name].packages
    assert not packages or any(package.command in problem for package in packages)


def test_tensorboard_is_named_with_its_extra() -> None:
    (package,) = TRACKERS["tensorboard"].packages
    assert package.command == "pip install 'llmtune[tracking]'"


def test_all_and_none_are_words_for_trackers() -> None:
    assert resolve_trackers(["none"]) == resolve_trackers([]) == ()
    assert resolve_trackers(["all"]) == tuple(name for name, one in TRACKERS.items() if one.problem() is None)
    (notice,) = [text for text in planned(report_to=["all"]).notices if "report_to" in text]
    assert all(name in notice for name in resolve_trackers(["all"]))
    found = problems(report_to=["all", "tensorboard"])  # and what tensorboard needs, where it is not installed
    assert "monitor.report_to: got 'all' and other names; give it alone" in found
    (problem,) = problems(report_to=["tensorbord"])
    assert problem == "monitor.report_to: got 'tensorbord', did you mean 'tensorboard'?"


def test_a_credential_is_looked_for_before_a_run_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    account = Credential(variables=("A_TRACKERS_KEY",), files=((".netrc", "tracker.example"),), command="tracker login")
    tracker = Tracker(name="x", packages=(Package(modules=("json",), install="x"),), credential=account)
    assert tracker.problem() == "which needs A_TRACKERS_KEY: tracker login"
    (tmp_path / ".netrc").write_text("machine other.example")
    assert tracker.problem() is not None
    (tmp_path / ".netrc").write_text("machine tracker.example login me")
    assert tracker.problem() is None
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("A_TRACKERS_KEY", "k")
    assert tracker.problem() is None


def test_a_folder_of_logs_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "folder_of_logs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not Package(modules=("folder_of_logs",), install="x").is_installed
    assert not Package(modules=("no_such_parent.child",), install="x").is_installed
    assert Package(modules=("no_such_thing", "json"), install="x").is_installed
    old = Package(modules=("pytest",), install="pytest>=999", least="999", distribution="pytest")
    assert not old.is_installed
    assert old.command == "pip install 'pytest>=999'"


def test_the_table_says_for_each_name_what_it_needs() -> None:
    table = usable_settings("cpu")
    assert set(table) == {"train.optimizer", "train.schedule", "monitor.report_to"}
    assert not table["train.optimizer"]["paged_adamw_8bit"].available
    assert usable_settings("cuda")["train.optimizer"]["paged_adamw_8bit"].available
    assert "held-out rows" in table["train.schedule"]["greedy"].why
    assert all(one.why for names in table.values() for one in names.values())
