"""Faults 25 to 34 of the catalogue: what a run that was cut goes on with, and what it refuses to go on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cutting import CUT, MODES, assert_equal, cut_and_resumed, in_process, matrix_settings, resume, train
from transformers import TrainerCallback
from tuning import ROWS, SignalAt, events, history, losses, tune

from llmtune import FineTuner
from llmtune.errors import DataError, OutputError, Preempted
from llmtune.hardware import accelerate_config_path
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.fault
Model = Callable[[str], Path]
SHORT = CUT | {"max_steps": 8, "evaluate.every_steps": 4}
# One cut for every way to train, spread over the run; the full matrix is in test_sweep_cuts.py.
DIAGONAL = [
    (k, mode, packing, passes)
    for k, (mode, packing, passes) in zip(
        (1, 3, 5, 6, 8, 10, 11, 13, 14, 16, 18, 19),
        ((mode, packing, passes) for mode in MODES for packing in (False, True) for passes in (1, 3)),
        strict=True,
    )
]


class RandomNoise(TrainerCallback):
    """Draws from every global random state in each update, and lets the result decide the gradient."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        factor = 1 + random.random() + np.random.rand() + float(torch.rand(()))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def stopped(model: Path, output: Path, *, after: int = 4, **changes: Any) -> None:
    """A run that was stopped by a signal after an update."""
    with pytest.raises(Preempted):
        tune(model, output, callbacks=[SignalAt(after)], **changes)


# --- bitwise ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("k", "mode", "packing", "passes"), DIAGONAL)
def test_fault_25_cut_at_a_step(
    family_model: Model, tmp_path: Path, k: int, mode: str, packing: bool, passes: int
) -> None:
    how = matrix_settings(mode, packing, passes)
    assert in_process(train, family_model("llama"), tmp_path / "whole", **how) == 0
    cut_and_resumed(family_model("llama"), tmp_path / "cut", k, **how)
    assert_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("deaths", [(3, 6), (2, 5, 8)], ids=["twice", "three times"])
