"""Faults 1 to 24 and 70: crash and durability, corrupt checkpoints, links. Each is injected where it really happens.

What happens inside a save happens to forks of one run, in the kernel (see ``crash_trials.py``); the directory that is
left behind is continued by another process and must end bit for bit as the run that nothing happened to. The whole
sweep over every system call is in ``test_sweep_kills.py``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trials import needs_mount, needs_strace, survived, trials
from tuning import ROWS, SignalAt, events, history, tune, weights

from llmtune import FineTuner
from llmtune.checkpoints import MANIFEST, list_checkpoints, read_manifest, verify, write_manifest
from llmtune.errors import CheckpointError, LlmtuneError, OutputError, Preempted
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.fault

Model = Callable[[str], Path]
BEFORE, DURING = "checkpoints/checkpoint-4", "checkpoints/checkpoint-6"
HOW: dict[str, Any] = {"max_steps": 7, "dropout": 0.1, "keep": 3}


# --- crash and durability ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A save and the retention after it, killed at about twenty points; at and behind each rename among them."""
    return trials(tmp_path_factory.mktemp("killed") / "t", family_model("llama"), points=16)


def _killed_at(result: dict[str, Any], text: str) -> list[dict[str, Any]]:
    return [one for one in result["trials"] if one.get("killed") and text in one["what"]]


@needs_strace
def test_fault_01_killed_inside_a_save(killed: dict[str, Any]) -> None:
    survived(killed, started_from={BEFORE, DURING})
    assert len(_killed_at(killed, ".staging-6")) >= 5
    assert set(killed["from"].values()) == {BEFORE, DURING}


@needs_strace
def test_fault_01_killed_inside_a_save_in_the_background(family_model: Model, tmp_path: Path) -> None:
    result = trials(tmp_path / "t", family_model("llama"), points=8, asynchronous=True, thread="writer")
    survived(result, started_from={BEFORE, DURING})
    assert len(_killed_at(result, ".staging-6")) >= 5


@needs_strace
def test_fault_02_killed_while_an_old_checkpoint_is_deleted(killed: dict[str, Any]) -> None:
    during = _killed_at(killed, ".trash-")
    assert len(during) >= 2
    assert all(killed["from"][str(one["state"])] == DURING for one in during)
    survived(killed, started_from={BEFORE, DURING})


@needs_strace
def test_fault_03_killed_between_the_rename_and_the_sync_of_the_directory(killed: dict[str, Any]) -> None:
    between = _killed_at(killed, "fsync(")
    after_rename = [one for one in between if "/checkpoints>)" in one["what"]]
    assert after_rename
    assert any(killed["from"][str(one["state"])] == DURING for one in after_rename)
    survived(killed, started_from={BEFORE, DURING})


