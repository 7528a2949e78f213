"""Committed checkpoints: complete or invisible, verified before use, never the wrong one deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.checkpoints import (
    MANIFEST,
    best_of,
    commit,
    facts_of,
    list_checkpoints,
    matching,
    newest_verified,
    read_manifest,
    replace_directory,
    retain,
    set_aside_after,
    staging_root,
    sweep_leftovers,
    verify,
    write_manifest,
)
from llmtune.checkpoints.manifest import verify_once
from llmtune.checkpoints.sharing import SPARES
from llmtune.errors import CheckpointError, ConfigError


def make(
    root: Path, step: int, content: bytes = b"weights", shared: dict[str, str] | None = None, **facts: object
) -> Path:
    staged = staging_root(root, step) / f"checkpoint-{step}"
    (staged / "nested").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "nested" / "state.json").write_text("{}")
    (staged / "training_args.bin").write_bytes(b"pickled token")
    for name, text in (shared or {}).items():
        (staged / name).write_text(text)
    done = commit(staged, root / f"checkpoint-{step}", {"step": step, "finite_weights": True, "metrics": {}} | facts)
    sweep_leftovers(root)
    return done


def test_a_committed_checkpoint_verifies_and_keeps_no_pickled_arguments(tmp_path: Path) -> None:
    path = make(tmp_path, 3, metrics={"eval_loss": 1.5})
    assert verify(path).ok
    assert sorted(p.name for p in path.rglob("*")) == [MANIFEST, "model.bin", "nested", "state.json"]
    (info,) = list_checkpoints(tmp_path)
    assert info.to_json() == {
        "step": 3,
        "path": str(path),
        "verified": True,
        "reason": "every file matches its manifest",
        "metrics": {"eval_loss": 1.5},
        "bytes": len(b"weights") + 2,
        "healthy": True,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def _truncate(path: Path) -> None:
    (path / "model.bin").write_bytes(b"wei")


def _zero(path: Path) -> None:
    (path / "model.bin").write_bytes(b"\0" * 7)


def _extra(path: Path) -> None:
    (path / "extra.bin").write_bytes(b"x")


def _missing(path: Path) -> None:
    (path / "nested" / "state.json").unlink()


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def _edited_manifest(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["step"] = 3.0 if document["step"] == 4 else 3
    document["metrics"] = {"eval_loss": 0.0}
    (path / MANIFEST).write_text(json.dumps(document))


def _garbled_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"\xff{")


def _null_bytes(path: Path) -> None:
    (path / MANIFEST).write_bytes(bytes(300))


def _deep_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"[" * 100_000)


def _linked_manifest(path: Path) -> None:
    (path / MANIFEST).rename(path.parent / "elsewhere.json")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere.json")


def _linked_folder(path: Path) -> None:
    (path / "nested").rename(path.parent / "elsewhere")
    (path / "nested").symlink_to(path.parent / "elsewhere")


def _pipe(path: Path) -> None:
    (path / "model.bin").unlink()
    os.mkfifo(path / "model.bin")


def _linked_whole(path: Path) -> None:
    path.rename(path.parent / "whole")
    path.symlink_to(path.parent / "whole")


def _a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def _symlink(path: Path) -> None:
    (path / "model.bin").rename(path.parent / "elsewhere.bin")
    (path / "model.bin").symlink_to(path.parent / "elsewhere.bin")


DAMAGES = [
    *(_truncate, _zero, _extra, _missing, _no_manifest, _edited_manifest, _garbled_manifest, _null_bytes),
    *(_deep_manifest, _linked_manifest, _linked_folder, _pipe, _linked_whole, _a_file, _symlink),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path: Path, damage: object) -> None:
    older, newer = make(tmp_path, 3), make(tmp_path, 4)
    damage(newer)  # type: ignore[operator]
    rejected = []
    assert newest_verified(tmp_path, rejected.append) == older
    assert [(info.step, info.verified, info.healthy) for info in rejected] == [(4, False, False)]
    assert rejected[0].reason


def test_a_renamed_checkpoint_is_rejected(tmp_path: Path) -> None:
    make(tmp_path, 3).rename(tmp_path / "checkpoint-9")
    assert "holds step 3" in verify(tmp_path / "checkpoint-9").reason


def test_when_none_verifies_nothing_is_restarted_silently(tmp_path: Path) -> None:
    _truncate(make(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints verifies.*--output"):
        newest_verified(tmp_path, lambda info: None)
    assert newest_verified(tmp_path / "nothing-here", lambda info: None) is None


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_flip_is_silent(tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int) -> None:
    root = tmp_path_factory.mktemp("flip")
    path = make(root, 1, content=bytes(range(256)) * 8)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    target = files[offset % len(files)]
    data = bytearray(target.read_bytes())
    position = offset % len(data)
    data[position] ^= 1 << bit
    target.write_bytes(data)
    assert not verify(path).ok


def test_committing_a_step_again_keeps_the_good_one_and_puts_a_bad_one_aside(tmp_path: Path) -> None:
    path = make(tmp_path, 5, content=b"first")
    make(tmp_path, 5, content=b"second")
    assert (path / "model.bin").read_bytes() == b"first"
    _truncate(path)
    make(tmp_path, 5, content=b"third")
    assert (path / "model.bin").read_bytes() == b"third"
    assert [p.name.split("-")[0] for p in tmp_path.iterdir() if p != path] == [".quarantine"]


def test_a_failed_commit_leaves_what_was_there_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make(tmp_path, 1)
    real = os.fsync

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", real)
    sweep_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify(good).ok


def test_retention_keeps_the_newest_by_step_the_best_and_the_newest_healthy(tmp_path: Path) -> None:
    for step in (9, 10, 100, 11, 12):
        make(tmp_path, step, finite_weights=step not in (100, 12))
    os.utime(tmp_path / "checkpoint-100", (0, 0))  # the clock was stepped back: age is not what counts
    gone = retain(tmp_path, keep=2, best=tmp_path / "checkpoint-9")
    assert (gone.deleted, gone.rejected) == ((10,), ())
    assert [info.step for info in list_checkpoints(tmp_path)] == [100, 12, 11, 9]


def test_a_checkpoint_that_does_not_verify_never_counts_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    _truncate(tmp_path / "checkpoint-4")
    _truncate(tmp_path / "checkpoint-3")
    done = retain(tmp_path, keep=2, best=None)
    assert (done.deleted, [info.step for info in done.rejected]) == ((), [4, 3])
    assert all("model.bin has 3 bytes" in info.reason for info in done.rejected)
    assert sum(path.name.startswith(".quarantine-") for path in tmp_path.iterdir()) == 2
    assert newest_verified(tmp_path, lambda info: None) == tmp_path / "checkpoint-2"


def test_leftovers_of_a_killed_process_are_swept_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / ".staging-2-1-aa" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".trash-checkpoint-0-bb").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    sweep_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-notes"]
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert list_checkpoints(tmp_path) == []


def test_leftovers_of_final_exports_are_swept_too(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    for name in (".staging-adapter-aa", ".trash-model-bb", "adapter", ".staging-notes"):
        (tmp_path / name).mkdir()
    (root / ".staging-link").symlink_to(tmp_path / "adapter")
    sweep_leftovers(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-notes", "adapter", "checkpoints"]
    assert list(root.iterdir()) == []


def test_weights_that_are_not_finite_are_never_resumed(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2, finite_weights=False)
    rejected = []
    assert newest_verified(tmp_path, rejected.append) == tmp_path / "checkpoint-1"
    assert rejected[0].reason == "its weights are not finite"


def test_what_else_speaks_against_a_checkpoint_is_asked(tmp_path: Path) -> None:
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    rejected = []
    found = newest_verified(tmp_path, rejected.append, lambda path: "too new" if path == newer else None)
    assert (found, [info.reason for info in rejected]) == (older, ["too new"])
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints verifies \(newest: no\)"):
        newest_verified(tmp_path, lambda info: None, lambda path: "no")


def test_healthy_means_finite_weights_no_open_incident_and_a_good_last_evaluation(tmp_path: Path) -> None:
    for step, facts in enumerate([{}, {"open_incident": True}, {"evaluation_worse": True}, {"finite_weights": False}]):
        make(tmp_path, step + 1, **facts)
    assert [info.healthy for info in list_checkpoints(tmp_path)] == [False, False, False, True]
    assert retain(tmp_path, keep=2, best=None).deleted == (2,)  # the only healthy one is the oldest, and stays


@pytest.mark.parametrize(("greater", "best"), [(False, 2), (True, 3)])
def test_the_best_by_any_metric_is_among_those_that_verify(tmp_path: Path, greater: bool, best: int) -> None:
    for step, value in [(1, 0.5), (2, 1.0), (3, 2.0), (4, "nan"), (5, 1.0 if greater else 3.0)]:
        make(tmp_path, step, metrics={"eval_f1": value})
    make(tmp_path, 6)
    _truncate(tmp_path / "checkpoint-1")
    infos = list_checkpoints(tmp_path)
    chosen = best_of(infos, "f1", greater_is_better=greater)
    assert chosen is not None
    assert chosen.step == best
    assert best_of(infos, "eval_f1", greater_is_better=greater) == chosen
    assert best_of(infos, "rouge", greater_is_better=True) is None


def test_what_was_verified_is_not_read_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmtune.checkpoints.manifest as manifest

    read: list[str] = []
    real = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: (read.append(path.name), real(path))[1])
    paths = [make(tmp_path, step) for step in (1, 2, 3)]
    read.clear()
    assert retain(tmp_path, keep=3, best=None).deleted == ()  # as committed: nothing is hashed
    assert read == []
    data = (paths[1] / "model.bin").read_bytes()
    (paths[1] / "model.bin").write_bytes(b"W" + data[1:])  # as long as before
    assert not verify_once(paths[1]).ok
    assert "model.bin" in read
    assert verify_once(paths[0]).ok


def test_checkpoints_of_a_course_that_was_left_are_put_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    assert [path.name for path in set_aside_after(tmp_path, 1)] == ["checkpoint-3", "checkpoint-2"]
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    assert make(tmp_path, 2, content=b"another course").is_dir()
    assert (tmp_path / "checkpoint-2" / "model.bin").read_bytes() == b"another course"


def test_retention_puts_nothing_aside_while_nothing_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _truncate(make(tmp_path, step))
    done = retain(tmp_path, keep=2, best=None)
    assert (done.deleted, done.rejected) == ((), ())
    assert len(list_checkpoints(tmp_path)) == 3


# --- files that can be rebuilt ----------------------------------------------------------------------------------------


def test_only_files_that_can_be_rebuilt_are_shared(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    paths = [make(root, step, shared={"tokenizer.json": "words"}) for step in (1, 2, 3)]
    assert len({(path / "tokenizer.json").stat().st_ino for path in paths}) == 1
    assert len({(path / "model.bin").stat().st_ino for path in paths}) == 3
    assert len({(path / "nested" / "state.json").stat().st_ino for path in paths}) == 3
    spare = next((tmp_path / SPARES).iterdir())
    assert spare.read_text() == "words"
    assert spare.stat().st_ino != (paths[0] / "tokenizer.json").stat().st_ino
    other = make(root, 4, shared={"tokenizer.json": "other words"})
    assert (other / "tokenizer.json").read_text() == "other words"
    retain(root, keep=2, best=None)
    assert all(info.verified for info in list_checkpoints(root))


def test_a_damaged_shared_file_is_restored_and_nothing_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    paths = [make(root, step, shared={"tokenizer.json": "words"}) for step in (1, 2)]
    with (paths[0] / "tokenizer.json").open("r+b") as file:  # one inode: both checkpoints are damaged at once
        file.write(b"W")
    assert [verify(path).ok for path in paths] == [False, False]
    assert newest_verified(root, lambda info: None) == paths[1]
    assert [verify(path).ok for path in paths] == [False, True]
    assert retain(root, keep=2, best=None).rejected == ()  # the other one is restored when it is looked at
    assert [verify(path).ok for path in paths] == [True, True]
    (paths[1] / "tokenizer.json").unlink()
    assert newest_verified(root, lambda info: None) == paths[1]
    make(root, 3, shared={"tokenizer.json": "words"})
    assert all(info.verified for info in list_checkpoints(root))


def test_weights_are_never_restored_from_anywhere(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    older, newer = (make(root, step, shared={"tokenizer.json": "words"}) for step in (1, 2))
    _zero(newer)
    assert newest_verified(root, lambda info: None) == older


# --- manifests and directories ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    facts=st.dictionaries(
        st.text(max_size=8).filter(lambda key: key not in ("step", "files", "format_version", "manifest_sha256")),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_a_manifest_says_what_it_was_told(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, object]) -> None:
    directory = tmp_path_factory.mktemp("manifest") / "checkpoint-7"
    directory.mkdir()
    (directory / "a").write_bytes(b"a")
    write_manifest(directory, {"step": 7, **facts})
    document = read_manifest(directory)
    assert {key: document[key] for key in facts} == facts
    assert document["files"]["a"]["bytes"] == 1
    assert verify(directory).ok


def test_a_manifest_that_leads_out_of_its_directory_is_rejected(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    files = read_manifest(path)["files"]
    for name in ("../outside", str(tmp_path / "outside"), "nested/../../outside"):
        write_manifest(path, {"step": 1}, {**files, name: entry})
        assert f"{name} is missing" in verify(path).reason


def test_a_final_directory_is_replaced_whole(tmp_path: Path) -> None:
    final, staged = tmp_path / "adapter", tmp_path / ".staging-adapter-x"
    for directory, text in ((final, "old"), (staged, "new")):
        directory.mkdir()
        (directory / "weights").write_text(text)
    (final / "gone").write_text("")
    replace_directory(staged, final)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert [(path.name, path.read_text()) for path in final.iterdir()] == [("weights", "new")]


# --- search -----------------------------------------------------------------------------------------------------------


def found(root: Path, *conditions: str) -> list[int]:
    return [info.step for info in matching(list_checkpoints(root), conditions)]


def test_checkpoints_are_found_by_anything_that_is_known_about_them(tmp_path: Path) -> None:
    versions = {"torch": "2.13.0+cpu"}
    make(tmp_path, 2, metrics={"eval_loss": 2.0}, versions=versions)
    make(tmp_path, 4, metrics={"eval_loss": 1.0}, versions=versions, open_incident=True)
    make(tmp_path, 10, metrics={}, versions={"torch": "2.14.0"})
    assert found(tmp_path) == [10, 4, 2]
    assert found(tmp_path, "eval_loss<1.5") == [4]
    assert found(tmp_path, "eval_loss <= 2") == [4, 2]
    assert found(tmp_path, "healthy=true") == [10, 2]
    assert found(tmp_path, "healthy!=yes") == [4]
    assert found(tmp_path, "step>=4", "versions.torch=2.13.0+cpu") == [4]
    assert found(tmp_path, "versions.torch!=2.13.0+cpu") == [10]
    assert found(tmp_path, "step=four") == []
    facts = facts_of(list_checkpoints(tmp_path)[1])
    assert (facts["eval_loss"], facts["versions.torch"], facts["open_incident"]) == (1.0, "2.13.0+cpu", True)
    assert "files" not in facts


def test_every_condition_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    make(tmp_path, 2, metrics={"eval_loss": 2.0})
    with pytest.raises(ConfigError, match=r"'eval_los' is in no checkpoint, did you mean 'eval_loss'.*got 'best'"):
        found(tmp_path, "eval_los<1", "best")
