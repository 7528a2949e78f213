"""What a checkpoint says of the position in the data, what a resumed run brings back, and how a run is continued."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutting import CUT, assert_equal, in_process, resume, train
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from tuning import ROWS, SignalAt, evaluations, events, history, tune

from llmtune import FineTuner
from llmtune.config import RunConfig
from llmtune.data import Part, epoch_order
from llmtune.errors import ConfigError, OutputError, Preempted
from llmtune.finetuner.changes import TABLE
from llmtune.finetuner.continuing import _deciding
from llmtune.finetuner.verify_resume import compare, verify_resume
from llmtune.planning import Plan
from llmtune.runs import RunDirectory
from llmtune.training.continuity import Cursor, require_cursor
from llmtune.training.rollback import RollBack
from llmtune.training.updates import UpdateSampler

Model = Callable[[str], Path]


def stopped(model: Path, output: Path, *callbacks: Any, after: int = 4, **changes: Any) -> None:
    with pytest.raises(Preempted):
        tune(model, output, callbacks=[*callbacks, SignalAt(after)], **changes)


def kept_state(output: Path, step: int) -> dict[str, Any]:
    """``stateful_callbacks`` of a checkpoint."""
    path = output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json"
    states: dict[str, Any] = json.loads(path.read_text())["stateful_callbacks"]
    return states


# --- the cursor -------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 9),
    updates=st.integers(0, 60),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_cursor_is_what_the_sampler_gives(rows: int, batch: int, updates: int, ranks: int, seed: int) -> None:
    batch = min(batch, rows)
    lengths = np.arange(1, rows + 1, dtype=np.int32)
    seen: list[int] = []
    position = (0, 0)
    for update in range(updates):
        epoch, number = divmod(update, math.ceil(rows / batch))
        for rank in range(ranks):
            sampler = UpdateSampler(lengths, global_batch_size=batch, seed=seed, rank=rank, num_ranks=ranks)
            sampler.set_epoch(epoch)
            seen += [row for row in list(sampler)[number] if row >= 0]
        position = divmod(update + 1, math.ceil(rows / batch))
    cursor = Cursor.after(updates, parts=(Part(num_rows=rows),), seed=seed, global_batch_size=batch)
    assert cursor.rows == len(seen)
    assert (cursor.epoch, cursor.update) == position
    left = epoch_order((Part(num_rows=rows),), seed, cursor.epoch)[: cursor.rows - cursor.epoch * rows]
    assert sorted(seen[cursor.epoch * rows :]) == sorted(left)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 43},
        {"parts": (Part(num_rows=24),)},
        {"parts": (Part(num_rows=12), Part(num_rows=11, weight=2))},
        {"global_batch_size": 4},
    ],
    ids=["seed", "rows", "mix", "batch"],
)
def test_another_order_of_the_data_is_refused(change: dict[str, Any]) -> None:
    how: dict[str, Any] = {"parts": (Part(num_rows=23),), "seed": 42, "global_batch_size": 8}
    kept = {
        "epoch": 1,
        "update": 2,
        "rows": 39,
        "global_batch_size": 8,
        "order": Cursor.after(5, **how).order,
    }
    require_cursor(Cursor.after(5, **how), kept, 5)
    with pytest.raises(ConfigError, match="after step 5 the data are not where the checkpoint left them") as refused:
        require_cursor(Cursor.after(5, **(how | change)), kept, 5)
    assert refused.value.exit_code == 2


def test_a_checkpoint_holds_the_cursor_of_the_rows_that_were_seen(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run", after=5)
    kept = kept_state(tmp_path / "run", 5)["Continuity"]["attributes"]["cursor"]
    seen = sum(event["global_batch_size"] for event in events(tmp_path / "run", "step"))
    assert (kept["epoch"], kept["update"], kept["rows"], kept["global_batch_size"]) == (1, 2, seen, 8)


# --- what callbacks have kept -----------------------------------------------------------------------------------------


class Counter(TrainerCallback, ExportableState):
    """A user's callback with a state: what it has been told of, and an argument that only its maker knows."""

    def __init__(self, told: Callable[[str], None], every: int) -> None:
        self.told, self.every = told, every
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        return {"args": {"every": self.every}, "attributes": {"losses": self.losses}}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses = [*self.losses, logs["loss"]]
            if len(self.losses) % self.every == 0:
                self.told(f"{len(self.losses)} losses at step {state.global_step}")