@needs_strace
def test_fault_04_killed_while_recovering_twice(family_model: Model, tmp_path: Path) -> None:
    """A killed save leaves staging and trash; the process that clears them away is killed, and the next one too."""
    run = tmp_path / "run"
    with pytest.raises(Preempted):
        tune(family_model("llama"), run, callbacks=[SignalAt(5)], **HOW)
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    checkpoints = run / "checkpoints"
    for name in (".staging-6-1-aa/checkpoint-6", ".trash-checkpoint-1-bb", ".trash-checkpoint-3-cc"):
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / name)
    (run / ".staging-adapter-dd").mkdir()
    expected = {path.name for path in checkpoints.iterdir() if path.name.startswith("checkpoint-")}
    clear = f"import sys; from pathlib import Path; from llmtune.checkpoints import *; p = Path({str(checkpoints)!r}); "
    clear += "sweep_leftovers(p); newest_verified(p, print)"
    strace = ["strace", "-f", "-o", os.devnull, "-e"]
    for number in (2, 5):
        done = subprocess.run(
            [*strace, f"inject=unlinkat,unlink:signal=SIGKILL:when={number}", sys.executable, "-c", clear],
            check=False,
            capture_output=True,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode in (-9, 137)
        assert any(path.name.startswith((".staging", ".trash")) for path in checkpoints.iterdir())
        assert {path.name for path in checkpoints.iterdir() if path.name.startswith("checkpoint-")} == expected
    FineTuner.resume(run, ROWS)
    _same(run, tmp_path / "whole")
    rest = [path.name for path in [*run.iterdir(), *checkpoints.iterdir()]]
    assert not [name for name in rest if name.startswith((".staging", ".trash"))]


@needs_strace
def test_fault_05_killed_inside_the_first_save_ever(family_model: Model, tmp_path: Path) -> None:
    result = trials(tmp_path / "t", family_model("llama"), points=8, when="first")
    survived(result, started_from={None, "checkpoints/checkpoint-2"})
    assert None in result["from"].values()


@needs_strace
def test_fault_06_killed_inside_the_final_export(family_model: Model, tmp_path: Path) -> None:
    result = trials(tmp_path / "t", family_model("llama"), points=10, when="export")
    survived(result, started_from={None, "checkpoints/checkpoint-7"})
    assert _killed_at(result, ".staging-adapter")


@pytest.fixture(scope="module")
def powerless(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The power fails after each recorded system call of a save."""
    return trials(tmp_path_factory.mktemp("powerless") / "t", family_model("llama"), fault="power")


@needs_strace
def test_fault_07_power_lost_and_what_was_not_synced_is_gone(powerless: dict[str, Any]) -> None:
    survived(powerless, started_from={BEFORE, DURING})
    assert len([one for one in powerless["trials"] if one["what"].startswith("content lost")]) > 50


@needs_strace
def test_fault_08_power_lost_and_the_rename_with_it(powerless: dict[str, Any]) -> None:
    survived(powerless, started_from={BEFORE, DURING})
    renames = [one for one in powerless["trials"] if "lost after rename" in one["what"] and ".staging-6" in one["what"]]
    lost = [one for one in renames if one["what"].startswith("all")]
    assert lost
    assert all(powerless["from"][str(one["state"])] == BEFORE for one in lost)


@needs_strace
def test_fault_09_fsync_reports_an_io_error(family_model: Model, tmp_path: Path) -> None:
    """Once: the save is written anew, and succeeds. For ever: the run stops, and what was committed stands."""
    result = trials(tmp_path / "t", family_model("llama"), fault="fsync", points=4)
    survived(result, started_from={BEFORE, DURING})
    once = [one for one in result["trials"] if not one["lasting"]]
    ever = [one for one in result["trials"] if one["lasting"] and ".staging-6" in one["what"]]
    assert ever
    assert all(os.waitstatus_to_exitcode(one["status"]) == 3 for one in ever)
    assert all(result["from"][str(one["state"])] == BEFORE for one in ever)
    assert once
    assert all(one["status"] == 0 for one in once)


@needs_mount
def test_fault_10_the_disk_is_full_at_each_file(family_model: Model, tmp_path: Path) -> None:
    result = trials(tmp_path / "t", family_model("llama"), fault="room", points=12)
    survived(result, started_from={BEFORE, DURING})
    failed = [one for one in result["trials"] if one["status"] != 0]
    assert len(failed) >= 5
    assert result["trials"][-1]["status"] == 0  # with more room it succeeds
    told = [one["failed"] for one in failed if "could not be written to" in one["failed"]]
    assert told
    assert all(" needed, " in text and " free)" in text for text in told)


@needs_mount
def test_fault_11_the_disk_has_no_inodes_left(family_model: Model, tmp_path: Path) -> None:
    result = trials(tmp_path / "t", family_model("llama"), fault="inodes")
    survived(result, started_from={BEFORE, DURING})
    failed = [one for one in result["trials"] if one["status"] != 0]
    assert len(failed) >= 3
    assert result["trials"][-1]["status"] == 0


def test_fault_12_the_output_is_a_file(family_model: Model, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OutputError, match=r"--output"):
        tune(family_model("llama"), tmp_path / "run", **HOW)
    assert (tmp_path / "run").read_text() == "in the way"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@needs_mount
def test_fault_12_the_output_is_read_only(family_model: Model, read_only: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write to .*read-only.*--output"):
        tune(family_model("llama"), read_only / "run", **HOW)


def test_fault_13_the_output_directory_vanishes(family_model: Model, tmp_path: Path) -> None:
    """It is not made again: a directory with nothing but later checkpoints would look like a run."""

    class Vanish(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                (tmp_path / "run").rename(tmp_path / "elsewhere")

    tune(family_model("llama"), tmp_path / "whole", **HOW)
    with pytest.raises(LlmtuneError, match=r"run directory"):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Vanish()], **HOW)
    assert not (tmp_path / "run").exists()
    infos = list_checkpoints(tmp_path / "elsewhere" / "checkpoints")
    assert [(info.step, info.verified) for info in infos] == [(3, True), (2, True)]
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    FineTuner.resume(tmp_path / "run", ROWS)
    _same(tmp_path / "run", tmp_path / "whole")


# --- corrupt checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that was stopped after step 5, with checkpoints 2, 4 and 5, and one that was not."""
    root = tmp_path_factory.mktemp("stopped")
    tune(family_model("llama"), root / "whole", **HOW)
    with pytest.raises(Preempted):
        tune(family_model("llama"), root / "cut", callbacks=[SignalAt(5)], **HOW)
    return {"whole": root / "whole", "cut": root / "cut"}


@pytest.fixture
def cut(stopped: dict[str, Path]) -> Iterator[Path]:
    """The run that was stopped, as it was left, at the path where it ran."""
    kept = stopped["cut"].with_name("kept")
    shutil.copytree(stopped["cut"], kept, symlinks=True)
    yield stopped["cut"]
    shutil.rmtree(stopped["cut"])
    kept.rename(stopped["cut"])


def _same(run: Path, whole: Path) -> None:
    assert history(run) == history(whole)
    one, other = weights(run), weights(whole)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def _passed_over(cut: Path, whole: Path, reason: str) -> None:
    """The damage is told, the checkpoint before is taken, and nothing is lost but a step."""
    FineTuner.resume(cut, ROWS)
    (rejected,) = events(cut, "checkpoint_rejected")[:1]
    assert (rejected["step"], reason in rejected["reason"]) == (5, True), rejected
    assert events(cut, "run_started")[1]["resumed_from"] == BEFORE
    _same(cut, whole)


def _newest(cut: Path) -> Path:
    return cut / "checkpoints" / "checkpoint-5"


def _all_files(cut: Path) -> list[Path]:
    return sorted(path for path in _newest(cut).rglob("*") if path.is_file())


def test_fault_14_each_file_missing(cut: Path, stopped: dict[str, Path]) -> None:
    for path in _all_files(cut):
        content = path.read_bytes()
        path.unlink()
        assert verify(_newest(cut)).reason.startswith(f"{path.name} is missing")
        path.write_bytes(content)
    assert verify(_newest(cut)).ok
    (_newest(cut) / "optimizer.pt").unlink()
    _passed_over(cut, stopped["whole"], "optimizer.pt is missing")


def test_fault_15_each_file_empty_truncated_or_nul(cut: Path, stopped: dict[str, Path]) -> None:
    for path in _all_files(cut):
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], content[:-1], bytes(len(content)), content + b"\0"):
            path.write_bytes(damaged)
            assert not verify(_newest(cut)).ok, path
        path.write_bytes(content)
    assert verify(_newest(cut)).ok
    (_newest(cut) / "trainer_state.json").write_bytes(b"")
    _passed_over(cut, stopped["whole"], "trainer_state.json has 0 bytes")


