"""Saves of real runs: in the background as in the foreground, compressed, averaged, shown; what their manifests say."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from tuning import ROWS, SignalAt, evaluations, events, history, tune, weights

import llmtune.training.train as training
from llmtune import FineTuner
from llmtune.checkpoints import average, list_checkpoints, read_manifest, verify, write_manifest
from llmtune.checkpoints.compression import COMPRESSED, OPTIMIZER
from llmtune.checkpoints.manifest import sha256_of
from llmtune.cli import main
from llmtune.errors import CheckpointError, OutputError, Preempted, TrainingError
from llmtune.runs import RunDirectory
from llmtune.training.saved_facts import is_worse
from llmtune.training.saving import unreadable

Model = Callable[[str], Path]
HOW: dict[str, Any] = {"max_steps": 7, "dropout": 0.1, "evaluate.every_steps": 2}


def saved(**how: bool) -> dict[str, Any]:
    """Settings of a run that saves so."""
    return HOW | {f"save.{name}": value for name, value in how.items()}


def files_of(checkpoint: Path) -> dict[str, Any]:
    files = {str(p.relative_to(checkpoint)): sha256_of(p) for p in checkpoint.rglob("*") if p.is_file()}
    del files["manifest.json"]  # says how the run was configured; what else it says must be the same
    facts = read_manifest(checkpoint)
    return files | {key: facts[key] for key in ("metrics", "cursor", "random_states", "finite_weights", "files")}


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


# --- in the background ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "how"),
    [
        pytest.param("llama", {}, id="lora"),
        pytest.param("qwen2", {"method": "full"}, id="full", marks=pytest.mark.slow),
        pytest.param("llama", {"train.optimizer": "adamw_bnb_8bit"}, id="lora-8bit", marks=pytest.mark.slow),
    ],
)
def test_a_save_in_the_background_is_file_for_file_that_in_the_foreground(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, how: dict[str, Any]
) -> None:
    """One directory for both, because the checkpoints name it."""
    run = tmp_path / "run"
    tune(family_model(family), run, **HOW, **how)
    run.rename(tmp_path / "foreground")
    writers: list[str] = []
    real = training.UpdateTrainer._save_behind
    monkeypatch.setattr(
        training.UpdateTrainer, "_save_behind", lambda self: (writers.append(self.state.global_step), real(self))[1]
    )
    tune(family_model(family), run, **saved(asynchronous=True), **how)
    assert writers == [4, 6]  # the first is made in the foreground, and the last
    names = sorted(path.name for path in (tmp_path / "foreground" / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in names:
        assert files_of(run / "checkpoints" / name) == files_of(tmp_path / "foreground" / "checkpoints" / name)
    assert history(run) == history(tmp_path / "foreground")
    assert same_weights(run, tmp_path / "foreground")


def test_callbacks_are_told_after_the_commit_on_the_training_thread(family_model: Model, tmp_path: Path) -> None:
    told: list[tuple[int, bool, bool]] = []

    class Told(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            path = tmp_path / "run" / "checkpoints" / f"checkpoint-{state.global_step}"
            told.append((state.global_step, verify(path).ok, threading.current_thread() is threading.main_thread()))

    tune(family_model("llama"), tmp_path / "run", callbacks=[Told()], **saved(asynchronous=True))
    assert told == [(step, True, True) for step in (2, 4, 6, 7)]
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint_saved")] == [2, 4, 6, 7]
    assert [event["deleted_step"] for event in events(tmp_path / "run", "checkpoint_deleted")] == [2]


@pytest.mark.slow
def test_stopped_while_a_save_is_in_flight_everything_is_saved_and_goes_on(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    how = saved(asynchronous=True)
    with pytest.raises(Preempted, match="after step 5"):
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(5)], **how)
    assert [info.step for info in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [5, 4, 2]
    FineTuner.resume(tmp_path / "cut", ROWS)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


class Fail(TrainerCallback):
    """Puts something in the way of the save after ``step``, or raises in the update after it."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


@pytest.mark.slow
def test_an_error_of_the_writer_surfaces_in_training(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid() -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("llmtune.training.snapshot.torch.save", refuse)

    how = saved(asynchronous=True)
    with pytest.raises(
        TrainingError, match=r"step 4 could not be written.*twice: Input/output error.* needed, .* free"
    ):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Fail(4, forbid)], **how)
    assert [info.step for info in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_save_in_flight_is_finished_before_an_error_leaves_the_loop(family_model: Model, tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise ZeroDivisionError("a mistake of the user's")

    with pytest.raises(Exception, match="a mistake of the user's"):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Broken()], **saved(asynchronous=True))
    infos = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [(info.step, info.verified) for info in infos] == [(4, True), (2, True)]
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint_saved")] == [2, 4]