def test_fault_26_cut_and_resumed_again(family_model: Model, tmp_path: Path, deaths: tuple[int, ...]) -> None:
    assert in_process(train, family_model("llama"), tmp_path / "whole", **SHORT) == 0
    assert in_process(train, family_model("llama"), tmp_path / "cut", kill_in=deaths[0], **SHORT) == -signal.SIGKILL
    for death in deaths[1:]:
        assert in_process(resume, tmp_path / "cut", kill_in=death) == -signal.SIGKILL
    assert in_process(resume, tmp_path / "cut") == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"callbacks": [RandomNoise()]}, id="random draws"),
        pytest.param({"micro_batch_size": 2, "token_budget": 128}, id="grouped by length"),
        pytest.param({"packing": True, "token_budget": 128}, id="packed"),
        pytest.param({"num_workers": 1}, id="a loader process", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize("k", [6, 7], ids=["between epochs", "in the third epoch"])
def test_fault_27_randomness_and_grouping(family_model: Model, tmp_path: Path, how: dict[str, Any], k: int) -> None:
    callbacks, how = how.get("callbacks", ()), {name: value for name, value in how.items() if name != "callbacks"}
    model = family_model("llama")
    assert in_process(train, model, tmp_path / "whole", *callbacks, **SHORT, **how) == 0
    cut_and_resumed(model, tmp_path / "cut", k, *callbacks, **SHORT, **how)
    assert_equal(tmp_path / "whole", tmp_path / "cut")


# --- changed: exact, applied or refused -------------------------------------------------------------------------------


def test_fault_28_another_global_batch_is_refused(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run")
    with pytest.raises(OutputError, match=r"train.global_batch_size 8 -> 4 \(rows .* skipped or repeated\)") as refused:
        FineTuner.resume(tmp_path / "run", ROWS, global_batch_size=4)
    assert refused.value.exit_code == 2
    with pytest.raises(OutputError, match="holds another run"):
        tune(family_model("llama"), tmp_path / "run", global_batch_size=4)
    FineTuner.resume(tmp_path / "run", ROWS)
    assert len(history(tmp_path / "run")) == 6


@pytest.mark.slow
def test_fault_28_another_number_of_processes_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = {"max_steps": 6, "global_batch_size": 5, "precision": "fp32", "dropout": 0.0, "learning_rate": 1e-3}
    keys |= {"num_samples": 0, "monitor.report": False, "save.every_steps": 3, "threads": 1}
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(accelerate_config_path("cpu_ddp"))]

    def program(output: str, *front: str) -> str:
        where = ["--output", str(tmp_path / output), "--set", f"output.root={tmp_path}"]
        command = [*front, "-m", "llmtune", "train", str(data), "--model", "builtin:tiny", *where, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    program("alone", sys.executable)
    shutil.copytree(tmp_path / "alone", tmp_path / "pair")  # as if it had died after its third update
    run = RunDirectory.open(tmp_path / "pair")
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.adapter)
    run.update_run(status="running")
    said = program("pair", *launch)
    assert "processes 1 -> 2" in said
    assert "dropout" in said
    one, two = history(tmp_path / "alone"), history(tmp_path / "pair")
    assert [step[4:] for step in one] == [step[4:] for step in two]  # the same tokens in every update
    assert np.abs(np.subtract(losses(tmp_path / "alone"), losses(tmp_path / "pair"))).max() < 1e-5
    assert events(tmp_path / "pair", "run_started")[-1]["processes"] == 2


def test_fault_29_other_data_are_refused(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run")
    others = [*ROWS[:-1], ROWS[-1] | {"answer": "Nobody."}]
    with pytest.raises(OutputError, match=r"data .* -> .* \(it would be another run.*put the data back") as refused:
        FineTuner.resume(tmp_path / "run", others)
    assert refused.value.exit_code == 2
    with pytest.raises(OutputError, match=r"holds another run.*\(data differs\)"):
        tune(family_model("llama"), tmp_path / "run", others)
    assert len(history(tmp_path / "run")) == 4


def test_fault_30_another_base_model_is_refused(family_model: Model, tmp_path: Path) -> None:
    model = shutil.copytree(family_model("llama"), tmp_path / "TinyLlama-copy")
    stopped(model, tmp_path / "run")
    weights = model / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(OutputError, match=r"begun with another base model: model.safetensors differ") as refused:
        FineTuner.resume(tmp_path / "run", ROWS)
    assert refused.value.exit_code == 2
    assert len(history(tmp_path / "run")) == 4
    weights.write_bytes(good)
    moved = model.rename(tmp_path / "TinyLlama-moved")
    FineTuner.resume(tmp_path / "run", ROWS, model=str(moved))  # the same files elsewhere
    assert len(history(tmp_path / "run")) == 6


@pytest.mark.slow
def test_fault_30_a_moved_revision_of_the_hub_is_told_by_its_files(family_model: Model, tmp_path: Path) -> None:
    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    commits = [letter * 40 for letter in "abc"]  # b: the same files again; c: other weights
    place = tmp_path / "hub" / "models--acme--TinyLlama"
    for commit in commits:
        shutil.copytree(family_model("llama"), place / "snapshots" / commit)
    weights = place / "snapshots" / commits[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (place / "refs").mkdir()
    keys = {"max_steps": 2, "num_samples": 0, "monitor.report": False, "threads": 1, "learning_rate": 1e-3}
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]

    def program(commit: str, *command: str) -> subprocess.CompletedProcess[str]:
        (place / "refs" / "main").write_text(commit)
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-m", "llmtune", *command],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
            cwd=tmp_path,
        )

    begun = program(commits[0], "train", str(data), "--model", "acme/TinyLlama", "--output", "run", *flags)
    assert begun.returncode == 0, begun.stderr
    RunDirectory.open(tmp_path / "run").update_run(status="running")
    same = program(commits[1], "resume", "run")
    assert same.returncode == 0, same.stderr
    RunDirectory.open(tmp_path / "run").update_run(status="running")
    other = program(commits[2], "resume", "run")
    assert other.returncode == 2, other.stderr
    assert "model.safetensors differ" in other.stderr
    assert f"model.revision={commits[1]}" in other.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": "adafactor"}, "train.optimizer auto -> adafactor"),
        ({"seed": 7}, "train.seed 42 -> 7"),
        ({"weight_decay": 0.5}, "train.weight_decay auto -> 0.5"),
        ({"rank": 8}, "adapter.rank 4 -> 8"),
        ({"precision": "bf16"}, "train.precision fp32 -> bf16"),
        ({"method": "full"}, "train.method auto -> full"),
        ({"metric": "perplexity"}, "evaluate.metric eval_loss -> perplexity"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fault_31_what_cannot_change_is_refused(
    begun: Path, family_model: Model, change: dict[str, Any], named: str
) -> None:
    before = (begun / "events.jsonl").read_bytes()
    with pytest.raises(OutputError, match=named) as refused:
        FineTuner.resume(begun, ROWS, **change)
    assert refused.value.exit_code == 2
    assert "another --output" in str(refused.value)
    with pytest.raises(OutputError, match=named):
        tune(family_model("llama"), begun, **change)
    assert (begun / "events.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def begun(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its fourth update of six."""
    output = tmp_path_factory.mktemp("begun") / "run"
    stopped(family_model("llama"), output, schedule="linear", warmup_ratio=0)
    return output


def test_fault_31_another_learning_rate_is_applied_when_the_run_is_named(
    begun: Path, family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(begun, tmp_path / "run")
    how = {"schedule": "linear", "warmup_ratio": 0}
    with pytest.raises(OutputError, match=r"learning_rate 0.001 -> 0.003.*llmtune resume .* --set train.learning_rate"):
        tune(family_model("llama"), output, learning_rate=3e-3, **how)
    FineTuner.resume(output, ROWS, learning_rate=3e-3)
    rates = [step[3] for step in history(output)]
    assert rates == pytest.approx([1e-3 * (6 - k) / 6 for k in range(4)] + [3e-3 * (6 - k) / 6 for k in (4, 5)])
    assert "train.learning_rate 0.001 -> 0.003" in capsys.readouterr().err
    run = RunDirectory.open(output)
    assert run.run["changes"][0] == {
        "step": 4,
        "name": "train.learning_rate",
        "before": 0.001,
        "now": 0.003,
        "effect": "applies",
    }
    assert run.latest_plan()["choices"]["learning_rate"]["value"] == 3e-3
    again = tune(family_model("llama"), output, learning_rate=3e-3, **how)  # its configuration is the changed one now
    assert again.status == "finished"


def test_fault_32_a_finished_run_makes_no_further_update(family_model: Model, tmp_path: Path) -> None:
    result = tune(family_model("llama"), tmp_path / "run", max_steps=7)  # no whole number of epochs
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    for again in (
        FineTuner.resume(tmp_path / "run", ROWS),
        FineTuner.resume(tmp_path / "run", ROWS, max_steps=5),
        FineTuner.resume(tmp_path / "run", ROWS, learning_rate=1e-4),
        tune(family_model("llama"), tmp_path / "run", max_steps=7),
    ):
        assert (again.status, again.steps, again.metrics) == ("finished", 7, result.metrics)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_fault_33_an_early_stop_that_was_saved_stays_one(family_model: Model, tmp_path: Path) -> None:
    """Killed after the save of the step at which the run stopped early: nothing is left to do."""
    how = {"learning_rate": 0.5, "schedule": "constant", "max_steps": 30, "patience": 2, "min_delta": 0.05}
    how |= {"evaluate.every_steps": 2, "save.every_steps": 2}
    result = tune(family_model("llama"), tmp_path / "run", **how)
    (stop,) = events(tmp_path / "run", "early_stop")
    run = RunDirectory.open(tmp_path / "run")
    shutil.rmtree(run.adapter)
    run.update_run(status="running", metrics=None, best=None)
    again = FineTuner.resume(tmp_path / "run", ROWS)
    assert (again.steps, again.metrics) == (stop["step"], result.metrics)
    longer = FineTuner.resume(tmp_path / "run", ROWS, max_steps=40, patience=9)  # the user may want more all the same
    assert longer.steps > stop["step"]


def test_fault_33_what_guards_have_seen_comes_back(family_model: Model, tmp_path: Path) -> None:
    assert in_process(train, family_model("llama"), tmp_path / "whole", **SHORT) == 0
    cut_and_resumed(family_model("llama"), tmp_path / "cut", 5, **SHORT)
    states = []
    for name in ("whole", "cut"):
        state = json.loads((tmp_path / name / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
        states.append(state["stateful_callbacks"])
    assert states[0] == states[1]
    assert len(states[0]["NumberGuard"]["attributes"]["recent"]["usual"]) > 0


def test_fault_34_streamed_data_are_refused_by_name(family_model: Model, tmp_path: Path) -> None:
    from datasets import Dataset

    streams = (
        (Dataset.from_list(ROWS).to_iterable_dataset(), r"a stream of rows \(IterableDataset\) was given"),
        ((row for row in ROWS), "data of type generator cannot be read; expected a path"),
    )
    for stream, said in streams:
        with pytest.raises(DataError, match=said):
            tune(family_model("llama"), tmp_path / "run", stream)
    assert not (tmp_path / "run").exists()