def test_fault_16_zeroed_tail_of_the_weights(cut: Path, stopped: dict[str, Path]) -> None:
    path = _newest(cut) / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(4096))  # full size, last page lost: loads without a word
    _passed_over(cut, stopped["whole"], "adapter_model.safetensors has another SHA-256")


def test_fault_17_no_bit_flip_is_silent(cut: Path, stopped: dict[str, Path]) -> None:
    draw = random.Random(17)
    files = _all_files(cut)
    silent = []
    for _ in range(200):
        path = draw.choices(files, weights=[file.stat().st_size for file in files])[0]
        content = bytearray(path.read_bytes())
        position, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        content[position] ^= bit
        path.write_bytes(content)
        if verify(_newest(cut)).ok:
            silent.append((path.name, position, bit))
        content[position] ^= bit
        path.write_bytes(content)
    assert silent == []
    content[position] ^= bit
    path.write_bytes(content)
    _passed_over(cut, stopped["whole"], path.name)


def test_fault_18_files_of_another_step(cut: Path, stopped: dict[str, Path]) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        path = _newest(cut) / name
        content = path.read_bytes()
        shutil.copyfile(_newest(cut).with_name("checkpoint-4") / name, path)
        assert f"{name} has" in verify(_newest(cut)).reason
        path.write_bytes(content)
    shutil.copyfile(_newest(cut).with_name("checkpoint-4") / "optimizer.pt", _newest(cut) / "optimizer.pt")
    _passed_over(cut, stopped["whole"], "optimizer.pt has another SHA-256")


def test_fault_19_an_extra_file(cut: Path, stopped: dict[str, Path]) -> None:
    (_newest(cut) / "pytorch_model.bin").write_bytes(b"")
    _passed_over(cut, stopped["whole"], "pytorch_model.bin is not in the manifest")


@pytest.mark.parametrize("how", ["edited", "missing"])
def test_fault_20_the_manifest_edited_or_missing(cut: Path, stopped: dict[str, Path], how: str) -> None:
    path = _newest(cut) / MANIFEST
    if how == "missing":
        path.unlink()
        _passed_over(cut, stopped["whole"], "manifest.json is missing")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finite_weights": 1}))
        _passed_over(cut, stopped["whole"], "manifest.json was changed")


def test_fault_21_weights_that_are_not_finite(cut: Path, stopped: dict[str, Path]) -> None:
    """A checkpoint that verifies, of a model that was destroyed: it is there, it is not healthy, it is not resumed."""
    from safetensors.torch import load_file, save_file

    path = _newest(cut) / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    facts = {key: value for key, value in read_manifest(_newest(cut)).items() if key != "files"}
    write_manifest(_newest(cut), facts | {"finite_weights": False})
    info = list_checkpoints(cut / "checkpoints")[0]
    assert (info.step, info.verified, info.healthy) == (5, True, False)
    _passed_over(cut, stopped["whole"], "its weights are not finite")