def test_what_is_written_later_is_what_was_true_when_it_was_copied() -> None:
    from llmtune.training.snapshot import Copies, in_host_memory

    tensor = torch.arange(4.0)
    pair = (0.9, 0.999)
    state = {"state": {0: {"a": tensor, "b": tensor.view(2, 2)}}, "groups": [{"betas": pair}, {"betas": pair}]}
    copied = in_host_memory(state, Copies({}))
    tensor.add_(1)
    state["groups"][0]["betas"] = None
    assert torch.equal(copied["state"][0]["a"], torch.arange(4.0))
    assert copied["groups"][0]["betas"] is copied["groups"][1]["betas"]


# --- compressed -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_a_compressed_optimizer_resumes_bitwise(family_model: Model, tmp_path: Path, asynchronous: bool) -> None:
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    how = saved(asynchronous=asynchronous, compress_optimizer=True)
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(5)], **how)
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-5"
    assert (newest / COMPRESSED).is_file()
    assert not (newest / OPTIMIZER).exists()
    FineTuner.resume(tmp_path / "cut", ROWS)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert not [path for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name.startswith(".")]


# --- manifests --------------------------------------------------------------------------------------------------------


def test_a_manifest_says_where_the_run_was_and_what_wrote_it(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run", **HOW)
    run = RunDirectory.open(tmp_path / "run")
    newest, older = list_checkpoints(run.checkpoints)[:2]
    facts = read_manifest(newest.path)
    assert facts["step"] == 7
    assert facts["finite_weights"] is True
    assert (facts["open_incident"], facts["evaluation_worse"]) == (False, False)
    assert facts["data_fingerprint"] == run.run["data_fingerprint"]
    assert {key: facts["cursor"][key] for key in ("epoch", "update", "rows")} == {"epoch": 2, "update": 1, "rows": 54}
    assert facts["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "safetensors"} <= facts["versions"].keys()
    assert len(facts["random_states"]) == len(facts["manifest_sha256"]) == 64
    losses = evaluations(tmp_path / "run")
    assert [info.metrics["eval_loss"] for info in (newest, older)] == [losses[7], losses[6]]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        facts["files"]
    )
    assert "training_args.bin" not in facts["files"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in newest.path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("last", "best", "greater", "worse"),
    [
        *((1.05, 1.0, False, False), (1.2, 1.0, False, True), (0.95, 1.0, True, False), (0.8, 1.0, True, True)),
        *((math.nan, 1.0, False, True), (None, 1.0, False, False), (1.0, None, False, False)),
        (-0.9, -1.0, False, False),
    ],
)
def test_an_evaluation_far_from_the_best_is_not_healthy(
    last: float | None, best: float | None, greater: bool, worse: bool
) -> None:
    assert is_worse(last, best, greater_is_better=greater) is worse


@pytest.mark.slow
def test_the_best_is_verified_before_it_becomes_the_result(family_model: Model, tmp_path: Path) -> None:
    """The best checkpoint is damaged while the run goes on: the best of those that verify is the result, said so."""

    class Damage(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            path = Path(state.best_model_checkpoint) / "adapter_model.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    calls = itertools.count()
    how = {"max_steps": 9, "metric": "falling", "max_new_tokens": 2, "metric_rows": 1}
    metrics = {"falling": lambda answers, references: -float(next(calls))}
    tune(family_model("llama"), tmp_path / "run", callbacks=[Damage()], metrics=metrics, **how)
    infos = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert {info.step: info.verified for info in infos}.items() >= {9: True, 6: True, 3: False}.items()
    assert RunDirectory.open(tmp_path / "run").run["best"]["step"] == 6  # of 3, 6 and 9 each is worse than the last


@pytest.mark.slow
def test_a_state_that_this_transformers_cannot_read_is_named(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run", **HOW)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-7"
    assert unreadable(newest) is None
    facts = read_manifest(newest)
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps(state | {"colour": "red"}))
    write_manifest(newest, {key: facts[key] for key in ("step", "versions")})
    assert verify(newest).ok
    assert "colour" in str(unreadable(newest))


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    tune(family_model("llama"), root / "lora", **HOW)
    tune(family_model("qwen2"), root / "full", **HOW, method="full")
    return {"lora": root / "lora", "full": root / "full"}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_average_is_the_arithmetic_mean_and_loads(
    runs: dict[str, Path], family_model: Model, tmp_path: Path, kind: str
) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    paths = [info.path for info in list_checkpoints(runs[kind] / "checkpoints")][:3]
    target = average(paths, tmp_path / "averaged")
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    parts, mean = [load_file(path / name) for path in paths], load_file(target / name)
    assert mean.keys() == parts[0].keys()
    for key, tensor in mean.items():
        assert tensor.dtype == np.float32
        assert np.array_equal(tensor, (parts[0][key] + parts[1][key] + parts[2][key]) / np.float32(3))
    assert any(not np.array_equal(mean[key], parts[0][key]) for key in mean)
    assert not {path.name for path in target.iterdir()} & {"optimizer.pt", "trainer_state.json", "manifest.json"}
    if kind == "lora":
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(family_model("llama"), dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(target)).state_dict()
        key = next(iter(mean))
        assert np.array_equal(loaded[key.replace(".weight", ".default.weight")].numpy(), mean[key])
    else:
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
        assert all(np.array_equal(loaded[key].numpy(), tensor) for key, tensor in mean.items())


def test_what_cannot_be_averaged_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    paths = [info.path for info in list_checkpoints(runs["lora"] / "checkpoints")]
    with pytest.raises(CheckpointError, match="at least 2"):
        average(paths[:1], tmp_path / "a")
    damaged = tmp_path / paths[1].name
    shutil.copytree(paths[1], damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"not averaged: adapter_model.safetensors has 1 bytes"):
        average([paths[0], damaged], tmp_path / "b")
    with pytest.raises(CheckpointError, match="has the weights"):
        average([paths[0], list_checkpoints(runs["full"] / "checkpoints")[0].path], tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        average(paths[:2], tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "d"]


# --- the command ------------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main(["checkpoints", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_command_shows_what_a_run_has_kept(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs["lora"])
    listed = told(capsys, run)
    assert [entry["step"] for entry in listed] == [7, 6, 4]
    for entry in listed:
        assert {"step", "path", "verified", "reason", "metrics", "bytes", "healthy"} <= entry.keys()
        assert entry["verified"]
        assert entry["healthy"]
        assert (
            entry["bytes"]
            == sum(p.stat().st_size for p in Path(entry["path"]).iterdir())
            - (Path(entry["path"]) / "manifest.json").stat().st_size
        )
    assert told(capsys, run, "verify") == listed
    losses = {entry["step"]: entry["metrics"]["eval_loss"] for entry in listed if entry["metrics"]}
    assert told(capsys, run, "best")["step"] == min(losses, key=lambda step: losses[step])
    assert told(capsys, run, "best", "--metric", "perplexity")["step"] == min(losses, key=lambda step: losses[step])
    assert main(["checkpoints", run]) == 0
    shown = capsys.readouterr().out
    assert "healthy" in shown
    assert main(["checkpoints", run, "best", "--metric", "f1"]) == 2
    assert "'f1' is in no checkpoint" in capsys.readouterr().err


def test_the_command_prunes_averages_and_tells_damage(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["lora"], copy)
    run = str(copy)
    assert told(capsys, run, "average", "--best", "2", "--output", str(tmp_path / "mean"))["steps"] == [7, 6]
    assert told(capsys, run, "average") == {"path": str(copy / "averaged"), "steps": [7, 6, 4]}
    assert main(["checkpoints", run, "average", "--last", "9", "--output", str(tmp_path / "many")]) == 6
    assert told(capsys, run, "prune", "--keep", "2") == {"deleted": [4], "put_aside": []}
    (copy / "checkpoints" / "checkpoint-7" / "optimizer.pt").write_bytes(b"")
    assert told(capsys, run, "verify", code=6)[0]["reason"] == "optimizer.pt has 0 bytes, expected " + str(
        read_manifest(copy / "checkpoints" / "checkpoint-7")["files"]["optimizer.pt"]["bytes"]
    )
    assert [entry["verified"] for entry in told(capsys, run)] == [False, True]
    assert told(capsys, run, "prune") == {"deleted": [], "put_aside": [7]}
    assert [entry["step"] for entry in told(capsys, run, "verify")] == [6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bset"], "'bset' is unknown, did you mean 'best'?"),
        (["list", "--keep", "2"], "--keep means nothing to list"),
        (["prune", "--keep", "1"], "got 1, expected 2 or more"),
        (["average", "--last", "2", "--best", "2"], "give one of them"),
        (["list", "--where", "eval_los<1"], "did you mean 'eval_loss'"),
        (["best", "--where", "step=2"], "--where means nothing to best"),
        (["info", "--step", "77"], "no checkpoint of step 77"),
    ],
)
def test_the_command_says_what_it_cannot_do(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["checkpoints", str(runs["lora"]), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_checkpoints_has_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run", identity={"data": "x"})
    assert told(capsys, str(run.path)) == []


def test_one_is_shown_with_everything_that_is_known(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs["lora"])
    steps = [entry["step"] for entry in told(capsys, run)]
    facts = told(capsys, run, "info", "--step", str(steps[-1]))
    assert (facts["step"], facts["healthy"], facts["cursor.global_batch_size"]) == (steps[-1], True, 8)
    assert told(capsys, run, "info")["step"] == max(steps)
    assert [entry["step"] for entry in told(capsys, run, "list", "--where", f"step={steps[0]}")] == [steps[0]]
    assert main(["checkpoints", run, "info"]) == 0
    assert "versions.torch" in capsys.readouterr().out