def test_callbacks_of_the_user_go_on_where_they_were(
    family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []
    pair = [Counter(heard.append, 3), Counter(heard.append, 2)]  # two of one class: the Trainer mixes them up
    stopped(family_model("llama"), tmp_path / "run", *pair, after=5)
    states = kept_state(tmp_path / "run", 5)["Counter"]
    assert [len(state["attributes"]["losses"]) for state in states[-2:]] == [5, 5]
    heard.clear()
    again = [Counter(heard.append, 3), Counter(heard.append, 2)]
    FineTuner.resume(tmp_path / "run", ROWS, callbacks=again)
    assert heard == ["6 losses at step 6"] * 2
    assert [callback.losses for callback in again] == [[step[1] for step in history(tmp_path / "run")]] * 2
    assert "Counter" not in capsys.readouterr().err


def test_a_callback_that_is_missing_new_or_made_otherwise_is_named(
    family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(family_model("llama"), tmp_path / "run", Counter(print, 2))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.copytree(tmp_path / "run", tmp_path / "new")
    FineTuner.resume(tmp_path / "run", ROWS)
    assert "the state of a callback Counter that was not handed over" in capsys.readouterr().err
    FineTuner.resume(tmp_path / "other", ROWS, callbacks=[Counter(print, 4)])
    assert "callback Counter was made with {'every': 2} and now with {'every': 4}" in capsys.readouterr().err
    two = [Counter(print, 2), Counter(print, 2)]
    FineTuner.resume(tmp_path / "new", ROWS, callbacks=two)
    assert "callback Counter has no state in the checkpoint; it starts afresh" in capsys.readouterr().err
    assert [len(callback.losses) for callback in two] == [6, 2]


def test_a_stop_by_the_users_own_code_lasts(family_model: Model, tmp_path: Path) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    whole = tune(family_model("llama"), tmp_path / "run", callbacks=[Enough()])
    assert whole.steps == 4
    run = RunDirectory.open(tmp_path / "run")
    shutil.rmtree(run.adapter)
    run.update_run(status="running")  # as if it had died before the result was written
    assert FineTuner.resume(tmp_path / "run", ROWS, callbacks=[Enough()]).steps == 4


# --- changes ----------------------------------------------------------------------------------------------------------


def test_every_key_that_decides_a_run_has_one_rule() -> None:
    keys = [key for rule in TABLE for key in rule.keys]
    assert len(keys) == len(set(keys))
    assert set(_deciding(RunConfig())) == {key for key in keys if "." in key}
    choices = {name for name in Plan.__dataclass_fields__}
    assert all(set(rule.choices) <= choices for rule in TABLE)
    assert all(rule.choices == () for rule in TABLE if rule.effect == "refused")


def test_a_longer_run_lays_its_schedule_anew(
    family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"schedule": "linear", "warmup_ratio": 0}
    tune(family_model("llama"), tmp_path / "run", max_steps=4, **how)
    capsys.readouterr()
    result = tune(family_model("llama"), tmp_path / "run", max_steps=8, **how)
    assert (result.status, result.steps) == ("finished", 8)
    rates = [step[3] for step in history(tmp_path / "run")]
    assert rates == pytest.approx([1e-3 * (4 - k) / 4 for k in range(4)] + [1e-3 * (8 - k) / 8 for k in range(4, 8)])
    said = capsys.readouterr().err
    assert "train.max_steps 4 -> 8 (the schedule of the learning rate is laid anew over the whole length)" in said
    assert {3, 6} <= set(evaluations(tmp_path / "run"))
    again = FineTuner.resume(tmp_path / "run", ROWS, max_steps=10)
    assert again.steps == 10
    assert [Plan.from_json(json.loads(path.read_text())).updates.value for path in again_plans(tmp_path)][-2:] == [
        8,
        10,
    ]


def again_plans(tmp_path: Path) -> list[Path]:
    return RunDirectory.open(tmp_path / "run").plans


def test_a_shorter_run_has_to_be_asked_for_by_name(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run", after=3)
    with pytest.raises(OutputError, match=r"6 updates, of which 5 were asked for now.*--set train.max_steps=5"):
        tune(family_model("llama"), tmp_path / "run", max_steps=5)
    assert FineTuner.resume(tmp_path / "run", ROWS, max_steps=5).steps == 5


def test_another_cadence_is_taken_from_here_on(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run", after=3)
    FineTuner.resume(tmp_path / "run", ROWS, **{"evaluate.every_steps": 2, "save.every_steps": 5})
    assert sorted(evaluations(tmp_path / "run")) == [0, 3, 4, 6]
    assert 5 in [event["step"] for event in events(tmp_path / "run", "checkpoint_saved")]


def test_unknown_keys_are_refused_with_the_nearest(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "run")
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        FineTuner.resume(tmp_path / "run", ROWS, learning_rat=1e-4)


def test_a_checkpoint_of_another_run_is_refused_by_its_manifest(family_model: Model, tmp_path: Path) -> None:
    stopped(family_model("llama"), tmp_path / "one", seed=1)
    stopped(family_model("llama"), tmp_path / "two")
    foreign = tmp_path / "one" / "checkpoints" / "checkpoint-4"
    with pytest.raises(ConfigError, match=r"is of another run: its manifest has .*\(config differs\)") as refused:
        FineTuner.resume(tmp_path / "two", ROWS, **{"recover.resume": str(foreign)})
    assert refused.value.exit_code == 2
    moved = shutil.copytree(tmp_path / "two" / "checkpoints" / "checkpoint-4", tmp_path / "kept" / "checkpoint-4")
    tune(family_model("llama"), tmp_path / "three", resume=str(moved))  # a new run of the same identity
    assert [step[0] for step in history(tmp_path / "three")] == [5, 6]


def test_an_older_checkpoint_leaves_the_newer_ones_aside(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "whole")
    stopped(family_model("llama"), tmp_path / "run", after=5)
    places = tmp_path / "run" / "checkpoints"
    FineTuner.resume(tmp_path / "run", ROWS, **{"recover.resume": str(places / "checkpoint-3")})
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    rejected = [(event["path"], event["reason"]) for event in events(tmp_path / "run", "checkpoint_rejected")]
    assert rejected == [(f"checkpoint-{step}", "the run went back to checkpoint-3") for step in (5, 4)]


def test_other_versions_are_named(family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(family_model("llama"), tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    environment = run.read_json("environment.json")
    environment["versions"]["torch"] = "1.0.0"
    run.write_json("environment.json", environment)
    FineTuner.resume(tmp_path / "run", ROWS)
    assert "packages torch 1.0.0 -> torch 2." in capsys.readouterr().err


# --- going back -------------------------------------------------------------------------------------------------------


class BackOnce(TrainerCallback):
    """Goes back to a checkpoint before an update, the first time; if wanted, the process dies after that."""

    def __init__(self, at: int, checkpoint: Path, skip: range, dies_at: int | None = None) -> None:
        self.at, self.checkpoint, self.skip, self.dies_at, self.done = at, checkpoint, skip, dies_at, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done and state.global_step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.at and not self.done:
            self.done = True
            raise RollBack("a test", checkpoint=self.checkpoint, learning_rate_factor=0.5, skip=self.skip)


def test_a_rolled_back_run_goes_on_in_the_same_process(family_model: Model, tmp_path: Path) -> None:
    how = {"schedule": "constant", "warmup_ratio": 0, "max_steps": 8}
    back = BackOnce(5, tmp_path / "run" / "checkpoints" / "checkpoint-2", range(3, 4))
    result = tune(family_model("llama"), tmp_path / "run", callbacks=[back], **how)
    assert result.status == "finished"
    steps = [(event["step"], event["learning_rate"]) for event in events(tmp_path / "run", "step")]
    assert steps == [(k, 1e-3) for k in range(1, 6)] + [(k, 5e-4) for k in range(3, 9)]
    assert events(tmp_path / "run", "step")[6]["grad_norm"] in (None, "nan", 0.0)  # the skipped one
    (recovery,) = [event for event in events(tmp_path / "run", "recovery") if event["action"] == "roll_back"]
    assert (recovery["step"], recovery["action"], recovery["checkpoint"]) == (5, "roll_back", "checkpoint-2")
    assert (recovery["skip"], recovery["learning_rate"]) == ([3, 4], 5e-4)
    run = RunDirectory.open(tmp_path / "run")
    assert run.latest_plan()["choices"]["learning_rate"]["value"] == 5e-4
    assert "checkpoint-4" in [event["path"] for event in events(tmp_path / "run", "checkpoint_rejected")]


def test_a_rolled_back_run_that_dies_goes_on_as_it_would_have(family_model: Model, tmp_path: Path) -> None:
    """Killed before it has saved anything new: the skipped update and the lower learning rate are not forgotten."""
    how = CUT | {"schedule": "constant", "warmup_ratio": 0, "max_steps": 8, "save.every_steps": 2}
    target, model = Path("checkpoints", "checkpoint-2"), family_model("llama")
    assert (
        in_process(train, model, tmp_path / "whole", BackOnce(5, tmp_path / "whole" / target, range(4, 5)), **how) == 0
    )
    back = BackOnce(5, tmp_path / "cut" / target, range(4, 5), dies_at=3)
    assert in_process(train, model, tmp_path / "cut", back, **how) == -signal.SIGKILL
    assert in_process(resume, tmp_path / "cut") == 0
    assert_equal(tmp_path / "whole", tmp_path / "cut")


# --- the proof for users ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "asynchronous", [pytest.param(False, id="sync"), pytest.param(True, id="async", marks=pytest.mark.sweep)]
)
def test_verify_resume_proves_equality(family_model: Model, tmp_path: Path, asynchronous: bool) -> None:
    from llmtune.config import load_config

    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    keys = {"model": str(family_model("llama")), "data.path": str(data), "adapter.dropout": 0.1}
    keys |= {"output.root": str(tmp_path / "runs"), "save.asynchronous": asynchronous, "threads": 1}
    found = verify_resume(load_config(keys), steps=5, at=2)
    assert found.difference is None
    assert {"plan", "history", "evaluations", "weights adapter_model.safetensors"} <= set(found.compared)
    assert {"optimizer optimizer.pt", "random states rng_state.pth"} <= set(found.compared)
    assert found.compared["history"] >= 5 * 6
    assert list(tmp_path.glob("**/.verify-resume-*")) == []


def test_a_difference_is_named(family_model: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stopped(family_model("llama"), tmp_path / "cut", after=2)
    FineTuner.resume(tmp_path / "cut", ROWS)
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    assert compare(tmp_path / "whole", tmp_path / "cut", steps=6, at=2).equal
    file = tmp_path / "cut" / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[3] += 0.5
    save_file(tensors, file)
    found = compare(tmp_path / "whole", tmp_path / "cut", steps=6, at=2)
    assert not found.equal
    assert f"{name}: 1 of {tensors[name].numel()} numbers differ, by up to 0.5" in str(found.difference)
    assert found.to_json()["equal"] is False


def test_the_step_of_the_cut_lies_inside(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 5, expected a step from 1 to 4"):
        verify_resume(RunConfig(), steps=5, at=5)