def test_fault_21_a_save_of_weights_that_are_not_finite_is_not_healthy(family_model: Model, tmp_path: Path) -> None:
    class Destroy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 6:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    tune(family_model("llama"), tmp_path / "run", callbacks=[Destroy()], **HOW | {"max_steps": 6})
    infos = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [(info.step, info.verified, info.healthy) for info in infos if info.step >= 4] == [
        (6, True, False),
        (4, True, True),
    ]


def test_fault_22_all_bad_is_a_clear_stop(cut: Path) -> None:
    for info in list_checkpoints(cut / "checkpoints"):
        (info.path / "optimizer.pt").write_bytes(b"")
    before = (cut / "events.jsonl").read_bytes().count(b"run_started")
    with pytest.raises(CheckpointError, match=r"none of 3 checkpoints verifies \(newest: optimizer.pt has 0 bytes"):
        FineTuner.resume(cut, ROWS)
    assert CheckpointError.exit_code == 6
    assert (cut / "events.jsonl").read_bytes().count(b"run_started") == before
    assert len(list_checkpoints(cut / "checkpoints")) == 3  # nothing was deleted or put aside
    with pytest.raises(CheckpointError):  # and it stays a stop
        FineTuner.resume(cut, ROWS)


def test_fault_23_an_unknown_field_in_the_trainer_state(cut: Path, stopped: dict[str, Path]) -> None:
    """Written by another version of transformers: never ignored, never a defect; the one before is read."""
    path = _newest(cut) / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    facts = {key: value for key, value in read_manifest(_newest(cut)).items() if key != "files"}
    write_manifest(_newest(cut), facts | {"versions": {"transformers": "6.0.0"}})
    assert verify(_newest(cut)).ok
    _passed_over(cut, stopped["whole"], "unexpected keyword argument 'colour'); it was written by 6.0.0")


def test_fault_24_a_renamed_directory(cut: Path, stopped: dict[str, Path]) -> None:
    _newest(cut).rename(_newest(cut).with_name("checkpoint-6"))
    FineTuner.resume(cut, ROWS)
    (rejected,) = events(cut, "checkpoint_rejected")[:1]
    assert rejected["reason"] == "is named checkpoint-6 but holds step 5"
    assert events(cut, "run_started")[1]["resumed_from"] == BEFORE
    _same(cut, stopped["whole"])
    assert verify(cut / "checkpoints" / "checkpoint-6").ok  # the impostor made way for the real one


# --- links ------------------------------------------------------------------------------------------------------------


def test_fault_70_a_symlinked_checkpoint(cut: Path, stopped: dict[str, Path], tmp_path: Path) -> None:
    _newest(cut).rename(tmp_path / "checkpoint-5")
    _newest(cut).symlink_to(tmp_path / "checkpoint-5")
    _passed_over(cut, stopped["whole"], "is a symbolic link")
    assert verify(tmp_path / "checkpoint-5").ok  # what it points to was left alone


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth", MANIFEST])
def test_fault_70_a_symlinked_file(cut: Path, stopped: dict[str, Path], tmp_path: Path, name: str) -> None:
    (_newest(cut) / name).rename(tmp_path / name)
    (_newest(cut) / name).symlink_to(tmp_path / name)
    reason = "manifest.json is no regular file" if name == MANIFEST else f"{name} is a symbolic link"
    assert verify(_newest(cut)).reason == reason
    if name == "rng_state.pth":
        _passed_over(cut, stopped["whole"], reason)
        assert (tmp_path / name).is_file()


def test_fault_70_links_among_the_leftovers_are_removed_not_followed(cut: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    for place, name in (
        (cut / "checkpoints", ".staging-1-1-x"),
        (cut / "checkpoints", ".trash-x"),
        (cut, ".trash-adapter-x"),
    ):
        (place / name).symlink_to(tmp_path / "precious")
    FineTuner.resume(cut, ROWS)
    assert (tmp_path / "precious" / "file").read_text() == "x"
    assert not [path for path in (cut / "checkpoints").iterdir() if path.is_symlink()]


def test_fault_70_the_run_itself_may_be_reached_by_a_link(cut: Path, stopped: dict[str, Path], tmp_path: Path) -> None:
    """Whoever links a run directory means it; only what lies inside must be what was saved."""
    (tmp_path / "link").symlink_to(cut)
    assert RunDirectory.open(tmp_path / "link").run["status"] == "preempted"
    assert all(info.verified for info in list_checkpoints(tmp_path / "link" / "checkpoints"))
